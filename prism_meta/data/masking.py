"""Mask policies: which of the available modalities the model is shown.

A policy maps an availability, bool (N, M), to a mask, bool (N, M). The mask is a subset of the
availability, and every row of it shows at least one modality.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Generator, Tensor


class MaskPolicy(Protocol):
    """Chooses which of the available modalities the model is shown.

    ``StaticMask``, ``FullMask``, ``DynamicMask``, ``SingleModalityMask``, ``BalancedMask``, ``HardMask``,
    ``GroupDROMask`` and ``OneSubsetMask`` are policies. A class with these two methods is one, too.
    """

    def __call__(self, availability: Tensor, generator: Generator | None = None) -> Tensor:
        """Draw a mask.

        Args:
            availability: bool (N, M), the modalities that each case has; no row is empty.
            generator: source of the random numbers. Defaults to torch's global generator.

        Returns:
            bool (N, M), a subset of ``availability``; no row is empty.
        """

    def eligible(self, availability: Tensor) -> Tensor:
        """Which cases the policy accepts: bool (N,)."""


class AnyCase:
    """Base of the policies that accept every case with at least one modality."""

    def eligible(self, availability: Tensor) -> Tensor:
        """Which cases the policy accepts, from ``availability`` (N, M): bool (N,)."""
        return availability.any(1)


class StaticMask(AnyCase):
    """Shows all modalities that a case has ("utd"). The missing ones are the same in every draw.

    Example:
        >>> StaticMask()(torch.tensor([[True, False]]))
        tensor([[ True, False]])
    """

    def __call__(self, availability: Tensor, generator: Generator | None = None) -> Tensor:
        return availability.clone()


class FullMask(StaticMask):
    """Accepts only complete cases and shows all their modalities.

    The published Meta-Drop draws its meta batch this way. It overfits if few cases are complete.

    Source: Meta-Drop of PRISM.

    Example:
        >>> FullMask().eligible(torch.tensor([[True, False], [True, True]]))
        tensor([False,  True])
    """

    def eligible(self, availability: Tensor) -> Tensor:
        return availability.all(1)


class DynamicMask(AnyCase):
    """Draws a new subset each time ("utd_drop"), uniformly from the non-empty available subsets.

    A case with k modalities has 2^k - 1 non-empty subsets, each with the same probability.

    Source: Meta-Drop; PASSION (Shi et al., ACM MM 2024).

    Example:
        >>> mask = DynamicMask()(torch.ones(8, 4).bool(), torch.Generator().manual_seed(0))
        >>> bool(mask.any(1).all())
        True
    """

    def __call__(self, availability: Tensor, generator: Generator | None = None) -> Tensor:
        # A subset of k modalities is a number in 1 .. 2^k - 1. Bit r stands for the r-th available one.
        choices = 2.0 ** availability.sum(1, dtype=torch.float64) - 1
        uniform = torch.rand(len(availability), generator=generator, dtype=torch.float64)
        code = 1 + (uniform.to(choices.device) * choices).long()
        rank = availability.cumsum(1) - 1
        return availability & ((code[:, None] >> rank.clamp(min=0)) & 1).bool()


class SingleModalityMask(AnyCase):
    """Shows one modality per draw, uniformly from those that the case has.

    Example:
        >>> SingleModalityMask()(torch.ones(8, 4).bool()).sum(1).tolist()
        [1, 1, 1, 1, 1, 1, 1, 1]
    """

    def __call__(self, availability: Tensor, generator: Generator | None = None) -> Tensor:
        return _one_hot(availability.double(), generator)


class BalancedMask(AnyCase):
    """Hides frequent modalities more often, so that all are shown about equally often.

    An available modality m is kept with probability min_j (1 - FR^j) / (1 - FR^m). If none is kept,
    one of the available modalities is drawn with weights 1 / (1 - FR^m). The frequencies are not
    exactly equal, because a case without the rarest modality must still show another one.

    Args:
        rates: missing rate FR^m of each modality in the training cases, in [0, 1).

    Raises:
        ValueError: a rate is outside [0, 1). Calls raise it if the number of modalities differs.

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
                f"availability: got {availability.shape[1]} modalities, expected {len(keep)}, "
                "one per rate"
            )
        uniform = torch.rand(availability.shape, generator=generator, dtype=torch.float64)
        mask = availability & (uniform.to(keep.device) < keep)
        one = _one_hot(availability * keep, generator)
        return torch.where(mask.any(1, keepdim=True), mask, one)


def _one_hot(weights: Tensor, generator: Generator | None) -> Tensor:
    """One True per row of a bool (N, M), drawn with ``weights`` (N, M)."""
    chosen = torch.multinomial(weights.cpu(), 1, generator=generator).to(weights.device)
    return torch.zeros_like(weights, dtype=torch.bool).scatter_(1, chosen, True)
