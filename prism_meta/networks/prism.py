"""PrismNet: one encoder per modality, fusion at every scale, a fused and a unimodal decoder.

The network works on the *shown pairs*, the sample-modality combinations that the mask shows, packed
into one batch of P rows. Hidden modalities are never computed, so they can change neither an output
nor a gradient. Each encoder runs once, and each decoder runs once for all rows that it has to decode.
Prm maps are coarse-scale outputs of the fused decoder.
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
from prism_meta.networks.prediction import DecoderOutput, Prediction, ShownPairs


class PrismNet(nn.Module):
    """One segmentation network for every subset of modalities.

    Args:
        num_modalities: M. Defaults to 4.
        num_classes: K, including the background. Defaults to 4.
        spatial_dims: 2 or 3. Defaults to 3.
        width: number of channels at full resolution; it doubles at each coarser scale. Defaults to 8.
        depth: number of scales, at least 2. Defaults to 4.
        fusion: class that fuses the modalities at each scale: ``RegionAwareFusion`` (the default),
            ``MeanFusion``, ``AttentionFusion`` or another subclass of ``Fusion``.

    Shapes: ``model(image, mask)`` takes image (B, M, *S) and mask bool (B, M) and returns a
    ``Prediction``. With ``unimodal=False`` it computes only the fused branch, and the prediction has no
    pairs. ``model.segment(image, mask)`` returns the fused logits (B, K, *S).

    Raises:
        ValueError: an argument is out of range; later, the image has another number of modalities.

    Source: PRISM; RFNet (Ding et al., ICCV 2021) for the two decoders and for prm maps that guide the
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
        self.spatial_dims, self.num_classes = spatial_dims, num_classes
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
        """Predict a batch.

        Args:
            image: (B, M, *S). What ``mask`` hides is not used.
            mask: bool (B, M), the modalities that are shown; each row has at least one True.
            unimodal: also predict each shown modality by itself (E6, E8, E9). Defaults to True.

        Raises:
            ValueError: a sample is shown no modality, or a shape does not fit.
        """
        pairs = self._pairs(image, mask)
        scales = self._encode(image, pairs)
        plan = _DecodingPlan.of(pairs, unimodal=unimodal)
        both = self._decode(scales, plan)
        if not unimodal:
            branch = both.select(plan.sample_row)
            return Prediction(branch, branch.select(slice(0)), branch.logits[:0], pairs.empty())
        return Prediction(
            fused_output=both.select(plan.sample_row),
            single_modality=both.select(slice(plan.groups.size, None)),
            unimodal_packed=self.unimodal_decoder(lambda scale, guide: scales[scale]).logits,
            pairs=pairs,
        )

    def segment(self, image: Tensor, mask: Tensor) -> Tensor:
        """The fused logits (B, K, *S) only, from ``image`` (B, M, *S) and ``mask``, bool (B, M)."""
        pairs = self._pairs(image, mask)
        plan = _DecodingPlan.of(pairs, unimodal=False)
        return self._decode(self._encode(image, pairs), plan).logits[plan.sample_row]

    def segment_subsets(self, image: Tensor, subsets: Tensor) -> Tensor:
        """The fused logits for several subsets of one batch; each encoder runs once.

        Args:
            image: (B, M, *S); a modality that is in no subset is not used.
            subsets: bool (S, M); each row has at least one True.

        Returns:
            (S, B, K, *S). Row s equals ``segment`` with subset s for the whole batch.

        Raises:
            ValueError: a subset is empty, or a shape does not fit.

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
            plan = _DecodingPlan.of(
                ShownPairs.from_mask(subset.expand(len(image), -1)), unimodal=False
            )
            results.append(self._decode([s[shown] for s in scales], plan).logits[plan.sample_row])
        return torch.stack(results)

    def _pairs(self, image: Tensor, mask: Tensor) -> ShownPairs:
        expected = (image.shape[0], len(self.encoders))
        if image.shape[1] != expected[1] or tuple(mask.shape) != expected:
            raise ValueError(
                f"image, mask: got {tuple(image.shape)}, {tuple(mask.shape)}; expected "
                f"(B, {expected[1]}, *S) and (B, {expected[1]}) for this model's modalities"
            )
        coarsest = 2 ** (len(self.fusions) - 1)
        if max(image.shape[2:]) <= coarsest:
            raise ValueError(
                f"image: {tuple(image.shape[2:])} voxels leave one voxel at the coarsest of "
                f"{len(self.fusions)} scales; use more than {coarsest}, or a smaller depth"
            )
        return ShownPairs.from_mask(mask)

    def _encode(self, image: Tensor, pairs: ShownPairs) -> list[Tensor]:
        """Features of the shown pairs at every scale, (P, C, *s) each, modality by modality."""
        per_modality = [
            encoder(image[pairs.sample[pairs.modality == m], m, None])
            for m, encoder in enumerate(self.encoders)
            if pairs.mask[:, m].any()
        ]
        return [torch.cat(scale) for scale in zip(*per_modality, strict=True)]

    def _decode(self, scales: Sequence[Tensor], plan: _DecodingPlan) -> DecoderOutput:
        """Run the fused decoder once for all rows of ``plan``."""

        def regions(features: Tensor, guide: Tensor | None) -> Tensor:
            size = features.shape[2:]
            if guide is None:
                shape = (plan.groups.size, self.num_classes, *size)
                return features.new_full(shape, 1 / self.num_classes)
            # The prm map guides the fusion; the fusion does not train the map.
            return _resize(guide[: plan.groups.size].detach(), size).softmax(1)

        def fuse(scale: int, guide: Tensor | None) -> Tensor:
            fusion, features = self.fusions[scale], scales[scale]
            parts = []
            if plan.groups.size:
                parts.append(
                    fusion(features[plan.fused_pairs], plan.groups, regions(features, guide))
                )
            if len(plan.single_pairs):
                parts.append(fusion.fuse_single(features[plan.single_pairs]))  # type: ignore[operator]
            return torch.cat(parts)

        branch: DecoderOutput = self.decoder(fuse)
        return branch


@dataclass(frozen=True)
class _DecodingPlan:
    """The rows that the fused decoder computes: G fused groups of pairs, then A single pairs.

    Args:
        fused_pairs: (Q,) long, the pairs of all samples that are shown several modalities.
        groups: groups of ``fused_pairs``, one per sample.
        single_pairs: (A,) long, the pairs that are decoded as a single modality.
        sample_row: (B,) long, the row of each sample among the G + A rows.
    """

    fused_pairs: Tensor
    groups: Groups
    single_pairs: Tensor
    sample_row: Tensor

    @classmethod
    def of(cls, pairs: ShownPairs, *, unimodal: bool) -> _DecodingPlan:
        """Decode every sample, and with ``unimodal`` also every pair as a single modality.

        A sample that is shown one modality is the same row as its only pair; it is decoded once.
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
    """Features at every scale to logits, with a head for prm maps at each coarser scale if ``with_prm``."""

    def __init__(
        self, channels: Sequence[int], num_classes: int, spatial_dims: int, *, with_prm: bool
    ) -> None:
        super().__init__()
        steps = list(pairwise(channels))
        # Halving the channels before upsampling costs an eighth (2-D: a quarter) of doing it after.
        self.narrow = nn.ModuleList(pointwise(coarse, fine, spatial_dims) for fine, coarse in steps)
        self.blocks = nn.ModuleList(block(2 * fine, fine, spatial_dims) for fine, _ in steps)
        self.head = conv(channels[0], num_classes, spatial_dims)
        self.prm_heads = nn.ModuleList(
            conv(c, num_classes, spatial_dims) for c in (channels[1:] if with_prm else ())
        )

    def forward(self, skip: Callable[[int, Tensor | None], Tensor]) -> DecoderOutput:
        """Decode from coarse to fine.

        Args:
            skip: ``skip(scale, guide)`` returns the features of a scale; ``guide`` is the prm map of
                the next coarser scale, or None at the coarsest.
        """
        x = skip(len(self.blocks), None)
        prm: list[Tensor] = []
        for scale in reversed(range(len(self.blocks))):
            if self.prm_heads:
                prm.insert(0, self.prm_heads[scale](x))
            fine = skip(scale, prm[0] if prm else None)
            x = _resize(self.narrow[scale](x), fine.shape[2:])
            x = self.blocks[scale](torch.cat((x, fine), 1))
        return DecoderOutput(self.head(x), x, tuple(prm))


def _resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(maps, size=size, mode="trilinear" if maps.ndim == 5 else "bilinear")
