"""PrismNet: one encoder per modality, fusion at every scale, a fused and a unimodal decoder.

All work is done on *pairs*, the (sample, modality) combinations that are shown, packed into one
batch of P. What is not shown is never computed, so it can change neither an output nor a gradient.
Each encoder runs once on its pairs, and each decoder once on everything there is to decode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, torch's own convention

from prism_meta.networks.blocks import Encoder, block, conv, pointwise
from prism_meta.networks.fusion import Fusion, Groups, RegionAwareFusion


@dataclass(frozen=True)
class Pairs:
    """The shown (sample, modality) pairs of a batch, modality by modality.

    Args:
        sample: (P,) long, index of the sample.
        modality: (P,) long, index of the modality.
        mask: bool (B, M), what they were made from.

    Example:
        >>> Pairs.of(torch.tensor([[True, False], [True, True]])).sample
        tensor([0, 1, 1])
    """

    sample: Tensor
    modality: Tensor
    mask: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Pairs:
        """The pairs of ``mask``, bool (B, M).

        Raises:
            ValueError: a sample is shown no modality.
        """
        modality, sample = mask.T.nonzero(as_tuple=True)
        if not mask.any(1).all():
            raise ValueError(
                "mask: a sample is shown no modality; each row needs at least one True"
            )
        return cls(sample, modality, mask)

    def none(self) -> Pairs:
        """No pair of the same batch, for a prediction without unimodal outputs."""
        return Pairs(self.sample[:0], self.modality[:0], self.mask)

    def scatter(self, packed: Tensor) -> Tensor:
        """(P, ...) to (B, M, ...), zero where a pair is not shown."""
        shape = (*self.mask.shape, *packed.shape[1:])
        return packed.new_zeros(shape).index_put((self.sample, self.modality), packed)


@dataclass(frozen=True)
class Branch:
    """What one pass of a decoder gives.

    Args:
        logits: (N, K, *S).
        features: (N, C, *S), what the logits are a linear map of.
        prm: logits at coarser scales, the finest first: (N, K, *S / 2), (N, K, *S / 4), ...
    """

    logits: Tensor
    features: Tensor
    prm: tuple[Tensor, ...] = ()

    def take(self, rows: Tensor | slice) -> Branch:
        """The branch of some of the N."""
        return Branch(self.logits[rows], self.features[rows], tuple(p[rows] for p in self.prm))


@dataclass(frozen=True)
class Prediction:
    """What a model gives for a batch of B samples with P shown pairs.

    Args:
        branch: the fused branch: all shown modalities (N = B).
        alone: the same decoder shown one modality at a time (N = P): the students of E8 and E9.
        unimodal_packed: (P, K, *S) logits of the shared unimodal decoder.
        pairs: which sample and modality each of the P belongs to.
    """

    branch: Branch
    alone: Branch
    unimodal_packed: Tensor
    pairs: Pairs

    @property
    def fused(self) -> Tensor:
        """(B, K, *S) logits from all shown modalities."""
        return self.branch.logits

    @property
    def prm(self) -> tuple[Tensor, ...]:
        """Coarse logits of the fused branch, the finest first."""
        return self.branch.prm

    @property
    def features(self) -> Tensor:
        """(B, C, *S) features of the fused branch."""
        return self.branch.features

    @property
    def unimodal(self) -> Tensor:
        """(B, M, K, *S) logits of each modality alone; 0 where it is not shown."""
        return self.pairs.scatter(self.unimodal_packed)


class PrismNet(nn.Module):
    """One segmentation network for every subset of modalities.

    Args:
        num_modalities: M.
        num_classes: K, background included.
        spatial_dims: 2 or 3.
        width: channels at full resolution; they double at each of the ``depth`` scales.
        depth: number of scales, at least 2.
        fusion: class of the fusions: ``RegionAwareFusion``, ``MeanFusion``, ``AttentionFusion``, or
            another ``Fusion``.

    Shapes: ``model(image, mask)`` with image (B, M, *S) and mask bool (B, M) gives a ``Prediction``;
    with ``unimodal=False`` one without pairs, for which the fused branch alone is computed.
    ``model.segment(image, mask)`` gives its logits (B, K, *S).

    Raises:
        ValueError: an argument is out of range, or the image has another number of modalities.

    Source: PRISM; RFNet (Ding et al., ICCV 2021) for the two decoders, and for prm maps that guide the
    fusion at the next finer scale.

    Example:
        >>> net = PrismNet(num_modalities=2, num_classes=3, spatial_dims=2, width=4)
        >>> out = net(torch.randn(2, 2, 16, 16), torch.tensor([[True, True], [False, True]]))
        >>> out.fused.shape, out.unimodal.shape, [tuple(p.shape[2:]) for p in out.prm]
        (torch.Size([2, 3, 16, 16]), torch.Size([2, 2, 3, 16, 16]), [(8, 8), (4, 4), (2, 2)])
    """

    def __init__(
        self,
        num_modalities: int = 4,
        num_classes: int = 4,
        spatial_dims: int = 3,
        width: int = 8,
        *,
        depth: int = 4,
        fusion: type[Fusion] = RegionAwareFusion,
    ) -> None:
        super().__init__()
        lowest = {"num_modalities": 1, "num_classes": 2, "width": 1, "depth": 2}
        for name, minimum in lowest.items():
            value = locals()[name]
            if value < minimum:
                raise ValueError(f"{name}: got {value}, expected at least {minimum}")
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims: got {spatial_dims}, expected 2 or 3")
        self.num_classes, self.spatial_dims = num_classes, spatial_dims
        channels = [width * 2**scale for scale in range(depth)]
        self.encoders = nn.ModuleList(
            Encoder(channels, spatial_dims) for _ in range(num_modalities)
        )
        self.fusions = nn.ModuleList(
            fusion(
                c,
                num_modalities=num_modalities,
                num_classes=num_classes,
                spatial_dims=spatial_dims,
            )
            for c in channels
        )
        self.decoder = _Decoder(channels, num_classes, spatial_dims, with_prm=True)
        self.unimodal_decoder = _Decoder(channels, num_classes, spatial_dims, with_prm=False)
        if spatial_dims == 3:
            # torch's CPU conv3d takes a slow path for small batches in the default layout.
            self.to(memory_format=torch.channels_last_3d)

    def forward(self, image: Tensor, mask: Tensor, *, unimodal: bool = True) -> Prediction:
        pairs = self._pairs(image, mask)
        scales = self._encode(image, pairs)
        work = _Work.of(pairs, unimodal=unimodal)
        both = self._decode(scales, work)
        if not unimodal:
            branch = both.take(work.row)
            return Prediction(branch, branch.take(slice(0)), branch.logits[:0], pairs.none())
        return Prediction(
            branch=both.take(work.row),
            alone=both.take(slice(work.groups.size, None)),
            unimodal_packed=self.unimodal_decoder(lambda scale, guide: scales[scale]).logits,
            pairs=pairs,
        )

    def segment(self, image: Tensor, mask: Tensor) -> Tensor:
        """The fused logits (B, K, *S) alone, for inference."""
        pairs = self._pairs(image, mask)
        work = _Work.of(pairs, unimodal=False)
        return self._decode(self._encode(image, pairs), work).logits[work.row]

    def segment_subsets(self, image: Tensor, subsets: Tensor) -> Tensor:
        """The fused logits of many subsets of one batch, for inference: encoders run once.

        Args:
            image: (B, M, *S); a modality that no subset shows is not used.
            subsets: bool (S, M), each with a modality.

        Returns:
            (S, B, K, *S), those of ``segment`` with each subset for the whole batch.

        Raises:
            ValueError: as ``segment``.

        Example:
            >>> net = PrismNet(num_modalities=2, num_classes=3, spatial_dims=2, width=4)
            >>> subsets = torch.tensor([[True, False], [True, True]])
            >>> net.segment_subsets(torch.randn(5, 2, 16, 16), subsets).shape
            torch.Size([2, 5, 3, 16, 16])
        """
        pairs = self._pairs(image, subsets.any(0).expand(len(image), -1))
        scales = self._encode(image, pairs)
        results = []
        for subset in subsets:
            shown = subset[pairs.modality].nonzero()[:, 0]
            work = _Work.of(Pairs.of(subset.expand(len(image), -1)), unimodal=False)
            results.append(self._decode([s[shown] for s in scales], work).logits[work.row])
        return torch.stack(results)

    def _pairs(self, image: Tensor, mask: Tensor) -> Pairs:
        expected = (image.shape[0], len(self.encoders))
        if image.shape[1] != expected[1] or tuple(mask.shape) != expected:
            raise ValueError(
                f"image, mask: got {tuple(image.shape)}, {tuple(mask.shape)}; expected "
                f"(B, {expected[1]}, *S) and (B, {expected[1]}) for this model's modalities"
            )
        coarsest = 2 ** (len(self.fusions) - 1)
        if max(image.shape[2:]) <= coarsest:
            raise ValueError(
                f"image: {tuple(image.shape[2:])} voxels leave a single one at the coarsest of "
                f"{len(self.fusions)} scales; use more than {coarsest}, or a smaller depth"
            )
        return Pairs.of(mask)

    def _encode(self, image: Tensor, pairs: Pairs) -> list[Tensor]:
        """Features of the shown pairs at every scale, (P, C, *s) each, modality by modality."""
        per_modality = [
            encoder(image[pairs.sample[pairs.modality == m], m, None])
            for m, encoder in enumerate(self.encoders)
            if pairs.mask[:, m].any()
        ]
        return [torch.cat(scale) for scale in zip(*per_modality, strict=True)]

    def _decode(self, scales: Sequence[Tensor], work: _Work) -> Branch:
        """One pass of the fusion decoder for all of ``work``."""

        def regions(features: Tensor, guide: Tensor | None) -> Tensor:
            size = features.shape[2:]
            if guide is None:
                shape = (work.groups.size, self.num_classes, *size)
                return features.new_full(shape, 1 / self.num_classes)
            # The map guides the fusion and is not taught by it.
            return _resize(guide[: work.groups.size].detach(), size).softmax(1)

        def fuse(scale: int, guide: Tensor | None) -> Tensor:
            fusion, features = self.fusions[scale], scales[scale]
            parts = []
            if work.groups.size:
                parts.append(fusion(features[work.fused], work.groups, regions(features, guide)))
            if len(work.alone):
                parts.append(fusion.alone(features[work.alone]))  # type: ignore[operator]
            return torch.cat(parts)

        branch: Branch = self.decoder(fuse)
        return branch


@dataclass(frozen=True)
class _Work:
    """What the fusion decoder has to do: groups of pairs to fuse, then pairs to decode alone.

    Args:
        fused: (Q,) long, the pairs of samples that are shown several modalities.
        groups: of these.
        alone: (A,) long, the pairs to decode alone.
        row: (B,) long, where each sample is among the G + A rows that are decoded.
    """

    fused: Tensor
    groups: Groups
    alone: Tensor
    row: Tensor

    @classmethod
    def of(cls, pairs: Pairs, *, unimodal: bool) -> _Work:
        """For all samples, and with ``unimodal`` for all pairs alone.

        A sample that is shown one modality is that pair alone, which is decoded once.
        """
        several = pairs.mask.sum(1) > 1
        is_fused = several[pairs.sample]
        fused, single = is_fused.nonzero()[:, 0], (~is_fused).nonzero()[:, 0]
        rank = several.cumsum(0) - 1
        size = int(several.sum())
        groups = Groups(rank[pairs.sample[fused]], pairs.modality[fused], size)
        every = torch.arange(len(is_fused), device=is_fused.device)
        row = rank.clone()
        row[pairs.sample[single]] = size + (single if unimodal else every[: len(single)])
        return cls(fused, groups, every if unimodal else single, row)


class _Decoder(nn.Module):
    """Features at every scale to logits, with a prm head at each coarser scale if asked for."""

    def __init__(
        self, channels: Sequence[int], num_classes: int, spatial_dims: int, *, with_prm: bool
    ) -> None:
        super().__init__()
        pairs = list(pairwise(channels))
        # Channels are halved before upsampling, where a voxel costs an eighth (a quarter in 2-D).
        self.narrow = nn.ModuleList(pointwise(coarse, fine, spatial_dims) for fine, coarse in pairs)
        self.blocks = nn.ModuleList(block(2 * fine, fine, spatial_dims) for fine, _ in pairs)
        self.head = conv(channels[0], num_classes, spatial_dims)
        self.prm_heads = nn.ModuleList(
            conv(c, num_classes, spatial_dims) for c in (channels[1:] if with_prm else ())
        )

    def forward(self, skip: Callable[[int, Tensor | None], Tensor]) -> Branch:
        """``skip(scale, guide)`` gives the features at a scale, coarsest first; ``guide`` is the prm
        map of the next coarser one, if there is any."""
        x = skip(len(self.blocks), None)
        prm: list[Tensor] = []
        for scale in reversed(range(len(self.blocks))):
            if self.prm_heads:
                prm.insert(0, self.prm_heads[scale](x))
            fine = skip(scale, prm[0] if prm else None)
            x = _resize(self.narrow[scale](x), fine.shape[2:])
            x = self.blocks[scale](torch.cat((x, fine), 1))
        return Branch(self.head(x), x, tuple(prm))


def _resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(maps, size=size, mode="trilinear" if maps.ndim == 5 else "bilinear")
