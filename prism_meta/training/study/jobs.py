"""The runs that a study asks for: each is one configuration, with the key of its result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Literal

import torch

from prism_meta.training.build import build_strategy
from prism_meta.training.config import Config
from prism_meta.training.study.results import Results
from prism_meta.training.study.schema import ConditionConfig, MethodConfig, Study

#: Why a run is made: to choose the rates of its method, or to compare it at equal cost.
Stage = Literal["search", "evaluations", "time"]
#: The seeds of searches start here, beyond those of any study.
_SEARCH_SEEDS = 10_000
#: A method whose time per gradient differs from the reference's by less has the same run for both budgets.
_SAME_TIME = 0.05
#: Seeds whose runs say how long a method takes. One is not enough: times of one run vary by a third.
_TIMED_SEEDS = 3
#: Defaults that have changed since studies were committed; keys of results go on with these.
_FORMER = {"meta": {"strategy": "first_order"}, "training": {"ema": 0.0}}


@dataclass(frozen=True)
class Job:
    """One run of a study.

    Args:
        method: name of its method.
        condition: name of its condition.
        stage: why it is made.
        seed: of weights, episodes, and of the modalities that are made missing.
        fold: that is tested; None with phantoms, and in a search, which tests nothing.
        config: its whole configuration.
        point: the values that the search tries, or chose.
        evaluations: gradients of the objective in the whole run, see ``MetaStrategy.evaluations``; one on a
            larger batch than the study's counts more.
    """

    method: str
    condition: str
    stage: Stage
    seed: int
    fold: int | None
    config: Config
    point: Mapping[str, Any]
    evaluations: int

    @property
    def key(self) -> str:
        """Of its result: runs with equal configurations are one.

        Keys at their defaults do not count, so that a key that comes with a new version changes no result,
        nor does a new default.
        """
        values = self.config.model_dump(mode="json", exclude_defaults=True)
        whole = self.config.model_dump(mode="json")
        for section, former in _FORMER.items():
            own = {**values.get(section, {}), **{key: whole[section][key] for key in former}}
            values[section] = {k: v for k, v in own.items() if k not in former or v != former[k]}
        values = {section: own for section, own in values.items() if own != {}}
        text = json.dumps([values, self.stage == "search"], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        """A line for the progress bar."""
        fold = "" if self.fold is None else f" fold {self.fold}"
        return f"{self.method}  {self.condition}  seed {self.seed}{fold}  {self.stage}"


def evaluations_per_step(config: Config, batch_size: int) -> float:
    """Gradients of the objective on ``batch_size`` samples in an outer step."""
    strategy = build_strategy(config.meta, torch.tensor(config.meta.inner_lr), weight_decay=0.0)
    return strategy.evaluations * config.meta.episodes * config.data.batch_size / batch_size


class Plan:
    """Which runs of a study are to be made next.

    A method is searched first. Its runs at equal gradients come next, and with them the time of a gradient
    is known; then come those at equal time.

    Args:
        study: the study.
        results: of the runs that were made.
    """

    def __init__(self, study: Study, results: Results) -> None:
        self.study, self.results = study, results

    def jobs(self) -> list[Job]:
        """All runs whose configuration is known by now, made or not; of equal ones the first."""
        found: dict[str, Job] = {}
        for job in self._jobs():
            found.setdefault(job.key, job)
        return list(found.values())

    def due(self) -> list[Job]:
        """The runs that are known by now and not made."""
        return [job for job in self.jobs() if job.key not in self.results]

    def compared(self) -> list[Job]:
        """The runs whose scores are compared, as far as they are known, seed by seed.

        A study that ends early then has all methods for the seeds that it has. One run may stand for both
        budgets.
        """
        found = [job for pair in self._pairs() for job in self._compared(*pair)]
        return sorted(found, key=lambda job: (job.seed, job.stage))

    def _jobs(self) -> Iterator[Job]:
        for pair in self._pairs():
            yield from self._search(*pair)
        yield from self.compared()

    def _pairs(self) -> list[tuple[MethodConfig, ConditionConfig]]:
        return [(m, c) for c in self.study.conditions for m in self.study.methods]

    def _search(self, method: MethodConfig, condition: ConditionConfig) -> Iterator[Job]:
        search = self.study.search
        for point in self.study.grid(method):
            for seed in range(_SEARCH_SEEDS, _SEARCH_SEEDS + search.seeds):
                yield self._job(method, condition, "search", point, seed=seed)

    def score(
        self, method: MethodConfig, condition: ConditionConfig, point: Mapping[str, Any]
    ) -> float | None:
        """The mean validation Dice of a point of the search; None while a run of it is missing."""
        jobs = [job for job in self._search(method, condition) if job.point == point]
        if any(job.key not in self.results for job in jobs):
            return None
        return fmean(self.results[job.key].validation for job in jobs)

    def chosen(self, method: MethodConfig, condition: ConditionConfig) -> dict[str, Any] | None:
        """The point of the search with the highest validation Dice; None while runs of it are missing."""
        grid = self.study.grid(method)
        if not grid:
            return {}
        scores = [self.score(method, condition, point) for point in grid]
        known = [score for score in scores if score is not None]
        return None if len(known) < len(grid) else grid[known.index(max(known))]

    def _compared(self, method: MethodConfig, condition: ConditionConfig) -> Iterator[Job]:
        equal = self._equal(method, condition, range(self.study.seeds))
        yield from equal
        if not equal or not self.study.equal_time or method.name == self.study.first.name:
            return
        factor = self.time_factor(method, condition)
        if factor is None:
            return
        for job in equal:
            steps = job.config.training.steps
            if abs(factor - 1) >= _SAME_TIME:
                steps = max(1, round(steps / factor))
            at: Any = {"seed": job.seed, "fold": job.fold, "steps": steps}
            yield self._job(method, condition, "time", job.point, **at)

    def time_factor(self, method: MethodConfig, condition: ConditionConfig) -> float | None:
        """How many times as long as the reference the method trains for equal gradients.

        It is the median over the pairs of runs of the first three seeds, and stays what it is when others
        follow. None while one of them is missing.
        """
        seeds = range(min(_TIMED_SEEDS, self.study.seeds))
        pairs = [self._equal(each, condition, seeds) for each in (method, self.study.first)]
        keys = [[job.key for job in jobs] for jobs in pairs]
        if not all(keys) or any(key not in self.results for side in keys for key in side):
            return None
        own, base = ([self.results[key].seconds for key in side] for side in keys)
        return median(a / max(b, 1e-9) for a, b in zip(own, base, strict=True))

    def _equal(
        self, method: MethodConfig, condition: ConditionConfig, seeds: Sequence[int]
    ) -> list[Job]:
        """The runs at equal gradients; none while the method is searched."""
        point = self.chosen(method, condition)
        if point is None:
            return []
        folds: Sequence[int | None] = range(self.study.folds) if self.study.folds else (None,)
        return [
            self._job(method, condition, "evaluations", point, seed=seed, fold=fold)
            for seed in seeds
            for fold in folds
        ]

    def _per_step(self, config: Config) -> float:
        return evaluations_per_step(config, self.study.batch_size)

    def _job(
        self,
        method: MethodConfig,
        condition: ConditionConfig,
        stage: Stage,
        point: Mapping[str, Any],
        *,
        seed: int,
        fold: int | None = None,
        steps: int | None = None,
    ) -> Job:
        config = self._config(
            method, condition, point, seed=seed, fold=fold, steps=steps, search=stage == "search"
        )
        count = round(config.training.steps * self._per_step(config))
        return Job(method.name, condition.name, stage, seed, fold, config, point, count)

    def _config(
        self,
        method: MethodConfig,
        condition: ConditionConfig,
        point: Mapping[str, Any],
        *,
        seed: int,
        fold: int | None = None,
        steps: int | None = None,
        search: bool = False,
    ) -> Config:
        study = self.study
        evaluations = (search and study.search.evaluations) or study.evaluations
        base = study.config(method, condition, point)
        steps = steps or max(1, int(evaluations / self._per_step(base)))
        data: dict[str, Any] = {}
        if study.phantoms is not None:
            first, count = study.phantoms.train, study.phantoms.test
            data["test_cases"] = [f"case_{i:03d}" for i in range(first, first + count)]
        else:
            data |= {"folds": study.folds, "fold": fold or 0}
        keys: dict[str, Any] = {"seed": seed, "training": {"steps": steps}, "data": data}
        if search:
            keys["validation"] = {
                "cases": study.search.validation,
                "every": max(base.validation.every, steps),
            }
        return study.config(method, condition, point, **keys)
