"""The scores of a study's methods as arrays over seeds, cases and subsets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from prism_meta.errors import PrismError


@dataclass(frozen=True)
class ScoredRun:
    """One run of a study, as the report sees it.

    Args:
        method: name of its method.
        condition: name of its condition.
        budget: what is equal between the methods that it is compared with, e.g. ``equal gradients``.
        seed: its seed.
        scores: test case -> subset -> Dice in [0, 1].
        steps: outer steps.
        evaluations: gradients of the objective.
        seconds: of training.
        memory: bytes of an outer step.
        curves: name -> [step, value] over training.
    """

    method: str
    condition: str
    budget: str
    seed: int
    scores: Mapping[str, Mapping[str, float]]
    steps: int = 0
    evaluations: int = 0
    seconds: float = float("nan")
    memory: int = 0
    curves: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodScores:
    """Dice of one method under one condition and budget.

    Args:
        seeds: the n seeds whose runs test all cases, in order.
        cases: names of the C cases, in order.
        subsets: names of the S subsets.
        dice: (n, C, S), in [0, 1].
    """

    seeds: tuple[int, ...]
    cases: tuple[str, ...]
    subsets: tuple[str, ...]
    dice: NDArray[np.float64]

    @classmethod
    def of(cls, runs: Sequence[ScoredRun]) -> MethodScores:
        """The scores of the runs of one method; those of the folds of a seed are put together.

        A seed of which a fold is missing is left out, because its cases are not all tested.

        Raises:
            PrismError: there is no run, or a case was tested from other subsets than another one.

        Example:
            >>> scores = {"p1": {"t1": 0.5}}
            >>> runs = [ScoredRun("a", "all", "equal gradients", seed, scores) for seed in (1, 0)]
            >>> found = MethodScores.of(runs)
            >>> found.seeds, found.dice.shape
            ((0, 1), (2, 1, 1))
        """
        if not runs:
            raise PrismError(
                "runs: got none, expected at least one; make the runs of the study first"
            )
        by_seed: dict[int, dict[str, Mapping[str, float]]] = {}
        for run in runs:
            by_seed.setdefault(run.seed, {}).update(run.scores)
        cases = tuple(sorted({case for found in by_seed.values() for case in found}))
        whole = {seed: found for seed, found in sorted(by_seed.items()) if len(found) == len(cases)}
        subsets = tuple(next(iter(runs[0].scores.values()), {}))
        for seed, found in whole.items():
            for case in cases:
                if set(found[case]) != set(subsets):
                    raise PrismError(
                        f"{runs[0].method}, seed {seed}: case {case} was tested from other subsets than "
                        f"case {cases[0]}; use cases with the same modalities"
                    )
        dice = np.array(
            [[[found[c][s] for s in subsets] for c in cases] for found in whole.values()]
        )
        return cls(tuple(whole), cases, subsets, dice.reshape(len(whole), len(cases), len(subsets)))

    def at(self, seeds: Sequence[int]) -> MethodScores:
        """The scores of some of the seeds."""
        rows = [self.seeds.index(seed) for seed in seeds]
        return MethodScores(tuple(seeds), self.cases, self.subsets, self.dice[rows])
