"""Mask policies that look at whole subsets: hard ones more often, or one of them per batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Generator, Tensor

from prism_meta.data.masking import AnyCase, MaskPolicy
from prism_meta.modalities import subsets


@runtime_checkable
class ChoosesCases(MaskPolicy, Protocol):
    """A mask policy that also chooses the cases of its batches, e.g. ``OneSubsetMask``."""

    def walk(
        self, availability: Tensor, start: int, count: int, *, seed: Sequence[int] = (0,)
    ) -> Tensor:
        """The subsets of some batches of a training, which depend only on the arguments.

        Args:
            availability: bool (N, M) of all cases; no row is empty.
            start: index of the first batch, counted from the beginning of the training.
            count: number of batches.
            seed: numbers >= 0 that tell one walk from another.

        Returns:
            bool (count, M).
        """

    def batches(
        self,
        availability: Tensor,
        batch_size: int,
        shown: Tensor,
        generator: Generator | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Draw the batches that show these subsets.

        Args:
            availability: bool (N, M) of the cases to choose from; no row is empty.
            batch_size: number B of samples in a batch.
            shown: the subset of each batch, bool (count, M).
            generator: source of the random numbers. Defaults to torch's global generator.

        Returns:
            For each batch, indices of cases (B,) and their mask, bool (B, M).
        """


@runtime_checkable
class FollowsLosses(MaskPolicy, Protocol):
    """A mask policy that depends on the losses of the training so far, e.g. ``HardMask``."""

    def observe(self, mask: Tensor, losses: Tensor) -> None:
        """Add the losses (B,) of samples that were shown ``mask``, bool (B, M), in this order."""

    def state_dict(self) -> dict[str, Tensor]:
        """All that the next masks depend on."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore ``state_dict``."""


class OneSubsetMask(AnyCase):
    """Gives each batch one subset, which all its cases have.

    The subsets that some case has come in a random order, one per batch, and in a new order once all have
    come. The walk goes on from one episode to the next. With as many inner steps as there are subsets, an
    episode sees each of them once, as Reptile over all subsets needs it; with one inner step, so many
    consecutive episodes do.

    Called with the cases of one batch, it shows all of them one subset, drawn uniformly from those that
    all of them have.

    Raises:
        ValueError: a call gets cases that have no modality in common.

    Example:
        >>> available = torch.tensor([[True, False], [True, True]])
        >>> shown = OneSubsetMask().walk(available, 0, 3)
        >>> len(shown.unique(dim=0))
        3
        >>> batches = OneSubsetMask().batches(available, 2, shown)
        >>> [len(mask.unique(dim=0)) for _, mask in batches]
        [1, 1, 1]
    """

    def __call__(self, availability: Tensor, generator: Generator | None = None) -> Tensor:
        if not len(availability):
            return availability.clone()
        candidates = held(subsets(availability.shape[1]), availability.all(0, keepdim=True))
        shown = candidates.any(1).nonzero().flatten()
        if not len(shown):
            raise ValueError(
                "availability: the cases have no modality in common; choose them with batches()"
            )
        chosen = shown[torch.randint(len(shown), (1,), generator=generator)]
        mask = subsets(availability.shape[1])[chosen.cpu()].to(availability.device)
        return mask.expand(availability.shape).clone()

    def walk(
        self, availability: Tensor, start: int, count: int, *, seed: Sequence[int] = (0,)
    ) -> Tensor:
        every = subsets(availability.shape[1])
        there = held(every, availability).any(1).nonzero().flatten()
        size = len(there)
        orders: dict[int, Tensor] = {}
        for cycle in range(start // size, (start + count - 1) // size + 1):
            entropy = np.random.SeedSequence(tuple(seed), spawn_key=(cycle,)).generate_state(1)
            order = torch.randperm(size, generator=Generator().manual_seed(int(entropy[0])))
            orders[cycle] = there[order]
        chosen = [orders[k // size][k % size] for k in range(start, start + count)]
        return every[torch.stack(chosen)]

    def batches(
        self,
        availability: Tensor,
        batch_size: int,
        shown: Tensor,
        generator: Generator | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Draw the batches; a subset that no case has is replaced by one drawn from those that some has."""
        found = []
        for subset in shown:
            if not held(subset[None], availability).any():
                every = subsets(availability.shape[1])
                there = every[held(every, availability).any(1)]
                subset = there[torch.randint(len(there), (1,), generator=generator)][0]  # noqa: PLW2901
            pool = held(subset[None], availability)[0].nonzero().flatten()
            pool = pool[torch.randperm(len(pool), generator=generator)]
            rows = pool.repeat(-(-batch_size // len(pool)))[:batch_size]
            found.append((rows, subset.expand(batch_size, -1).clone()))
        return found


class HardMask(AnyCase):
    """Draws a subset in proportion to (its running loss)^power, so that hard subsets come more often.

    Of the subsets that a case has, s is drawn with probability L_s^p / sum_r L_r^p. L_s is an exponential
    moving average of the losses that ``observe`` was told for s, one sample after another:
    L_s <- decay L_s + (1 - decay) loss, starting at the first one. A subset without any loss so far
    counts like the mean of the others. Without any loss, all are equally likely, as with ``DynamicMask``.

    Args:
        num_modalities: M.
        power: p, at least 0. Defaults to 4.
        decay: of the average, in [0, 1). Defaults to 0.9.

    Raises:
        ValueError: a number is out of range. Calls raise it if the number of modalities differs.

    Example:
        >>> policy = HardMask(2)
        >>> policy.observe(torch.tensor([[True, False], [True, True]]), torch.tensor([1.0, 0.5]))
        >>> drawn = policy.probabilities(torch.ones(1, 2).bool())  # losses 1, 0.75 and 0.5
        >>> [round(p, 3) for p in drawn[0].tolist()]
        [0.725, 0.229, 0.045]
    """

    def __init__(self, num_modalities: int, *, power: float = 4.0, decay: float = 0.9) -> None:
        if not power >= 0:
            raise ValueError(f"power: got {power}, expected a number >= 0")
        if not 0 <= decay < 1:
            raise ValueError(f"decay: got {decay}, expected a number in [0, 1)")
        self.subsets = subsets(num_modalities)
        self.power, self.decay = power, decay
        #: Running loss of each subset; NaN where there is none.
        self.losses = torch.full((len(self.subsets),), torch.nan, dtype=torch.float64)

    def __call__(self, availability: Tensor, generator: Generator | None = None) -> Tensor:
        if not len(availability):
            return availability.clone()
        weights = self.probabilities(availability)
        chosen = torch.multinomial(weights, 1, generator=generator).flatten()
        return self.subsets[chosen].to(availability.device)

    def probabilities(self, availability: Tensor) -> Tensor:
        """The probability of each subset for cases (N, M): (N, 2^M - 1), in the order of ``subsets``."""
        self._check(availability, "availability")
        known = ~self.losses.isnan()
        losses = torch.where(known, self.losses, self.losses.nanmean() if known.any() else 1.0)
        # Relative to the largest, so that no power overflows; 0 would never be drawn again.
        relative = (losses / losses.max().clamp(min=1e-12)).clamp(min=1e-3) ** self.power
        weights = held(self.subsets, availability.cpu()).T * relative
        return weights / weights.sum(1, keepdim=True)

    def observe(self, mask: Tensor, losses: Tensor) -> None:
        """Add the losses (B,) of samples that were shown ``mask``, bool (B, M), in this order."""
        self._check(mask, "mask")
        index = (mask.cpu()[:, None] == self.subsets).all(2).long().argmax(1)
        for k, loss in zip(index.tolist(), losses.tolist(), strict=True):
            before = self.losses[k]
            new = loss if before.isnan() else self.decay * before + (1 - self.decay) * loss
            self.losses[k] = new

    def state_dict(self) -> dict[str, Tensor]:
        """The running losses."""
        return {"losses": self.losses.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore ``state_dict``."""
        losses = state["losses"]
        if losses.shape != self.losses.shape:
            raise ValueError(
                f"losses: got those of {len(losses)} subsets, expected {len(self.losses)}"
            )
        self.losses = losses.to("cpu", torch.float64, copy=True)

    def _check(self, rows: Tensor, name: str) -> None:
        if rows.ndim != 2 or rows.shape[1] != self.subsets.shape[1]:
            raise ValueError(
                f"{name}: got shape {tuple(rows.shape)}, expected (N, {self.subsets.shape[1]})"
            )


def held(every: Tensor, availability: Tensor) -> Tensor:
    """Which case (N, M) has all modalities of which subset (S, M): bool (S, N)."""
    return ~(every[:, None] & ~availability.cpu()).any(2)
