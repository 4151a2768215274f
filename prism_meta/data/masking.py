"""Which modalities exist (availability) and which of them a model is shown (mask).

A policy maps availability, bool (N, M), and a generator to a mask, bool (N, M), that never leaves
the availability and never leaves a row empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Generator, Tensor


def draw_availability(n: int, rates: Sequence[float], *, seed: int = 0) -> Tensor:
    """Draw which modalities exist for ``n`` cases, so that each missing rate is met to one case.

    Modality m is missing in exactly round(n * rates[m]) cases wherever that leaves every case at
    least one modality.

    Args:
        n: number of cases.
        rates: missing rate FR^m of each modality, in [0, 1).
        seed: of the draw.

    Returns:
        bool (n, M), no row empty.

    Raises:
        ValueError: a rate is outside [0, 1), or the rates leave fewer files than cases.

    Source: the imbalanced missing rates of PASSION (Shi et al., ACM MM 2024).

    Example:
        >>> draw_availability(10, (0.2, 0.4, 0.6, 0.8)).sum(0).tolist()
        [8, 6, 4, 2]
    """
    if n < 1 or not rates or any(not 0 <= rate < 1 for rate in rates):
        raise ValueError(
            f"draw_availability: got n={n}, rates={tuple(rates)}; use n >= 1 and rates in [0, 1)"
        )
    present = [n - round(n * rate) for rate in rates]
    if sum(present) < n:
        raise ValueError(
            f"rates: {tuple(rates)} leave {sum(present)} files for {n} cases, "
            "so some case would have no modality; use lower rates"
        )
    generator = torch.Generator().manual_seed(seed)
    available = torch.stack(
        [torch.randperm(n, generator=generator) < count for count in present], 1
    )
    # An empty case takes a modality from a case that has several, which keeps every count. There is
    # always one: the files are at least as many as the cases.
    for row in (~available.any(1)).nonzero().flatten().tolist():
        donors = (available & (available.sum(1, keepdim=True) > 1)).nonzero()
        donor, modality = donors[
            int(torch.randint(len(donors), (1,), generator=generator))
        ].tolist()
        available[donor, modality], available[row, modality] = False, True
    return available


class MaskPolicy(Protocol):
    """What the model is shown of each case."""

    def __call__(self, availability: Tensor, generator: Generator | None = None) -> Tensor:
        """Draw a mask, bool (N, M), within ``availability``, bool (N, M)."""

    def eligible(self, availability: Tensor) -> Tensor:
        """The cases this policy may be given, bool (N,)."""


class _AnyCase:
    """A policy that takes every case."""

    def eligible(self, availability: Tensor) -> Tensor:
        return availability.any(1)


class StaticMask(_AnyCase):
    """Everything the case has, each time ("utd"): the missing modalities are fixed per case.

    Example:
        >>> StaticMask()(torch.tensor([[True, False]]))
        tensor([[ True, False]])
    """

    def __call__(self, availability: Tensor, generator: Generator | None = None) -> Tensor:
        return availability.clone()


class FullMask(StaticMask):
    """Complete cases only, all their modalities shown.

    Source: the published Meta-Drop's meta batch. It overfits when few cases are complete.

    Example:
        >>> FullMask().eligible(torch.tensor([[True, False], [True, True]]))
        tensor([False,  True])
    """

    def eligible(self, availability: Tensor) -> Tensor:
        return availability.all(1)


class DynamicMask(_AnyCase):
    """A new subset per draw ("utd_drop"), uniform over the non-empty subsets of what the case has.

    Source: Meta-Drop; PASSION (Shi et al., ACM MM 2024).

    Example:
        >>> mask = DynamicMask()(torch.ones(8, 4).bool(), torch.Generator().manual_seed(0))
        >>> bool(mask.any(1).all())
        True
    """

    def __call__(self, availability: Tensor, generator: Generator | None = None) -> Tensor:
        # A subset of k modalities is a number in 1 .. 2^k - 1; bit r is the r-th that is available.
        choices = 2.0 ** availability.sum(1, dtype=torch.float64) - 1
        uniform = torch.rand(len(availability), generator=generator, dtype=torch.float64)
        code = 1 + (uniform.to(choices.device) * choices).long()
        rank = availability.cumsum(1) - 1
        return availability & ((code[:, None] >> rank.clamp(min=0)) & 1).bool()


class SingleModalityMask(_AnyCase):
    """One modality per draw, uniform over what the case has.

    Example:
        >>> SingleModalityMask()(torch.ones(8, 4).bool()).sum(1).tolist()
        [1, 1, 1, 1, 1, 1, 1, 1]
    """

    def __call__(self, availability: Tensor, generator: Generator | None = None) -> Tensor:
        return _one_hot(availability.double(), generator)


class BalancedMask(_AnyCase):
    """Drops frequent modalities more often, which evens out how often each is shown.

    Modality m of a case that has it is kept with probability min_j (1 - FR^j) / (1 - FR^m); a row
    left empty keeps one modality, drawn with weight 1 / (1 - FR^m). Exactly equal shares would need
    cases without any shown modality where the rarest one is missing.

    Args:
        rates: missing rate FR^m of each modality in the training cases, in [0, 1).

    Raises:
        ValueError: a rate is outside [0, 1).

    Example:
        >>> BalancedMask((0.0, 0.5))(torch.ones(1, 2).bool()).shape
        torch.Size([1, 2])
    """

    def __init__(self, rates: Sequence[float]) -> None:
        if not rates or any(not 0 <= rate < 1 for rate in rates):
            raise ValueError(
                f"rates: got {tuple(rates)}, expected one missing rate in [0, 1) per modality"
            )
        frequency = 1 - torch.tensor(tuple(rates), dtype=torch.float64)
        self.keep = frequency.min() / frequency

    def __call__(self, availability: Tensor, generator: Generator | None = None) -> Tensor:
        keep = self.keep.to(availability.device)
        if availability.shape[1:] != keep.shape:
            raise ValueError(
                f"availability: got {availability.shape[1]} modalities, expected {len(keep)} as in rates"
            )
        uniform = torch.rand(availability.shape, generator=generator, dtype=torch.float64)
        mask = availability & (uniform.to(keep.device) < keep)
        one = _one_hot(availability * keep, generator)
        return torch.where(mask.any(1, keepdim=True), mask, one)


def _one_hot(weights: Tensor, generator: Generator | None) -> Tensor:
    """One column per row, drawn with ``weights`` (N, M)."""
    chosen = torch.multinomial(weights.cpu(), 1, generator=generator).to(weights.device)
    return torch.zeros_like(weights, dtype=torch.bool).scatter_(1, chosen, True)
