"""The table of a study: a row per method under each condition and budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from prism_meta.report.study.scores import MethodScores, ScoredRun
from prism_meta.report.study.statistics import (
    Averages,
    Difference,
    averages,
    difference,
    holm,
    seeds_needed,
)


@dataclass(frozen=True)
class Power:
    """The smallest difference of mean Dice that matters, and how surely it should be found."""

    effect: float = 0.02
    level: float = 0.05
    power: float = 0.8


@dataclass(frozen=True)
class Row:
    """One method under one condition and budget.

    Args:
        method: its name.
        scores: its scores.
        averages: of them.
        against: paired differences to the reference of the same condition; None for the reference.
        steps: outer steps of a run.
        evaluations: gradients of a run.
        time: of a run's training, relative to the reference; NaN if one of them is unknown.
        memory: bytes of an outer step.
        needed: seeds that ``Power`` asks for; None if it is unknown or beyond reach.
    """

    method: str
    scores: MethodScores
    averages: Averages
    against: Difference | None
    steps: int
    evaluations: int
    time: float
    memory: int
    needed: int | None


@dataclass(frozen=True)
class Comparisons:
    """The rows of one condition and budget, that of the reference first."""

    condition: str
    budget: str
    rows: tuple[Row, ...]


def study_table(
    runs: Sequence[ScoredRun], *, reference: str, base: str, power: Power | None = None
) -> list[Comparisons]:
    """Compare all methods with the reference.

    Args:
        runs: all runs with scores.
        reference: name of the method to compare with.
        base: the budget in which the reference was run; other budgets are compared with the same runs.
        power: what the numbers of needed seeds are for. Defaults to ``Power()``.

    Returns:
        One table per condition and budget, in the order of the runs. Methods without a whole seed, and
        conditions without the reference, are left out.

    Example:
        >>> scores = {"p1": {"t1": 0.5, "t2": 0.25}}
        >>> better = {"p1": {"t1": 0.75, "t2": 0.5}}
        >>> runs = [ScoredRun("one", "all", "gradients", 0, scores),
        ...         ScoredRun("two", "all", "gradients", 0, better)]
        >>> [found] = study_table(runs, reference="one", base="gradients")
        >>> found.rows[1].against.averages.mean.mean, found.rows[1].averages.worst.mean
        (0.25, 0.5)
    """
    power = power or Power()
    grouped: dict[tuple[str, str], dict[str, list[ScoredRun]]] = {}
    for run in runs:
        grouped.setdefault((run.condition, run.budget), {}).setdefault(run.method, []).append(run)
    found = []
    for (condition, budget), methods in grouped.items():
        first = grouped.get((condition, base), {}).get(reference, [])
        if not first or not (whole := MethodScores.of(first)).seeds:
            continue
        others = {name: made for name, made in methods.items() if name != reference}
        rows = [_row(reference, first, whole, first, None, power)]
        for name, made in others.items():
            scores = MethodScores.of(made)
            if scores.seeds:
                rows.append(_row(name, made, scores, first, whole, power))
        found.append(Comparisons(condition, budget, _corrected(rows)))
    return found


def _row(
    method: str,
    runs: Sequence[ScoredRun],
    scores: MethodScores,
    first: Sequence[ScoredRun],
    reference: MethodScores | None,
    power: Power,
) -> Row:
    against = None if reference is None else difference(scores, reference)
    seconds, base = (median(run.seconds for run in each) for each in (runs, first))
    return Row(
        method,
        scores,
        averages(scores),
        against,
        steps=runs[0].steps,
        evaluations=runs[0].evaluations,
        time=seconds / base if base > 0 else float("nan"),
        memory=runs[0].memory,
        needed=None
        if against is None
        else seeds_needed(against.deviation, power.effect, level=power.level, power=power.power),
    )


def _corrected(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The rows with p-values corrected for the number of comparisons."""
    values = holm([float("nan") if row.against is None else row.against.p for row in rows])
    return tuple(
        row if row.against is None else replace(row, against=replace(row.against, corrected=p))
        for row, p in zip(rows, values, strict=True)
    )
