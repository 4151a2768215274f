"""Paired comparisons of two runs, with bootstrap intervals over cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_meta.errors import PrismError
from prism_meta.records import Record, index_records, nan_to_none


@dataclass(frozen=True)
class Interval:
    """A mean difference and its 95% interval.

    Args:
        mean: mean over cases; NaN when no pair is defined.
        low: 2.5th percentile of the bootstrap; NaN below two cases.
        high: 97.5th percentile; NaN below two cases.
        cases: number of cases with a defined difference.
    """

    mean: float
    low: float
    high: float
    cases: int

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval; False when there is no interval."""
        return self.low > 0 or self.high < 0

    def to_dict(self) -> dict[str, Any]:
        """The four numbers, NaN as None."""
        return {
            "mean": nan_to_none(self.mean),
            "low": nan_to_none(self.low),
            "high": nan_to_none(self.high),
            "cases": self.cases,
        }


@dataclass(frozen=True)
class Change:
    """The change from run a to run b: ``dice`` in [-1, 1], ``hd95`` in mm (lower is better)."""

    dice: Interval
    hd95: Interval

    def to_dict(self) -> dict[str, Any]:
        """Both intervals, NaN as None."""
        return {"dice": self.dice.to_dict(), "hd95_mm": self.hd95.to_dict()}


@dataclass(frozen=True)
class Comparison:
    """Paired differences b - a of two runs. ``compare`` creates it.

    Args:
        overall: over all cells.
        by_region: per region, over the subsets.
        by_subset: per subset, over the regions.
        cases: number of cases that both runs have.
        undefined: number of pairs of records with a NaN value, which is left out.
        resamples: number of bootstrap resamples.
        seed: random seed of the bootstrap.
    """

    overall: Change
    by_region: dict[str, Change]
    by_subset: dict[str, Change]
    cases: int
    undefined: int
    resamples: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON values; NaN is None."""
        return {
            "cases": self.cases,
            "undefined": self.undefined,
            "resamples": self.resamples,
            "seed": self.seed,
            "overall": self.overall.to_dict(),
            "by_region": {name: change.to_dict() for name, change in self.by_region.items()},
            "by_subset": {name: change.to_dict() for name, change in self.by_subset.items()},
        }


def compare(
    a: Sequence[Record], b: Sequence[Record], *, seed: int = 0, resamples: int = 10_000
) -> Comparison:
    """Paired differences b - a with percentile bootstrap intervals over cases.

    The cells of one case are not independent, so the case is the unit: differences are first
    averaged within a case, then cases are drawn with replacement. All rows share the draws.

    Args:
        a: records of the first run.
        b: records of the second run, of the same cases, subsets and regions.
        seed: random seed of the bootstrap.
        resamples: number of resamples, at least 1. Defaults to 10,000.

    Raises:
        PrismError: the records do not pair, one occurs twice, or there are none.

    Example:
        >>> a = [Record(f"case{i}", "t1", "WT", 0.5, 9.0) for i in range(4)]
        >>> b = [Record(f"case{i}", "t1", "WT", 0.75, 7.0) for i in range(4)]
        >>> compare(a, b).overall.dice
        Interval(mean=0.25, low=0.25, high=0.25, cases=4)

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    if resamples < 1:
        raise PrismError(f"resamples: got {resamples}, expected at least 1; 10000 is usual")
    first, second = index_records(a, "a"), index_records(b, "b")
    unpaired = [key for key in (*first, *second) if (key in first) != (key in second)]
    if unpaired:
        case, subset, region = unpaired[0]
        raise PrismError(
            f"{len(unpaired)} records do not pair, the first is case {case}, subset {subset}, "
            f"region {region}, only in {'a' if unpaired[0] in first else 'b'}; "
            "evaluate both runs on the same cases and subsets"
        )
    cases, names, regions = (tuple(dict.fromkeys(key[i] for key in first)) for i in range(3))
    cases = tuple(sorted(cases))  # the draws must not depend on the order of the records
    rank = [{name: i for i, name in enumerate(axis)} for axis in (cases, names, regions)]
    # (cases, subsets, regions, 2): Dice and HD95; NaN where a case was not measured in a cell.
    gap = np.full((len(cases), len(names), len(regions), 2), np.nan)
    undefined = 0
    for key, old in first.items():
        new = second[key]
        pair = (new.dice - old.dice, new.hd95 - old.hd95)
        undefined += math.isnan(pair[0]) or math.isnan(pair[1])
        gap[tuple(places[name] for places, name in zip(rank, key, strict=True))] = pair
    groups = [gap.reshape(len(cases), -1, 2)]
    groups += [gap[:, :, i] for i in range(len(regions))]
    groups += [gap[:, i] for i in range(len(names))]
    rows = np.stack([_nanmean(group, 1) for group in groups], 1)  # (cases, groups, 2)
    changes = _bootstrap(rows, seed=seed, resamples=resamples)
    return Comparison(
        overall=changes[0],
        by_region=dict(zip(regions, changes[1:], strict=False)),
        by_subset=dict(zip(names, changes[1 + len(regions) :], strict=True)),
        cases=len(cases),
        undefined=undefined,
        resamples=resamples,
        seed=seed,
    )


def _nanmean(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Like ``np.nanmean``, but without a warning if all values are NaN."""
    count = (~np.isnan(values)).sum(axis)
    mean: NDArray[np.float64] = np.where(
        count > 0, np.nansum(values, axis) / np.maximum(count, 1), np.nan
    )
    return mean


def _bootstrap(rows: NDArray[np.float64], *, seed: int, resamples: int) -> list[Change]:
    """Mean and interval over axis 0 of ``rows`` (cases, groups, 2), one ``Change`` per group."""
    n, groups, _ = rows.shape
    flat = rows.reshape(n, groups * 2)
    known = ~np.isnan(flat)
    # How often each case is drawn; the mean of a resample is then one matrix product.
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    weight = drawn.astype(np.float64)
    total, count = weight @ np.where(known, flat, 0.0), weight @ known.astype(np.float64)
    means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    middle, cases = _nanmean(flat, 0), known.sum(0)
    intervals = []
    for i in range(groups * 2):
        low = high = math.nan
        if cases[i] > 1:
            low, high = np.nanpercentile(means[:, i], (2.5, 97.5))
        intervals.append(Interval(float(middle[i]), float(low), float(high), int(cases[i])))
    return [Change(intervals[2 * i], intervals[2 * i + 1]) for i in range(groups)]
