"""Drawing patches: what all kinds of episodes share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from prism_meta.data.augmentation import Augmentation
from prism_meta.data.cache import CachedCase
from prism_meta.data.centres import PatchCentres
from prism_meta.errors import ConfigError, Fault, raise_faults
from prism_meta.modalities import Batch
from prism_meta.step_batches import StepBatches

#: Default share of patches that are centred on a foreground class.
DEFAULT_FOREGROUND = 0.5
#: Target of padding until the batch is complete. It is no class, and augmentation moves it with the rest.
_PADDING = -1


class Drawn(NamedTuple):
    """The cases of a batch and what is shown of them.

    Args:
        rows: (B,) long, indices of the cases.
        mask: bool (B, M).
    """

    rows: Tensor
    mask: Tensor


class DrawnEpisodes(Dataset[tuple[Any, Batch]], ABC):
    """Base of the kinds of episodes. A kind chooses cases and masks; this class draws the patches.

    All random numbers of episode t depend only on (seed, rank, t), so a resumed run sees the same
    episodes, with any number of worker processes.

    Args:
        cases: cached cases of at least two patients.
        patch: patch size in voxels: two numbers for slices, three for volumes. A smaller volume is
            padded with zeros at both ends, and ``Batch.valid`` excludes the padding.
        batch_size: number of patches B in each batch.
        steps: number of episodes.
        inner_steps: number K of train batches per episode. D_train is a ``Batch`` for K = 1, and
            otherwise ``StepBatches``, one batch for each inner step.
        foreground: share of patches that are centred on a foreground class. The others are centred
            on any brain voxel.
        augmentation: applied to every patch; None for none.
        seed: random seed of the episodes.
        rank: index of this process. Each process draws different episodes.

    Raises:
        ConfigError: the cases come from fewer than two patients.
    """

    def __init__(
        self,
        cases: Sequence[CachedCase],
        *,
        patch: Sequence[int],
        batch_size: int,
        steps: int,
        inner_steps: int,
        foreground: float,
        augmentation: Augmentation | None,
        seed: int,
        rank: int,
    ) -> None:
        self.cases = list(cases)
        self.size = tuple(patch) if len(patch) == 3 else (*patch, 1)
        self.squeeze = len(patch) == 2
        self.batch_size, self.steps, self.inner_steps = batch_size, steps, inner_steps
        self.foreground, self.augmentation = foreground, augmentation
        self.seed, self.rank = seed, rank
        raise_faults(ConfigError, self._faults())
        self.availability = torch.stack([case.availability for case in self.cases])
        self.meta_availability = torch.stack([case.meta_availability for case in self.cases])
        numbers = {case.patient: k for k, case in enumerate(self.cases)}
        #: (N,) long, equal for the cases of one patient.
        self.patients = torch.tensor([numbers[case.patient] for case in self.cases])
        self._centres: dict[str, PatchCentres] = {}

    def _faults(self) -> list[Fault]:
        if len({case.patient for case in self.cases}) >= 2:
            return []
        found = f"{len(self.cases)} training case{'' if len(self.cases) == 1 else 's'}"
        who, need = (
            ("", "different cases")
            if len(self.cases) < 2
            else (" of one patient", "different patients")
        )
        message = (
            f"{found}{who}: an episode needs at least 2, because its train and meta batch come from "
            f"{need}; add cases or hold fewer out"
        )
        return [Fault(message, "holdout")]

    @abstractmethod
    def draw(self, generator: Generator, step: int) -> tuple[list[Drawn], Drawn]:
        """Choose the K train batches and the meta batch of one episode.

        Args:
            generator: source of the random numbers, which depend on the episode.
            step: index t of the episode.

        Raises:
            ConfigError: there is no such episode.
        """

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Any, Batch]:
        entropy = self._entropy(step)
        random = np.random.RandomState(entropy.generate_state(2)[1])
        changes = np.random.RandomState(random.randint(2**31)) if self.augmentation else None
        train, meta = self._drawn(entropy, step)
        batches = [self._batch(drawn, random, changes) for drawn in (*train, meta)]
        last = batches.pop()
        return (batches[0] if len(batches) == 1 else StepBatches(batches)), last

    def masks(self, step: int) -> list[Tensor]:
        """The masks of episode t, bool (B, M): one per train batch, and that of the meta batch.

        No patch is read.
        """
        train, meta = self._drawn(self._entropy(step), step)
        return [drawn.mask for drawn in (*train, meta)]

    def _entropy(self, step: int) -> np.random.SeedSequence:
        return np.random.SeedSequence((self.seed, self.rank, step))

    def _drawn(self, entropy: np.random.SeedSequence, step: int) -> tuple[list[Drawn], Drawn]:
        return self.draw(Generator().manual_seed(int(entropy.generate_state(1)[0])), step)

    def _batch(
        self,
        drawn: Drawn,
        random: np.random.RandomState,
        changes: np.random.RandomState | None,
    ) -> Batch:
        cases = [self.cases[i] for i in drawn.rows.tolist()]
        pairs = [self._patch(c, shown, random) for c, shown in zip(cases, drawn.mask, strict=True)]
        image, target = (torch.stack(maps) for maps in zip(*pairs, strict=True))
        if self.augmentation is not None and changes is not None:
            image, target = self.augmentation(image, target, changes)
        padding = target == _PADDING
        padded = bool(padding.any())
        return Batch(
            image,
            drawn.mask,
            target.masked_fill(padding, 0) if padded else target,
            tuple(c.id for c in cases),
            ~padding if padded else None,
        )

    def _patch(
        self, case: CachedCase, shown: Tensor, random: np.random.RandomState
    ) -> tuple[Tensor, Tensor]:
        if case.id not in self._centres:
            pools = [pool.numpy() for pool in case.centres()]
            self._centres[case.id] = PatchCentres(pools, case.shape, foreground=self.foreground)
        size = [min(p, s) for p, s in zip(self.size, case.shape, strict=True)]
        corner = self._centres[case.id].corner(size, random)
        image, target = case.patch(corner, size, shown=shown)
        image, target = _padded(image, self.size, 0), _padded(target, self.size, _PADDING)
        return (image[..., 0], target[..., 0]) if self.squeeze else (image, target)


def _padded(maps: Tensor, size: Sequence[int], value: int) -> Tensor:
    """Pad the last axes to ``size`` at both ends, as MONAI's sliding window does in prediction."""
    ends: list[int] = []
    for wanted, there in zip(reversed(size), reversed(maps.shape), strict=False):
        ends += [(wanted - there) // 2, (wanted - there + 1) // 2]
    return pad(maps, ends, value=value) if any(ends) else maps
