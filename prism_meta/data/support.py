"""Batches of a few labelled cases that all show one subset: what a model is adapted on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from prism_meta.data.augmentation import Augmentation
from prism_meta.data.cache import CachedCase
from prism_meta.data.drawing import DEFAULT_FOREGROUND, Drawn, DrawnEpisodes
from prism_meta.errors import Fault
from prism_meta.modalities import subset_name


class SupportEpisodes(DrawnEpisodes):
    """Episodes of one level: item t is a train batch of the support cases, all showing one subset.

    The cases come in a new random order in each batch, and every case is drawn before one is drawn again.
    No cases are left for a meta batch, so it is the first patch of the train batch once more, drawn anew;
    ``SingleLevel`` only measures it.

    Args:
        cases: cached cases, at least one, which have all modalities of ``subset``.
        subset: bool (M,), what the model is shown. Other modalities are not read.
        patch: see ``Episodes``.
        batch_size: number of patches B in each train batch.
        steps: number of episodes.
        foreground: see ``Episodes``.
        augmentation: applied to every patch. Defaults to None.
        seed: random seed of the batches.

    Raises:
        ConfigError: there is no case, or a case lacks a modality of the subset (all faults together).

    Source: the support set of MAML, Finn et al., ICML 2017.
    """

    def __init__(
        self,
        cases: Sequence[CachedCase],
        subset: Tensor,
        *,
        patch: Sequence[int],
        batch_size: int,
        steps: int,
        foreground: float = DEFAULT_FOREGROUND,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.subset = subset
        super().__init__(
            cases,
            patch=patch,
            batch_size=batch_size,
            steps=steps,
            inner_steps=1,
            foreground=foreground,
            augmentation=augmentation,
            seed=seed,
            rank=0,
        )

    def draw(self, generator: Generator, step: int) -> tuple[list[Drawn], Drawn]:
        order = torch.randperm(len(self.cases), generator=generator)
        rows = order[torch.arange(self.batch_size) % len(order)]
        mask = self.subset.expand(self.batch_size, -1).clone()
        return [Drawn(rows, mask)], Drawn(rows[:1], mask[:1])

    def _faults(self) -> list[Fault]:
        if not self.cases:
            return [Fault("cases: got none, expected at least one labelled case; add cases")]
        faults = []
        for case in self.cases:
            lacks = self.subset & ~case.availability
            if lacks.any():
                numbers = [str(m) for m in range(len(lacks))]
                faults.append(
                    Fault(
                        f"case {case.id}: has no modality {subset_name(lacks, numbers)} of the subset, "
                        "counted from 0; leave it out of the subset, or leave the case out",
                        "subset",
                    )
                )
        return faults
