"""Task episodes: support and query come from one site and show one static subset."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from prism_meta.data.augmentation import Augmentation
from prism_meta.data.cache import CachedCase
from prism_meta.data.drawing import DEFAULT_FOREGROUND, Drawn, DrawnEpisodes
from prism_meta.errors import ConfigError, Fault
from prism_meta.modalities import subsets


class TaskEpisodes(DrawnEpisodes):
    """Episodes that are tasks: adapt to a few cases of a site, and be good on other patients there.

    An episode draws a site, then a subset for which that site has enough patients, then the patients. The
    support set D_train has patches of n cases, one per patient; the query set D_meta has patches of the
    cases of all other patients of the site that have the subset. All samples show that one subset. With K
    inner steps, each has a batch of its own from the same n cases.

    If no case names its site, each patient is a site: support comes from n of them, and the query from
    the others, all with the same subset.

    Args:
        cases: cached cases of at least two patients; all of them name their site, or none does.
        patch: see ``Episodes``.
        batch_size: number of patches B in each batch.
        steps: number of episodes.
        support: number n of support cases. Defaults to 1.
        inner_steps: number K of train batches per episode. Defaults to 1.
        foreground: see ``Episodes``.
        augmentation: applied to every patch. Defaults to None.
        seed: random seed of the episodes.
        rank: index of this process. Each process draws different episodes.

    Raises:
        ConfigError: no site has n + 1 patients with a common modality, or only some cases name their site.

    Source: MAML, Finn et al., ICML 2017 (its tasks).
    """

    def __init__(
        self,
        cases: Sequence[CachedCase],
        *,
        patch: Sequence[int],
        batch_size: int,
        steps: int,
        support: int = 1,
        inner_steps: int = 1,
        foreground: float = DEFAULT_FOREGROUND,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        rank: int = 0,
    ) -> None:
        super().__init__(
            cases,
            patch=patch,
            batch_size=batch_size,
            steps=steps,
            inner_steps=inner_steps,
            foreground=foreground,
            augmentation=augmentation,
            seed=seed,
            rank=rank,
        )
        self.support = support
        self.subsets = subsets(self.availability.shape[1])
        self._tasks = self._find_tasks()

    def draw(self, generator: Generator, step: int) -> tuple[list[Drawn], Drawn]:
        (site,) = torch.randint(len(self._tasks), (1,), generator=generator).tolist()
        tasks = list(self._tasks.values())[site]
        (task,) = torch.randint(len(tasks), (1,), generator=generator).tolist()
        subset, pool = tasks[task]
        pool = pool[torch.randperm(len(pool), generator=generator)]
        patients = list(dict.fromkeys(self.patients[pool].tolist()))[: self.support]
        # One case per patient: the first in random order.
        support = torch.stack([pool[self.patients[pool] == patient][0] for patient in patients])
        query = pool[~torch.isin(self.patients[pool], torch.tensor(patients))]
        size = self.batch_size
        train = [self._showing(subset, support, k * size) for k in range(self.inner_steps)]
        return train, self._showing(subset, query, 0)

    def _showing(self, subset: Tensor, pool: Tensor, start: int) -> Drawn:
        """A batch of the cases in ``pool``, in turn."""
        turns = torch.arange(start, start + self.batch_size) % len(pool)
        return Drawn(pool[turns], subset.expand(self.batch_size, -1).clone())

    def _find_tasks(self) -> dict[str | None, list[tuple[Tensor, Tensor]]]:
        """Site -> its subsets with enough patients, and the cases that have each.

        Raises:
            ConfigError: there are none.
        """
        unnamed = [case.id for case in self.cases if case.site is None]
        if 0 < len(unnamed) < len(self.cases):
            some = ", ".join(unnamed[:5]) + (", ..." if len(unnamed) > 5 else "")
            raise ConfigError(
                f"site: {len(unnamed)} of {len(self.cases)} cases name no site ({some}), and task episodes "
                "need all or none; complete the column site of the manifest, or leave it out"
            )
        tasks: dict[str | None, list[tuple[Tensor, Tensor]]] = {}
        most = 0
        for site in dict.fromkeys(case.site for case in self.cases):
            here = torch.tensor([case.site == site for case in self.cases])
            for subset in self.subsets:
                pool = (here & ~(subset & ~self.availability).any(1)).nonzero().flatten()
                patients = len(self.patients[pool].unique())
                most = max(most, patients)
                if patients > self.support:
                    tasks.setdefault(site, []).append((subset, pool))
        if not tasks:
            message = (
                f"no task can be drawn: {self.support} support cases need {self.support + 1} patients of "
                f"one site with the same modality, but there are at most {most}; use fewer support cases"
            )
            raise ConfigError([Fault(message, "support")])
        return tasks
