"""Losses for L_meta only: what the outer level asks for, and the inner one does not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from prism_meta.modalities import Batch, subset_index

if TYPE_CHECKING:
    from prism_meta.objective.prism import Loss, PrismObjective


class MetaLoss(Protocol):
    """A loss that replaces an objective in L_meta, see ``PrismObjective``."""

    def __call__(
        self, objective: PrismObjective, forward: Callable[..., Any], batch: Batch
    ) -> Loss:
        """L_meta from the objective that L_train has, without learned weights."""


class SoftWorst:
    """The soft worst over subsets: L_fuse is averaged by log-sum-exp over the subsets instead of the samples.

        L_meta = L - mean_b L_fuse,b + tau log(1 / S sum_s exp(L_fuse^s / tau)),

    where s runs over the S subsets that the batch shows and L_fuse^s is the mean over its samples. A low
    temperature tau gives the worst subset, a high one the mean over subsets. Only L_fuse is changed, because
    the other terms grow with the number of modalities that a subset has.

    Args:
        temperature: tau, in units of the loss, > 0. Defaults to 0.1.

    Raises:
        ValueError: ``temperature`` is not positive.

    Source: the worst group of group DRO, Sagawa et al., ICLR 2020, smoothed as by tilted losses, Li et al.,
    ICLR 2021.

    Example:
        >>> losses, mask = torch.tensor([1.0, 3.0]), torch.tensor([[True, False], [False, True]])
        >>> [round(float(SoftWorst(tau).of(losses, mask)), 2) for tau in (0.01, 100.0)]
        [2.99, 2.0]
    """

    def __init__(self, temperature: float = 0.1) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature: got {temperature}, expected a number > 0")
        self.temperature = temperature

    def __call__(
        self, objective: PrismObjective, forward: Callable[..., Any], batch: Batch
    ) -> Loss:
        value = objective(forward, batch)
        worst = self.of(value.samples, batch.mask)
        loss = value.loss - value.samples.mean() + worst
        return value.changed(loss, soft_worst=worst)

    def of(self, losses: Tensor, mask: Tensor) -> Tensor:
        """The soft worst of the losses (B,) of samples that are shown ``mask``, bool (B, M)."""
        index = subset_index(mask)
        count = losses.new_zeros(2 ** mask.shape[1] - 1).index_add(
            0, index, torch.ones_like(losses)
        )
        sums = torch.zeros_like(count).index_add(0, index, losses)
        shown = count > 0
        scaled = (sums / count.clamp(min=1) / self.temperature).masked_fill(~shown, -math.inf)
        return self.temperature * (scaled.logsumexp(0) - shown.to(losses).sum().log())


class Ranking:
    """A penalty where more modalities are worse than fewer.

        L_meta = L + weight * mean_b max(0, L_fuse,b(S_b) - L_fuse,b(S_b without one modality)),

    over the samples that show several modalities. The b-th sample leaves out its (b mod k)-th of k. The
    loss of the smaller set is a constant, so it cannot be made worse to please the ranking. This costs a
    forward pass without a gradient.

    Args:
        weight: of the penalty, > 0. Defaults to 1.

    Raises:
        ValueError: ``weight`` is not positive.

    Source: Ma et al., ICML 2023, who rank the confidence of a classifier that way.

    Example:
        >>> from prism_meta.networks.prism import PrismNet
        >>> from prism_meta.objective.prism import PrismObjective
        >>> net = PrismNet(num_modalities=2, num_classes=3, spatial_dims=2, width=4)
        >>> batch = Batch(torch.randn(1, 2, 16, 16), torch.ones(1, 2).bool(), torch.zeros(1, 16, 16).long())
        >>> objective = PrismObjective(meta_loss=Ranking()).meta_objective
        >>> sorted(objective(net, batch).terms)
        ['fuse', 'pixel', 'prm', 'proto', 'ranking', 'uni']
    """

    def __init__(self, weight: float = 1.0) -> None:
        if not weight > 0:
            raise ValueError(f"weight: got {weight}, expected a number > 0")
        self.weight = weight

    def __call__(
        self, objective: PrismObjective, forward: Callable[..., Any], batch: Batch
    ) -> Loss:
        value = objective(forward, batch)
        larger = (batch.mask.sum(1) > 1).nonzero().flatten()
        if not len(larger):
            return value.changed(value.loss, ranking=torch.zeros_like(value.loss))
        fewer = Batch(
            batch.image[larger],
            one_less(batch.mask)[larger],
            batch.target[larger],
            valid=None if batch.valid is None else batch.valid[larger],
        )
        with torch.no_grad():
            smaller = objective.fused_losses(forward, fewer)
        penalty = (value.samples[larger] - smaller).clamp(min=0).mean()
        return value.changed(value.loss + self.weight * penalty, ranking=penalty)


def one_less(mask: Tensor) -> Tensor:
    """The mask, bool (B, M), without the (b mod k)-th of the k modalities of sample b.

    Example:
        >>> one_less(torch.ones(3, 2).bool()).int().tolist()
        [[0, 1], [1, 0], [0, 1]]
    """
    order = mask.cumsum(1) - 1
    dropped = torch.arange(len(mask), device=mask.device) % mask.sum(1).clamp(min=1)
    return mask & (order != dropped[:, None])
