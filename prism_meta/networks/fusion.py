"""Fusion: from the features of any number of modalities to one map, at one scale.

Every fusion takes the mean and the variance of the shown modalities' features under weights that sum
to 1 over them, and mixes the two; the classes differ in where the weights come from. What is not shown
is not there: features are packed, one row per shown (sample, modality) pair.
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
    """Which packed rows are fused with each other.

    Args:
        sample: (P,) long, the group of each row.
        modality: (P,) long, its modality.
        size: number of groups G; each has at least one row.

    Example:
        >>> groups = Groups(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 2)
        >>> groups.total(torch.tensor([1.0, 2.0, 3.0]))
        tensor([3., 3.])
    """

    sample: Tensor
    modality: Tensor
    size: int

    def total(self, values: Tensor) -> Tensor:
        """Sum over the rows of each group, (P, ...) to (G, ...)."""
        return values.new_zeros(self.size, *values.shape[1:]).index_add(0, self.sample, values)

    def spread(self, values: Tensor) -> Tensor:
        """Each row its group's value, (G, ...) to (P, ...)."""
        return values.index_select(0, self.sample)

    def softmax(self, scores: Tensor) -> Tensor:
        """Softmax over the rows of each group, (P, ...) to (P, ...)."""
        shape = (self.size, *scores.shape[1:])
        rows = self.sample.view(-1, *[1] * (scores.ndim - 1)).expand_as(scores)
        # The largest score only keeps exp from overflow; the result does not depend on it.
        largest = scores.new_full(shape, -torch.inf).scatter_reduce(
            0, rows, scores.detach(), "amax"
        )
        shares = (scores - self.spread(largest)).exp()
        return shares / self.spread(self.total(shares))


class Fusion(nn.Module, metaclass=ABCMeta):  # with the base ABC, higher could not patch it
    """Base of the fusions: a new one writes ``weights`` alone.

    Args:
        channels: C of the features.
        num_modalities: M.
        num_classes: K, that of the prm maps which may guide the weights.
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
            groups: of the P rows.
            regions: (G, K, *s) probabilities of the classes, see ``forward``.

        Returns:
            (P, C, *s), or a shape that expands to it.
        """

    def forward(self, features: Tensor, groups: Groups, regions: Tensor) -> Tensor:
        """Fuse the rows of each group.

        Args:
            features: (P, C, *s).
            groups: of the P rows.
            regions: (G, K, *s) probabilities of the classes from the next coarser prm map; 1/K each at
                the coarsest scale.

        Returns:
            (G, C, *s).
        """
        weights = self.weights(features, groups, regions)
        mean = groups.total(weights * features)
        deviation = (features - groups.spread(mean)).square()
        mixed: Tensor = self.mix(torch.cat((mean, groups.total(weights * deviation)), 1))
        return mixed

    def alone(self, features: Tensor) -> Tensor:
        """The same for groups of one row, whose weight is 1 and whose variance is 0: (P, C, *s)."""
        linear = F.conv3d if features.ndim == 5 else F.conv2d
        return linear(features, self.mix.weight[:, : features.shape[1]], self.mix.bias)


class MeanFusion(Fusion):
    """Equal weights: the mean and the variance of the shown modalities.

    Use it as the baseline, or where modalities are many and alike.

    Source: HeMIS (Havaei et al., MICCAI 2016).

    Example:
        >>> fuse = MeanFusion(8, num_modalities=4, num_classes=4, spatial_dims=2)
        >>> groups = Groups(torch.tensor([0, 0, 1]), torch.arange(3), 2)
        >>> fuse(torch.randn(3, 8, 4, 4), groups, torch.full((2, 4, 4, 4), 1 / 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def weights(self, features: Tensor, groups: Groups, regions: Tensor) -> Tensor:
        counts = groups.total(features.new_ones(len(features)))
        return groups.spread(1 / counts).view(-1, *[1] * (features.ndim - 1))


class RegionAwareFusion(Fusion):
    """Weights by voxel and by region: a modality counts where it shows something.

    The score of modality m in a voxel v is a linear map of its features there, plus, over the classes
    k of the next coarser prm map, sum_k p_k(v) (W_k d_k^m + b_k^m): d_k^m is the mean of m's features
    over region k, b_k^m what m is worth there in general. The softmax of the scores over the shown
    modalities gives the weights. W and b start at 0. The maps are detached: they guide, and are
    taught by E7 alone.

    Source: RFNet's region-aware fusion (Ding et al., ICCV 2021), which has a sigmoid in place of the
    softmax and no score by voxel.

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
        # A bias would cancel in the softmax, and Adam would follow the rounding of its gradient.
        self.score = pointwise(channels, channels, spatial_dims, bias=False)
        self.by_region = nn.Parameter(torch.zeros(num_classes, channels, channels))
        self.by_modality = nn.Parameter(torch.zeros(num_modalities, num_classes, channels))

    def weights(self, features: Tensor, groups: Groups, regions: Tensor) -> Tensor:
        maps = groups.spread(regions.to(features.dtype)).flatten(2)
        sums = torch.einsum("pkv,pcv->pkc", maps, features.flatten(2))
        means = sums / (maps.sum(2, keepdim=True) + 1e-6)  # a region may be empty
        worth = torch.einsum("pkc,kco->pko", means, self.by_region)
        worth = worth + self.by_modality[groups.modality]
        by_region = torch.einsum("pkv,pkc->pcv", maps, worth).view_as(features)
        return groups.softmax(self.score(features) + by_region)


class AttentionFusion(Fusion):
    """Attention over modality tokens: in each voxel a token per shown modality.

    A token is the modality's features plus a learned embedding of the modality. In each of the heads
    the query is made from the mean over the tokens, a key from each token, and the weight is softmax
    over the shown modalities of <query, key> / sqrt(channels of a head).

    Args:
        heads: groups of channels with weights of their own; as many of it as divide ``channels``.

    Source: mmFormer's inter-modal correlations (Zhang et al., MICCAI 2022), here within a voxel, so
    that the cost grows with the volume and not with its square.

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
        # A bias would add the same to every modality's score, which cancels in the softmax.
        self.key = pointwise(channels, channels, spatial_dims, bias=False)

    def weights(self, features: Tensor, groups: Groups, regions: Tensor) -> Tensor:
        embedding = self.embedding[groups.modality]
        tokens = features + embedding.view(*embedding.shape, *[1] * (features.ndim - 2))
        counts = groups.total(tokens.new_ones(len(tokens)))
        mean = groups.total(tokens) / counts.view(-1, *[1] * (features.ndim - 1))
        query = groups.spread(self.query(mean)).unflatten(1, (self.heads, -1))
        products = (query * self.key(tokens).unflatten(1, (self.heads, -1))).sum(2)
        scores = products / (features.shape[1] // self.heads) ** 0.5
        return groups.softmax(scores).repeat_interleave(features.shape[1] // self.heads, 1)
