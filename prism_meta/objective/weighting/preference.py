"""Weights by relative preference (E11)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from prism_meta.networks.prediction import ShownPairs
from prism_meta.objective.weighting.base import PairWeights, Weighting, modality_means

#: Lower bound of E, the factor of beta.
LOWEST = 0.1


class RelativePreference(Weighting):
    r"""Weights from each modality's relative preference (E11): lagging modalities get larger weights.

    .. math::
        RP_n^m &= 1 - D_n^m / \mathrm{mean}_{m'} D_n^{m'}, \qquad \omega_n^m = 1[RP_n^m < 0] \\
        E^m &\leftarrow \mathrm{Proj}(E^m - \gamma\, \mathrm{mean}_n RP_n^m), \qquad
            E_0^m = 1 / (1 - FR^m)

    D_n^m is the distance of sample n's modality m from the fused branch
    (``losses.prototype_distance``). RP_n^m is negative if that modality is further away than the average
    of the modalities that the sample shows. omega multiplies delta_m in each sample. E multiplies beta_m
    and changes once per epoch; its mean is over the samples that show m. Proj is the projection onto
    {E >= 0.1, ||E||_2 = ||E_0||_2}. No gradient flows through RP.

    A sample that shows one modality has D = 0, because its fused output is that modality's output. If
    all D of a sample are 0, its RP is 0.

    Args:
        rates: missing rate FR^m of each modality in the training cases, in [0, 1).
        gamma: step size of E per epoch. Defaults to 0.01.

    It adds four terms: ``preference`` (mean RP of the batch), ``shown`` (number of samples in that
    mean), ``beta`` (beta_m E^m) and ``delta`` (delta_m times the mean omega).

    Raises:
        ValueError: a rate is outside [0, 1), or ``gamma`` is negative.

    Source: PASSION (Shi et al., ACM MM 2024). PRISM's published script differs from E11: it uses
    omega = 1[RP > 0] and E + gamma * mean RP, starts at E = 1, and clamps E before it rescales it,
    which can leave E below the bound.

    Example:
        >>> weighting = RelativePreference((0.0, 0.5), gamma=0.5)
        >>> weighting.factor
        tensor([1., 2.])
        >>> weighting.observe({"preference": torch.tensor([0.4, -0.4]), "shown": torch.tensor([3.0, 3.0])})
        >>> weighting.end_epoch()  # the second gains, the length stays
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
        # Sums of RP in the current epoch, and the number of samples in them.
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
        # The preference is 0 for a modality that no sample showed.
        mean = torch.where(self.shown > 0, self.total / self.shown, 0.0)
        moved = self.factor - self.gamma * mean
        self.factor.copy_(project_to_sphere(moved, radius=self.radius, lowest=LOWEST))
        self.total.zero_()
        self.shown.zero_()


def relative_preference(distance: Tensor, pairs: ShownPairs) -> Tensor:
    """RP of E11: 1 - distance / (mean distance of the sample); 0 if that mean is 0.

    Args:
        distance: (P,), D of E11, at least 0.
        pairs: the shown pairs.

    Returns:
        (P,), at most 1; the mean over a sample is 0.

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
    """Project ``point`` onto {x : x >= lowest, ||x||_2 = radius}.

    On a sphere, the nearest point has the largest inner product with ``point``. If ``point`` has a
    positive component, that is x = max(lowest, t * point), with t chosen to give the radius. Otherwise
    the inner product is a convex function of the squares of x, whose maximum is at a corner: the largest
    component takes all the length that the others, at ``lowest``, leave.

    Args:
        point: (M,).
        radius: at least sqrt(M) * lowest.
        lowest: at least 0.

    Returns:
        (M,).

    Raises:
        ValueError: no such point exists: radius < sqrt(M) * lowest.

    Example:
        >>> project_to_sphere(torch.tensor([3.0, 4.0, -1.0]), radius=5.0, lowest=0.0)
        tensor([3., 4., 0.])
    """
    size = len(point)
    # The tolerance allows for rounding if the radius is exactly sqrt(M) * lowest.
    if not radius >= (1 - 1e-6) * lowest * math.sqrt(size):
        raise ValueError(
            f"radius: got {radius:g}, expected at least {lowest * math.sqrt(size):g}, the length of "
            f"{size} components of {lowest:g}"
        )
    values, order = point.sort(descending=True)
    corner = torch.zeros_like(values)
    corner[0] = 1
    values = torch.where(values[0] > 0, values / values[0], corner)
    # scale[k]: t if the k + 1 largest components are free and the others are at the bound.
    places = torch.arange(size, dtype=values.dtype, device=point.device)
    left = radius**2 - (size - 1 - places) * lowest**2
    scale = (left.clamp(min=0) / values.square().cumsum(0)).sqrt()
    # max(lowest, t * values) grows with t, so the free components are the largest ones.
    free = (scale * values >= lowest).sum().clamp(min=1)
    nearest = torch.where(places < free, scale[free - 1] * values, lowest)
    return torch.empty_like(nearest).scatter(0, order, nearest)
