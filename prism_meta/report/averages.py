"""Averages of records: per cell, per subset, per region, and over all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from prism_meta.empty_masks import EMPTY_POLICIES, rescored
from prism_meta.errors import PrismError
from prism_meta.records import Record, index_records, nan_to_none


@dataclass(frozen=True)
class Cell:
    """Averages of one group of records.

    Args:
        dice: mean Dice in [0, 1]; NaN when no value is defined.
        hd95: mean HD95 in mm; NaN when no value is defined.
        cases: number of cases in the group.
        undefined: number of records whose Dice or HD95 is NaN. The NaN is left out of its mean.
    """

    dice: float
    hd95: float
    cases: int
    undefined: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The four numbers, NaN as None."""
        return {
            "dice": nan_to_none(self.dice),
            "hd95_mm": nan_to_none(self.hd95),
            "cases": self.cases,
            "undefined": self.undefined,
        }


@dataclass(frozen=True)
class Summary:
    """Averages of a set of records. ``summarize`` creates it.

    Args:
        cells: per (subset, region), the mean over cases.
        by_subset: per subset, the mean over its cells.
        by_region: per region, the mean over its cells.
        overall: the mean over all cells.
        worst: the subset with the lowest mean Dice.
        full: the subset of all modalities that occur in the subsets; None if it was not measured.
    """

    cells: dict[tuple[str, str], Cell]
    by_subset: dict[str, Cell]
    by_region: dict[str, Cell]
    overall: Cell
    worst: str
    full: str | None

    @property
    def subsets(self) -> tuple[str, ...]:
        """Names of the subsets, in order."""
        return tuple(self.by_subset)

    @property
    def regions(self) -> tuple[str, ...]:
        """Names of the regions, in order."""
        return tuple(self.by_region)

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON values; NaN is None, Dice is in [0, 1], HD95 in mm."""
        return {
            "overall": self.overall.to_dict(),
            "worst_subset": self.worst,
            "full_subset": self.full,
            "by_subset": {name: cell.to_dict() for name, cell in self.by_subset.items()},
            "by_region": {name: cell.to_dict() for name, cell in self.by_region.items()},
            "cells": [
                {"subset": subset, "region": region, **cell.to_dict()}
                for (subset, region), cell in self.cells.items()
            ],
        }


def summarize(records: Sequence[Record], *, subset_order: Sequence[str] | None = None) -> Summary:
    """Average over cases in each (subset, region), then over these cells. NaN values are left out.

    Args:
        records: measurements, each (case, subset, region) once.
        subset_order: names of the subsets in the order of the result. Defaults to their order in
            the records.

    Raises:
        PrismError: there are no records, one occurs twice, or ``subset_order`` lacks a subset.

    Example:
        >>> a = Record("case1", "flair", "WT", 0.5, 4.0)
        >>> b = Record("case2", "flair", "WT", 0.9, float("nan"))
        >>> summarize([a, b]).by_subset["flair"]
        Cell(dice=0.7, hd95=4.0, cases=2, undefined=1)
    """
    table = index_records(records, "records")
    names = tuple(dict.fromkeys(r.subset for r in records))
    if subset_order is not None:
        lost = [name for name in names if name not in subset_order]
        if lost:
            raise PrismError(f"subset_order: lacks {', '.join(lost)}; name every subset measured")
        names = tuple(name for name in subset_order if name in names)
    regions = tuple(dict.fromkeys(r.region for r in records))

    members: dict[tuple[str, str], list[Record]] = {(s, r): [] for s in names for r in regions}
    for record in table.values():
        members[record.subset, record.region].append(record)
    members = {key: group for key, group in members.items() if group}
    cells = {
        key: Cell(
            dice=_mean(r.dice for r in group),
            hd95=_mean(r.hd95 for r in group),
            cases=len(group),
            undefined=sum(math.isnan(r.dice) or math.isnan(r.hd95) for r in group),
        )
        for key, group in members.items()
    }

    def average(keys: Iterable[tuple[str, str]]) -> Cell:
        keys = tuple(keys)
        return Cell(
            dice=_mean(cells[k].dice for k in keys),
            hd95=_mean(cells[k].hd95 for k in keys),
            cases=len({r.case for k in keys for r in members[k]}),
            undefined=sum(cells[k].undefined for k in keys),
        )

    by_subset = {s: average(k for k in cells if k[0] == s) for s in names}
    everything = {part for name in names for part in name.split("+")}
    return Summary(
        cells=cells,
        by_subset=by_subset,
        by_region={r: average(k for k in cells if k[1] == r) for r in regions},
        overall=average(cells),
        # A subset without any defined Dice cannot be called the worst.
        worst=min(names, key=lambda s: (math.isnan(by_subset[s].dice), by_subset[s].dice)),
        full=next((s for s in names if set(s.split("+")) == everything), None),
    )


def _mean(values: Iterable[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan


def summarize_policies(records: Sequence[Record]) -> dict[str, Summary]:
    """The summary of the same predictions under each policy for empty masks, by its name.

    Args:
        records: records of an evaluation, each (case, subset, region) once. If one of them has no volumes
            or no diagonal, there is nothing to say, and the result is empty.

    Raises:
        PrismError: see ``summarize``.

    Example:
        >>> missed = Record("p1", "t1", "ET", 0.0, 373.13, 0.0, 0.0, 2.5, 1, 1, 0, 300.0)
        >>> {name: summary.overall.hd95 for name, summary in summarize_policies([missed]).items()}
        {'brats': 373.13, 'nan': nan, 'diagonal': 300.0}
    """
    if any(math.isnan(r.predicted_ml + r.true_ml + r.diagonal) for r in records):
        return {}
    return {
        policy.name: summarize([rescored(record, policy) for record in records])
        for policy in EMPTY_POLICIES
    }


def empty_count(records: Sequence[Record]) -> int:
    """The number of records whose prediction or truth is empty, which policies score differently."""
    return sum(record.predicted_ml == 0 or record.true_ml == 0 for record in records)
