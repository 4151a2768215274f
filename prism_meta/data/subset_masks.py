"""One subset per batch: a mask policy that also chooses the cases."""

from __future__ import annotations

from collections.abc import Sequence
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
        """The subsets of batches ``start`` to ``start + count - 1``: each cycle has every subset once.

        Args:
            availability: bool (N, M) of all cases; subsets that no case has are left out.
            start: index of the first batch, counted from the beginning of the training.
            count: number of batches.
            seed: numbers >= 0 that tell one walk from another.

        Returns:
            bool (count, M).
        """
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
        """Draw the batches; a subset that no case has is replaced by one drawn from those that some has.

        Args:
            availability: bool (N, M) of the cases to choose from; no row is empty.
            batch_size: number B of samples in a batch.
            shown: the subset of each batch, bool (count, M).
            generator: source of the draws. Defaults to torch's global one.

        Returns:
            For each batch the indices of its cases (B,) and its mask, bool (B, M).
        """
        found = []
        for subset in shown:
            if not held(subset[None], availability).any():
                every = subsets(availability.shape[1])
                there = every[held(every, availability).any(1)]
                subset = there[torch.randint(len(there), (1,), generator=generator)][0]
            pool = held(subset[None], availability)[0].nonzero().flatten()
            pool = pool[torch.randperm(len(pool), generator=generator)]
            rows = pool.repeat(-(-batch_size // len(pool)))[:batch_size]
            found.append((rows, subset.expand(batch_size, -1).clone()))
        return found


def held(every: Tensor, availability: Tensor) -> Tensor:
    """Which case (N, M) has all modalities of which subset (S, M): bool (S, N)."""
    return ~(every[:, None] & ~availability.cpu()).any(2)
