"""Fusion of the features of any number of modalities into one feature map, at one scale.

Every fusion computes the weighted mean and variance of the shown modalities' features and mixes the
two by a linear map. The weights sum to 1 over the shown modalities; the classes differ in how they
compute them. Features are packed, one row per shown sample-modality pair. Prm maps are coarse-scale
outputs of the fused decoder.
"""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, torch's own convention

from prism_meta.networks.blocks import pointwise


@dataclass(frozen=True)
class Groups:
    """Assigns packed rows to groups; the rows of one group are fused.

    Args:
        sample: (P,) long, the group of each row.
        modality: (P,) long, the modality of each row.
        size: number of groups G; each has at least one row.

    Example:
        >>> groups = Groups(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 2)
        >>> groups.sum(torch.tensor([1.0, 2.0, 3.0]))
        tensor([3., 3.])
    """

    sample: Tensor
    modality: Tensor
    size: int

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the rows of each group, (P, ...) to (G, ...)."""
        return values.new_zeros(self.size, *values.shape[1:]).index_add(0, self.sample, values)

    def broadcast(self, values: Tensor) -> Tensor:
        """Copy each group's value to its rows, (G, ...) to (P, ...)."""
        return values.index_select(0, self.sample)

    def softmax(self, scores: Tensor) -> Tensor:
        """Softmax over the rows of each group, (P, ...) to (P, ...)."""
        shape = (self.size, *scores.shape[1:])
        rows = self.sample.view(-1, *[1] * (scores.ndim - 1)).expand_as(scores)
        # Subtracting the largest score keeps exp from overflowing; it does not change the result.
        largest = scores.new_full(shape, -torch.inf).scatter_reduce(
            0, rows, scores.detach(), "amax"
        )
        shares = (scores - self.broadcast(largest)).exp()
        return shares / self.broadcast(self.sum(shares))


class Fusion(nn.Module, metaclass=ABCMeta):  # higher cannot patch a class that has ABC as a base
    """Base class of fusions. A subclass implements only ``weights``.

    Args:
        channels: C of the features.
        num_modalities: M.
        num_classes: K of the prm maps, which may guide the weights.
        spatial_dims: 2 or 3.
    """

    def __init__(
        self, channels: int, *, num_modalities: int, num_classes: int, spatial_dims: int
    ) -> None:
        super().__init__()
        self.mix = pointwise(2 * channels, channels, spatial_dims)

    @abstractmethod
    def weights(self, features: Tensor, groups: Groups, regions: Tensor) -> Tensor:
        """Weights that sum to 1 over the rows of each group.

        Args:
            features: (P, C, *s).
            groups: the groups of the P rows.
            regions: (G, K, *s) class probabilities, see ``forward``.

        Returns:
            (P, C, *s), or a shape that expands to it.
        """

    def forward(self, features: Tensor, groups: Groups, regions: Tensor) -> Tensor:
        """Fuse the rows of each group.

        Args:
            features: (P, C, *s).
            groups: the groups of the P rows.
            regions: (G, K, *s) class probabilities from the next coarser prm map; 1/K at the
                coarsest scale.

        Returns:
            (G, C, *s).
        """
        weights = self.weights(features, groups, regions)
        mean = groups.sum(weights * features)
        deviation = (features - groups.broadcast(mean)).square()
        mixed: Tensor = self.mix(torch.cat((mean, groups.sum(weights * deviation)), 1))
        return mixed

    def fuse_single(self, features: Tensor) -> Tensor:
        """Same as ``forward`` for ``features`` (P, C, *s) in groups of one row, but cheaper: (P, C, *s)."""
        linear = F.conv3d if features.ndim == 5 else F.conv2d
        return linear(features, self.mix.weight[:, : features.shape[1]], self.mix.bias)


class MeanFusion(Fusion):
    """Equal weights: the mean and the variance of the shown modalities.

    Use it as a baseline, or for many similar modalities.

    Source: HeMIS (Havaei et al., MICCAI 2016).

    Example:
        >>> fuse = MeanFusion(8, num_modalities=4, num_classes=4, spatial_dims=2)
        >>> groups = Groups(torch.tensor([0, 0, 1]), torch.arange(3), 2)
        >>> fuse(torch.randn(3, 8, 4, 4), groups, torch.full((2, 4, 4, 4), 1 / 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def weights(self, features: Tensor, groups: Groups, regions: Tensor) -> Tensor:
        counts = groups.sum(features.new_ones(features.shape[0]))
        return groups.broadcast(1 / counts).view(-1, *[1] * (features.ndim - 1))


class RegionAwareFusion(Fusion):
    """Weights per voxel and per region: a modality counts more where it is informative.

    The score of modality m in a voxel v is a linear map of its features there, plus, over the classes
    k of the next coarser prm map, sum_k p_k(v) (W_k d_k^m + b_k^m). Here d_k^m is the mean of m's
    features over region k, and b_k^m is a learned constant. The weights are the softmax of the scores
    over the shown modalities. W and b start at 0. The prm maps are detached: they guide the fusion, and
    only E7 trains them.

    Source: RFNet's region-aware fusion (Ding et al., ICCV 2021), which uses a sigmoid instead of
    the softmax and has no score per voxel.

    Example:
        >>> fuse = RegionAwareFusion(8, num_modalities=4, num_classes=3, spatial_dims=2)
        >>> groups = Groups(torch.tensor([0, 0, 1]), torch.arange(3), 2)
        >>> fuse(torch.randn(3, 8, 4, 4), groups, torch.full((2, 3, 4, 4), 1 / 3)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self, channels: int, *, num_modalities: int, num_classes: int, spatial_dims: int
    ) -> None:
        super().__init__(
            channels,
            num_modalities=num_modalities,
            num_classes=num_classes,
            spatial_dims=spatial_dims,
        )
        # A bias would cancel in the softmax, and Adam would amplify the rounding error of its gradient.
        self.score = pointwise(channels, channels, spatial_dims, bias=False)
        self.by_region = nn.Parameter(torch.zeros(num_classes, channels, channels))
        self.by_modality = nn.Parameter(torch.zeros(num_modalities, num_classes, channels))

    def weights(self, features: Tensor, groups: Groups, regions: Tensor) -> Tensor:
        maps = groups.broadcast(regions.to(features.dtype)).flatten(2)
        sums = torch.einsum("pkv,pcv->pkc", maps, features.flatten(2))
        means = sums / (maps.sum(2, keepdim=True) + 1e-6)  # a region may be empty
        worth = torch.einsum("pkc,kco->pko", means, self.by_region)
        worth = worth + self.by_modality[groups.modality]
        by_region = torch.einsum("pkv,pkc->pcv", maps, worth).view_as(features)
        return groups.softmax(self.score(features) + by_region)


class AttentionFusion(Fusion):
    """Attention over modality tokens; each voxel has one token per shown modality.

    A token is the modality's features plus a learned embedding of the modality. In each head, the query
    is a linear map of the mean token and each key a linear map of a token. The weights are the softmax
    of <query, key> / sqrt(channels of a head) over the shown modalities.

    Args:
        heads: number of attention heads, reduced to the largest number that divides ``channels``.
            Defaults to 4.

    Source: mmFormer's inter-modal correlations (Zhang et al., MICCAI 2022), here within each voxel,
    so the cost is linear in the volume instead of quadratic.

    Example:
        >>> fuse = AttentionFusion(8, num_modalities=4, num_classes=4, spatial_dims=2)
        >>> groups = Groups(torch.tensor([0, 0, 1]), torch.arange(3), 2)
        >>> fuse(torch.randn(3, 8, 4, 4), groups, torch.full((2, 4, 4, 4), 1 / 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self,
        channels: int,
        *,
        num_modalities: int,
        num_classes: int,
        spatial_dims: int,
        heads: int = 4,
    ) -> None:
        super().__init__(
            channels,
            num_modalities=num_modalities,
            num_classes=num_classes,
            spatial_dims=spatial_dims,
        )
        self.heads = next(h for h in range(heads, 0, -1) if channels % h == 0)
        self.embedding = nn.Parameter(0.02 * torch.randn(num_modalities, channels))
        self.query = pointwise(channels, channels, spatial_dims)
        # A bias would add the same to every modality's score and cancel in the softmax.
        self.key = pointwise(channels, channels, spatial_dims, bias=False)

    def weights(self, features: Tensor, groups: Groups, regions: Tensor) -> Tensor:
        embedding = self.embedding[groups.modality]
        tokens = features + embedding.view(*embedding.shape, *[1] * (features.ndim - 2))
        counts = groups.sum(tokens.new_ones(tokens.shape[0]))
        mean = groups.sum(tokens) / counts.view(-1, *[1] * (features.ndim - 1))
        query = groups.broadcast(self.query(mean)).unflatten(1, (self.heads, -1))
        products = (query * self.key(tokens).unflatten(1, (self.heads, -1))).sum(2)
        scores = products / (features.shape[1] // self.heads) ** 0.5
        return groups.softmax(scores).repeat_interleave(features.shape[1] // self.heads, 1)
