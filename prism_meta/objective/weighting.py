"""Weights of distillation (E8) and alignment (E9) per modality: by preference (E11) or learned (E12).

Without one of these ``PrismObjective`` has fixed weights. ``weigh`` is a pure function of the batch,
because strategies evaluate an objective several times per step. Only ``observe``, ``end_epoch`` and the
outer optimizer change a weighting.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, torch's own convention

from prism_meta.networks.prediction import ShownPairs

#: One number for all modalities, or one per modality.
Weight = float | Sequence[float]

#: Default weights of E8 and E9.
BETA, DELTA = 0.02, 0.01
#: The smallest factor of a modality in E11.
LOWEST = 0.1


@dataclass(frozen=True)
class PairWeights:
    """The weights of one batch.

    Args:
        beta: (P,), of pixel distillation.
        delta: (P,), of prototype alignment.
        terms: what the objective reports about them, (M,) each and detached.
    """

    beta: Tensor
    delta: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


class Weighting(nn.Module, ABC):
    """Base of the weightings. A new one writes ``weights`` and ``weigh``.

    Args:
        num_modalities: M.
        start: beta and delta that it starts from.
    """

    def __init__(self, num_modalities: int, start: tuple[Weight, Weight] = (BETA, DELTA)) -> None:
        super().__init__()
        self.num_modalities, self.start = num_modalities, start

    @abstractmethod
    def weights(self, beta: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The current weights, (M,) each, given the objective's fixed ones ``beta`` and ``delta``."""

    @abstractmethod
    def weigh(
        self, beta: Tensor, delta: Tensor, pairs: ShownPairs, distance: Callable[[], Tensor]
    ) -> PairWeights:
        """The weights of the pairs of a batch.

        Args:
            beta: (M,), the objective's fixed weights.
            delta: (M,), the objective's fixed weights.
            pairs: the modalities that the samples show.
            distance: computes D of E11, (P,), if it is needed.
        """

    def observe(self, terms: Mapping[str, Tensor]) -> None:
        """Record the terms of one evaluation of the objective."""

    def end_epoch(self) -> None:
        """Update the weights from what was observed since the last epoch."""

    def hyper_parameters(self) -> dict[str, Tensor]:
        """The learned free parameters, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


class RelativePreference(Weighting):
    """E11: modalities that lag behind the fused branch get larger weights.

    D_n^m is the distance between the fused branch and modality m on sample n
    (``losses.prototype_distance``). RP_n^m = 1 - D_n^m / (mean of D_n over the modalities that the sample
    shows) is negative for a modality that is further away than the average.

    - In each sample, omega_n^m = 1[RP_n^m < 0] multiplies delta_m.
    - Over epochs, E^m multiplies beta_m: E <- Proj(E - gamma * mean RP), E_0^m = 1 / (1 - FR^m), with
      Proj onto {E >= 0.1, ||E||_2 = ||E_0||_2}. The mean is over the samples that show m.

    No gradient flows through RP. If a sample shows one modality, its fused branch is that modality's, so
    D = 0. RP is 0 (no preference) whenever D = 0 for the whole sample.

    Args:
        rates: missing rate FR^m of each modality in the training cases, in [0, 1).
        gamma: step size of E.

    Its ``terms`` are ``preference`` (the mean RP of the batch), ``shown`` (the number of samples it is
    over), ``beta`` (beta_m E^m) and ``delta`` (delta_m times the mean omega).

    Raises:
        ValueError: a rate is outside [0, 1), or ``gamma`` is negative.

    Source: PASSION (Shi et al., ACM MM 2024). PRISM's published script differs from E11: it
    has omega = 1[RP > 0] and E + gamma * mean RP, starts from E = 1, and clamps before it rescales,
    which can leave E below the bound.

    Example:
        >>> weighting = RelativePreference((0.0, 0.5), gamma=0.5)
        >>> weighting.factor
        tensor([1., 2.])
        >>> weighting.observe({"preference": torch.tensor([0.4, -0.4]), "shown": torch.tensor([3.0, 3.0])})
        >>> weighting.end_epoch()  # towards the second, at the same length
        >>> weighting.factor
        tensor([0.7642, 2.1014])
    """

    factor: Tensor
    total: Tensor
    shown: Tensor

    def __init__(self, rates: Sequence[float], *, gamma: float = 0.01) -> None:
        if not rates or any(not 0 <= rate < 1 for rate in rates):
            raise ValueError(
                f"rates: got {tuple(rates)}, expected one missing rate in [0, 1) per modality"
            )
        if not gamma >= 0:
            raise ValueError(f"gamma: got {gamma}, expected a number >= 0")
        super().__init__(len(rates))
        first = [1 / (1 - rate) for rate in rates]
        self.gamma, self.radius = gamma, math.hypot(*first)
        self.register_buffer("factor", torch.tensor(first))
        # For the current epoch: sums of RP, and the number of samples they are over.
        self.register_buffer("total", torch.zeros(len(rates)))
        self.register_buffer("shown", torch.zeros(len(rates)))

    def weights(self, beta: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        return beta * self.factor.to(beta), delta

    def weigh(
        self, beta: Tensor, delta: Tensor, pairs: ShownPairs, distance: Callable[[], Tensor]
    ) -> PairWeights:
        beta, delta = self.weights(beta, delta)
        preference = relative_preference(distance().detach(), pairs)
        omega = (preference < 0).to(delta)
        terms = {
            "preference": modality_means(preference, pairs),
            "shown": pairs.mask.sum(0).to(delta),
            "beta": beta,
            "delta": delta * modality_means(omega, pairs),
        }
        return PairWeights(beta[pairs.modality], delta[pairs.modality] * omega, terms)

    @torch.no_grad()
    def observe(self, terms: Mapping[str, Tensor]) -> None:
        shown = terms["shown"].to(self.shown)
        self.total += shown * terms["preference"].to(self.total)
        self.shown += shown

    @torch.no_grad()
    def end_epoch(self) -> None:
        # A modality that no sample shows has no preference.
        mean = torch.where(self.shown > 0, self.total / self.shown, 0.0)
        moved = self.factor - self.gamma * mean
        self.factor.copy_(project_to_sphere(moved, radius=self.radius, lowest=LOWEST))
        self.total.zero_()
        self.shown.zero_()


class LearnedWeights(Weighting):
    """E12: beta and delta learned through the inner step, from the gradient of L_meta.

    beta_m = softplus(free_m), and the same for delta. Only L_train uses them, because L_meta is smallest
    with weights of 0; see ``PrismObjective.meta_objective``. For one SGD step d L_meta / d beta_m =
    -eta_in <grad_phi L_pixel^m(phi), v>, v = grad L_meta(phi~).

    Args:
        num_modalities: M.
        beta: initial weight of pixel distillation, > 0; one number or one per modality.
        delta: initial weight of prototype alignment, > 0; one number or one per modality.

    The free parameters are in ``hyper_parameters()``. Add them to the outer optimizer, as a group without
    weight decay.

    Raises:
        ValueError: a start value is not positive, or their number is wrong.

    Source: E12 is MAML's meta-gradient with respect to the objective's own weights, as in Meta-SGD
    (Li et al., 2017) with respect to rates.

    Example:
        >>> weighting = LearnedWeights(2, beta=0.5, delta=(0.1, 0.2))
        >>> weighting.weights(torch.zeros(2), torch.zeros(2))[1].detach()
        tensor([0.1000, 0.2000])
        >>> sorted(weighting.hyper_parameters())
        ['free_beta', 'free_delta']
    """

    def __init__(self, num_modalities: int, *, beta: Weight = BETA, delta: Weight = DELTA) -> None:
        super().__init__(num_modalities, (beta, delta))
        self.free_beta = nn.Parameter(_free("beta", beta, num_modalities))
        self.free_delta = nn.Parameter(_free("delta", delta, num_modalities))

    def weights(self, beta: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        return F.softplus(self.free_beta).to(beta), F.softplus(self.free_delta).to(delta)

    def weigh(
        self, beta: Tensor, delta: Tensor, pairs: ShownPairs, distance: Callable[[], Tensor]
    ) -> PairWeights:
        beta, delta = self.weights(beta, delta)
        terms = {"beta": beta.detach(), "delta": delta.detach()}
        return PairWeights(beta[pairs.modality], delta[pairs.modality], terms)


def relative_preference(distance: Tensor, pairs: ShownPairs) -> Tensor:
    """RP of E11: 1 - distance / (its mean over the sample), or 0 if that mean is 0.

    Args:
        distance: D, at least 0, (P,).
        pairs: the shown pairs.

    Returns:
        (P,), at most 1. The mean over a sample is 0.

    Source: PASSION (Shi et al., ACM MM 2024).

    Example:
        >>> pairs = ShownPairs.from_mask(torch.tensor([[True, True], [True, False]]))
        >>> relative_preference(torch.tensor([1.0, 0.0, 3.0]), pairs)  # t1 of both samples, then t2
        tensor([ 0.5000,  0.0000, -0.5000])
    """
    counts = pairs.mask.sum(1)
    sums = distance.new_zeros(len(counts)).index_add(0, pairs.sample, distance)
    mean = (sums / counts)[pairs.sample]
    differs = mean > 0
    return torch.where(differs, 1 - distance / torch.where(differs, mean, 1.0), 0.0)


def project_to_sphere(point: Tensor, *, radius: float, lowest: float) -> Tensor:
    """The point of {x >= lowest, ||x||_2 = radius} nearest to ``point``.

    On a sphere the nearest point is the one with the largest inner product. If ``point`` has a positive
    component, it is x = max(lowest, t * point), with t chosen to give the length. Otherwise the inner
    product is a convex function of the squares of x, whose sum is fixed, so its maximum is at a corner:
    all of the remaining length goes to the largest component.

    Args:
        point: (M,).
        radius: at least sqrt(M) * lowest.
        lowest: at least 0.

    Returns:
        (M,).

    Raises:
        ValueError: no such point exists, because radius < sqrt(M) * lowest.

    Example:
        >>> project_to_sphere(torch.tensor([3.0, 4.0, -1.0]), radius=5.0, lowest=0.0)
        tensor([3., 4., 0.])
    """
    size = len(point)
    # Up to rounding, because the radius may be the length of the lowest point itself.
    if not radius >= (1 - 1e-6) * lowest * math.sqrt(size):
        raise ValueError(
            f"radius: got {radius:g}, expected at least {lowest * math.sqrt(size):g}, the length of "
            f"{size} components of {lowest:g}"
        )
    values, order = point.sort(descending=True)
    corner = torch.zeros_like(values)
    corner[0] = 1
    values = torch.where(values[0] > 0, values / values[0], corner)
    # If the k largest are free, their length is what the others, at the bound, leave of the radius.
    places = torch.arange(size, dtype=values.dtype, device=point.device)
    left = radius**2 - (size - 1 - places) * lowest**2
    scale = (left.clamp(min=0) / values.square().cumsum(0)).sqrt()
    # max(lowest, t * values) grows with t, so the components that may be free come first.
    free = (scale * values >= lowest).sum().clamp(min=1)
    nearest = torch.where(places < free, scale[free - 1] * values, lowest)
    return torch.empty_like(nearest).scatter(0, order, nearest)


def modality_means(values: Tensor, pairs: ShownPairs) -> Tensor:
    """(P,) to (M,): the mean over the samples that show a modality, or 0 if none does; detached."""
    shown = pairs.mask.sum(0)
    sums = values.new_zeros(len(shown)).index_add(0, pairs.modality, values.detach())
    return sums / shown.clamp(min=1)


def _free(name: str, start: Weight, count: int) -> Tensor:
    """softplus^-1 of the start values, (M,)."""
    values = list(start) if isinstance(start, Sequence) else [start] * count
    if len(values) != count:
        raise ValueError(
            f"{name}: got {len(values)} weights, expected 1 or {count}, one per modality"
        )
    if any(not value > 0 for value in values):
        raise ValueError(f"{name}: got {start}, expected numbers > 0, because softplus is never 0")
    return torch.tensor([value + math.log(-math.expm1(-value)) for value in values])
