"""What segmentation models return, and the protocol that they fulfil.

A sample-modality pair is *shown* if the mask is True there. Models compute only shown pairs and pack
them into one batch of P rows, so a hidden modality can change neither an output nor a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class ShownPairs:
    """The sample-modality pairs that a batch shows, ordered by modality, then by sample.

    Args:
        sample: (P,) long, index of the sample.
        modality: (P,) long, index of the modality.
        mask: bool (B, M), the mask that the pairs come from.

    Example:
        >>> import torch
        >>> pairs = ShownPairs.from_mask(torch.tensor([[True, False], [True, True]]))
        >>> pairs.sample, pairs.modality
        (tensor([0, 1, 1]), tensor([0, 0, 1]))
    """

    sample: Tensor
    modality: Tensor
    mask: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor) -> ShownPairs:
        """The shown pairs of ``mask``, bool (B, M).

        Raises:
            ValueError: a sample is shown no modality.
        """
        modality, sample = mask.T.nonzero(as_tuple=True)
        if not mask.any(1).all():
            raise ValueError(
                "mask: a sample is shown no modality; each row needs at least one True"
            )
        return cls(sample, modality, mask)

    def empty(self) -> ShownPairs:
        """The same batch with no pairs. Predictions without unimodal outputs use it."""
        return ShownPairs(self.sample[:0], self.modality[:0], self.mask)

    def unpack(self, packed: Tensor) -> Tensor:
        """Packed rows (P, ...) as a dense tensor (B, M, ...); hidden pairs are 0."""
        shape = (*self.mask.shape, *packed.shape[1:])
        return packed.new_zeros(shape).index_put((self.sample, self.modality), packed)


@dataclass(frozen=True)
class DecoderOutput:
    """What one pass of a decoder returns for N rows.

    Args:
        logits: (N, K, *S).
        features: (N, C, *S), the input of the last layer.
        prm: prm maps (logits of the decoder's coarser scales), finest first: (N, K, *S / 2),
            (N, K, *S / 4), ...
    """

    logits: Tensor
    features: Tensor
    prm: tuple[Tensor, ...] = ()

    def select(self, rows: Tensor | slice) -> DecoderOutput:
        """The output for some of the N rows."""
        prm = tuple(maps[rows] for maps in self.prm)
        return DecoderOutput(self.logits[rows], self.features[rows], prm)


@dataclass(frozen=True)
class Prediction:
    """What a model returns for a batch of B samples with P shown pairs.

    Args:
        fused_output: the fused branch, which sees all shown modalities of a sample (N = B).
        single_modality: the same branch when it is shown one modality at a time (N = P). These rows
            are the students of distillation (E8) and prototype alignment (E9).
        unimodal_packed: (P, K, *S) logits of the unimodal decoder (E6), which all modalities share. A
            model without such a decoder repeats ``single_modality.logits``.
        pairs: sample and modality of each of the P rows.

    Example:
        >>> import torch
        >>> from prism_meta.networks.prism import PrismNet
        >>> net = PrismNet(num_modalities=2, num_classes=3, spatial_dims=2, width=4)
        >>> mask = torch.tensor([[True, True], [False, True]])
        >>> prediction = net(torch.randn(2, 2, 16, 16), mask)
        >>> prediction.fused.shape, prediction.single_modality.logits.shape
        (torch.Size([2, 3, 16, 16]), torch.Size([3, 3, 16, 16]))
    """

    fused_output: DecoderOutput
    single_modality: DecoderOutput
    unimodal_packed: Tensor
    pairs: ShownPairs

    @property
    def fused(self) -> Tensor:
        """(B, K, *S) logits from all shown modalities."""
        return self.fused_output.logits

    @property
    def prm(self) -> tuple[Tensor, ...]:
        """Prm maps (coarse logits) of the fused branch, finest first."""
        return self.fused_output.prm

    @property
    def features(self) -> Tensor:
        """(B, C, *S) features of the fused branch."""
        return self.fused_output.features

    @property
    def unimodal(self) -> Tensor:
        """(B, M, K, *S) unimodal logits; 0 for a hidden modality."""
        return self.pairs.unpack(self.unimodal_packed)


@runtime_checkable
class SegmentationModel(Protocol):
    """A segmentation model that accepts any non-empty subset of modalities.

    ``PrismNet`` and ``WrappedNet`` fulfil it. Training calls ``forward``; prediction and evaluation
    call ``segment`` and ``segment_subsets``.

    Example:
        >>> from prism_meta.networks.prism import PrismNet
        >>> isinstance(PrismNet(spatial_dims=2, width=2), SegmentationModel)
        True
    """

    @property
    def spatial_dims(self) -> int | None:
        """Number of spatial dimensions of the image, or None if it is unknown."""

    def forward(self, image: Tensor, mask: Tensor, *, unimodal: bool = True) -> Prediction:
        """Predict with all outputs that the objective needs.

        Args:
            image: (B, M, *S) float; hidden channels may hold any value.
            mask: bool (B, M), the modalities to show; each row has at least one.
            unimodal: False skips all single-modality outputs; the prediction then has no pairs.
        """

    def segment(self, image: Tensor, mask: Tensor) -> Tensor:
        """The fused logits (B, K, *S) only, from ``image`` (B, M, *S) and ``mask``, bool (B, M)."""

    def segment_subsets(self, image: Tensor, subsets: Tensor) -> Tensor:
        """The fused logits for several subsets of one batch, for inference.

        Args:
            image: (B, M, *S); a modality that is in no subset is not used.
            subsets: bool (S, M); each row has at least one True.

        Returns:
            (S, B, K, *S). Row s equals ``segment`` with subset s for the whole batch.
        """
