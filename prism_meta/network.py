"""PrismNet: one encoder per modality, fusion at every scale, a fused and a unimodal decoder.

All work is done on *pairs*, the (sample, modality) combinations that are shown, packed into one
batch of P. What is not shown is never computed, so it can change neither an output nor a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, torch's own convention


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


class MomentFusion(nn.Module):
    """Fuses any number of modalities by the weighted mean and variance of their features.

    Each voxel and channel of a modality gets a score, and the softmax of the scores over the shown
    modalities is its weight in both moments: with equal scores these are HeMIS's, and a modality that
    alone shows something (the ring in t1ce) is not diluted by the others.

    Args:
        channels: C of the features.
        spatial_dims: 2 or 3.

    Source: HeMIS (Havaei et al., MICCAI 2016) for the moments; attention over modalities as in
    mmFormer (Zhang et al., MICCAI 2022) for the weights, here by voxel and without tokens.

    Example:
        >>> fuse = MomentFusion(8, spatial_dims=2)
        >>> fuse(torch.randn(3, 8, 4, 4), torch.tensor([0, 0, 1]), 2).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, channels: int, *, spatial_dims: int) -> None:
        super().__init__()
        # A bias would cancel in the softmax, and Adam would follow the rounding of its gradient.
        self.score = _conv(spatial_dims)(channels, channels, 1, bias=False)
        self.mix = _conv(spatial_dims)(2 * channels, channels, 1)

    def forward(self, features: Tensor, sample: Tensor, batch: int) -> Tensor:
        """(P, C, *s) features and (P,) sample indices to (B, C, *s)."""

        def total(values: Tensor) -> Tensor:
            sums = values.new_zeros(batch, *values.shape[1:])
            return sums.index_add(0, sample, values)

        weight = _softmax_per_sample(self.score(features), sample, batch)
        mean = total(weight * features)
        deviation = (features - mean.index_select(0, sample)).square()
        mixed: Tensor = self.mix(torch.cat((mean, total(weight * deviation)), 1))
        return mixed


class PrismNet(nn.Module):
    """One segmentation network for every subset of modalities.

    Args:
        num_modalities: M.
        num_classes: K, background included.
        spatial_dims: 2 or 3.
        width: channels at full resolution; they double at each of the ``depth`` scales.
        depth: number of scales, at least 2.

    Shapes: ``model(image, mask)`` with image (B, M, *S) and mask bool (B, M) gives a ``Prediction``;
    ``model.segment(image, mask)`` computes its ``fused`` logits (B, K, *S) only.

    Raises:
        ValueError: an argument is out of range, or the image has another number of modalities.

    Source: PRISM; RFNet (Ding et al., ICCV 2021) for the two decoders and the prm maps.

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
    ) -> None:
        super().__init__()
        lowest = {"num_modalities": 1, "num_classes": 2, "width": 1, "depth": 2}
        for name, minimum in lowest.items():
            value = locals()[name]
            if value < minimum:
                raise ValueError(f"{name}: got {value}, expected at least {minimum}")
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims: got {spatial_dims}, expected 2 or 3")
        channels = [width * 2**scale for scale in range(depth)]
        self.encoders = nn.ModuleList(
            _Encoder(channels, spatial_dims) for _ in range(num_modalities)
        )
        self.fusions = nn.ModuleList(MomentFusion(c, spatial_dims=spatial_dims) for c in channels)
        self.decoder = _Decoder(channels, num_classes, spatial_dims, with_prm=True)
        self.unimodal_decoder = _Decoder(channels, num_classes, spatial_dims, with_prm=False)
        if spatial_dims == 3:
            # torch's CPU conv3d takes a slow path for small batches in the default layout.
            self.to(memory_format=torch.channels_last_3d)

    def forward(self, image: Tensor, mask: Tensor) -> Prediction:
        pairs = self._pairs(image, mask)
        scales = self._encode(image, pairs)
        batch = mask.shape[0]
        # One pass of the decoder serves the fused branch and every modality alone: the pairs are
        # appended to the batch as samples that are shown a single modality. A sample that is shown
        # only one is its own such pass already.
        several = (mask.sum(1) > 1)[pairs.sample]
        extra = several.nonzero()[:, 0]
        appended = batch + several.cumsum(0) - 1
        both = self._decode(
            [torch.cat((s, s[extra])) for s in scales],
            torch.cat((pairs.sample, appended[extra])),
            batch + len(extra),
        )
        return Prediction(
            branch=_take(both, slice(batch)),
            alone=_take(both, torch.where(several, appended, pairs.sample)),
            unimodal_packed=self.unimodal_decoder(scales).logits,
            pairs=pairs,
        )

    def segment(self, image: Tensor, mask: Tensor) -> Tensor:
        """The fused logits (B, K, *S) alone, for inference."""
        pairs = self._pairs(image, mask)
        return self._decode(self._encode(image, pairs), pairs.sample, mask.shape[0]).logits

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
            _without_slow_path(encoder, image[pairs.sample[pairs.modality == m], m, None])
            for m, encoder in enumerate(self.encoders)
            if pairs.mask[:, m].any()
        ]
        return [torch.cat(scale) for scale in zip(*per_modality, strict=True)]

    def _decode(self, scales: Sequence[Tensor], index: Tensor, batch: int) -> Branch:
        fused = [fuse(s, index, batch) for fuse, s in zip(self.fusions, scales, strict=True)]
        branch: Branch = self.decoder(fused)
        return branch


class _Encoder(nn.Module):
    """(N, 1, *S) to features at every scale, the finest first."""

    def __init__(self, channels: Sequence[int], spatial_dims: int) -> None:
        super().__init__()
        ins = [1, *channels[:-1]]
        self.blocks = nn.ModuleList(
            _block(i, o, spatial_dims, stride=1 if scale == 0 else 2)
            for scale, (i, o) in enumerate(zip(ins, channels, strict=True))
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        scales = []
        for block in self.blocks:
            x = block(x)
            scales.append(x)
        return scales


class _Decoder(nn.Module):
    """Features at every scale to logits, with a prm head at each coarser scale if asked for."""

    def __init__(
        self, channels: Sequence[int], num_classes: int, spatial_dims: int, *, with_prm: bool
    ) -> None:
        super().__init__()
        conv = _conv(spatial_dims)
        self.mode = "trilinear" if spatial_dims == 3 else "bilinear"
        pairs = list(pairwise(channels))
        # Channels are halved before upsampling, where a voxel costs an eighth (a quarter in 2-D).
        self.narrow = nn.ModuleList(conv(coarse, fine, 1) for fine, coarse in pairs)
        self.blocks = nn.ModuleList(_block(2 * fine, fine, spatial_dims) for fine, _ in pairs)
        self.head = conv(channels[0], num_classes, 3, padding=1)
        self.prm_heads = nn.ModuleList(
            conv(c, num_classes, 3, padding=1) for c in (channels[1:] if with_prm else ())
        )

    def forward(self, scales: Sequence[Tensor]) -> Branch:
        x = scales[-1]
        decoded = [x]
        finer = reversed(list(zip(self.narrow, self.blocks, scales[:-1], strict=True)))
        for narrow, block, skip in finer:
            x = F.interpolate(narrow(x), size=skip.shape[2:], mode=self.mode)
            x = block(torch.cat((x, skip), 1))
            decoded.insert(0, x)
        prm = [head(d) for head, d in zip(self.prm_heads, decoded[1:])]  # noqa: B905, may be none
        return Branch(self.head(x), x, tuple(prm))


def _block(ins: int, outs: int, spatial_dims: int, *, stride: int = 1) -> nn.Sequential:
    conv = _conv(spatial_dims)
    return nn.Sequential(
        conv(ins, outs, 3, stride=stride, padding=1, bias=False),
        _norm(outs),
        nn.LeakyReLU(0.01),
        conv(outs, outs, 3, padding=1, bias=False),
        _norm(outs),
        nn.LeakyReLU(0.01),
    )


def _without_slow_path(encoder: nn.Module, x: Tensor) -> list[Tensor]:
    """torch's CPU conv3d takes a kernel that is ten times slower for a batch of one: make it two."""
    if len(x) > 1 or x.ndim == 4 or x.device.type != "cpu":
        scales: list[Tensor] = encoder(x)
        return scales
    return [scale[:1] for scale in encoder(torch.cat((x, x)))]


def _norm(channels: int) -> nn.Module:
    """Instance normalisation; as a GroupNorm it costs a third of torch's InstanceNorm on a CPU."""
    return nn.GroupNorm(channels, channels)


def _conv(spatial_dims: int) -> type[nn.Conv2d] | type[nn.Conv3d]:
    return nn.Conv3d if spatial_dims == 3 else nn.Conv2d


def _softmax_per_sample(scores: Tensor, sample: Tensor, batch: int) -> Tensor:
    """Softmax over the pairs of each sample, (P, ...) to (P, ...); ``sample`` is (P,)."""
    shape = (batch, *scores.shape[1:])
    rows = sample.view(-1, *[1] * (scores.ndim - 1)).expand_as(scores)
    # The largest score only keeps exp from overflow; the result does not depend on it.
    largest = scores.new_full(shape, -torch.inf).scatter_reduce(0, rows, scores.detach(), "amax")
    shares = (scores - largest.index_select(0, sample)).exp()
    sums = scores.new_zeros(shape).index_add(0, sample, shares)
    return shares / sums.index_select(0, sample)


def _take(branch: Branch, rows: Tensor | slice) -> Branch:
    return Branch(branch.logits[rows], branch.features[rows], tuple(p[rows] for p in branch.prm))
