"""Averages of records with bootstrap intervals: per cell, per subset, per region, and over all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_meta.empty_masks import EMPTY_POLICIES, rescored
from prism_meta.records import Record, nan_to_none
from prism_meta.report.balance import Balance, Contribution, balance, contributions
from prism_meta.report.bootstrap import RESAMPLES, Bootstrap, Interval, ends_of, nanmean
from prism_meta.report.measures import Measurements

#: Subset and region of an average; None stands for all.
_Key = tuple[str | None, str | None]


@dataclass(frozen=True)
class Cell:
    """Averages of one group of records.

    Args:
        scores: measure -> mean and 95% interval over cases, by the names of ``MEASURES``. A mean is NaN
            when no value is defined.
        cases: number of cases in the group.
        undefined: number of records whose Dice or HD95 is NaN. The NaN is left out of its mean.
    """

    scores: Mapping[str, Interval]
    cases: int
    undefined: int = 0

    @property
    def dice(self) -> float:
        """Mean Dice in [0, 1]."""
        return self.scores["dice"].mean

    @property
    def hd95(self) -> float:
        """Mean HD95 in mm."""
        return self.scores["hd95_mm"].mean

    def to_dict(self) -> dict[str, Any]:
        """The means, the numbers of cases and undefined records, and the intervals; NaN is None."""
        return {
            **{name: nan_to_none(score.mean) for name, score in self.scores.items()},
            "cases": self.cases,
            "undefined": self.undefined,
            "intervals": {
                name: [nan_to_none(score.low), nan_to_none(score.high)]
                for name, score in self.scores.items()
            },
        }


@dataclass(frozen=True)
class Summary:
    """Averages of a set of records. ``summarize`` creates it.

    Args:
        cells: per (subset, region), the mean over cases.
        by_subset: per subset, the mean over its cells.
        by_region: per region, the mean over its cells.
        overall: the mean over all cells.
        full: the subset of all modalities that occur in the subsets; None if it was not measured.
        balance: how evenly Dice is spread over the subsets, and the worst of them.
        contributions: per modality, what is lost without it.
        resamples: number of bootstrap resamples.
        seed: random seed of the bootstrap.
    """

    cells: dict[tuple[str, str], Cell]
    by_subset: dict[str, Cell]
    by_region: dict[str, Cell]
    overall: Cell
    full: str | None
    balance: Balance
    contributions: dict[str, Contribution]
    resamples: int
    seed: int

    @property
    def subsets(self) -> tuple[str, ...]:
        """Names of the subsets, in order."""
        return tuple(self.by_subset)

    @property
    def regions(self) -> tuple[str, ...]:
        """Names of the regions, in order."""
        return tuple(self.by_region)

    @property
    def worst(self) -> str:
        """The subset with the lowest mean Dice."""
        return self.balance.worst

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON values; NaN is None, Dice is in [0, 1], distances in mm, volumes in ml."""
        return {
            "overall": self.overall.to_dict(),
            "worst_subset": self.worst,
            "full_subset": self.full,
            "balance": self.balance.to_dict(),
            "contributions": {name: part.to_dict() for name, part in self.contributions.items()},
            "by_subset": {name: cell.to_dict() for name, cell in self.by_subset.items()},
            "by_region": {name: cell.to_dict() for name, cell in self.by_region.items()},
            "cells": [
                {"subset": subset, "region": region, **cell.to_dict()}
                for (subset, region), cell in self.cells.items()
            ],
            "bootstrap": {"unit": "case", "resamples": self.resamples, "seed": self.seed},
        }


def summarize(
    records: Sequence[Record],
    *,
    subset_order: Sequence[str] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Summary:
    """Average over cases in each (subset, region), then over these cells. NaN values are left out.

    Each average has a 95% percentile bootstrap interval over cases: the cases are drawn with replacement,
    and the same average is taken of each draw.

    Args:
        records: measurements, each (case, subset, region) once.
        subset_order: names of the subsets in the order of the result. Defaults to their order in
            the records.
        seed: random seed of the bootstrap.
        resamples: number of resamples, at least 1. Defaults to 2,000, enough for percentiles.

    Returns:
        The averages per subset, per region and over all, each with its interval.

    Raises:
        PrismError: there are no records, one occurs twice, ``subset_order`` lacks a subset, or there are
            no resamples.

    Example:
        >>> records = [Record(f"case{i}", "flair", "WT", dice, 4.0) for i, dice in enumerate((0.5, 0.9))]
        >>> summarize(records).by_subset["flair"].scores["dice"]
        Interval(mean=0.7, low=0.5, high=0.9, cases=2)

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    found = Measurements.of(records, subset_order=subset_order)
    bootstrap = Bootstrap(len(found.cases), seed=seed, resamples=resamples)
    keys = _keys(found)
    scores: dict[_Key, dict[str, Interval]] = {key: {} for key in keys}
    for measure, values in found.values.items():
        shape = values.shape[1:]  # subsets, regions
        drawn = bootstrap.means(values.reshape(len(values), -1)).reshape(-1, *shape)
        means, samples = _averages(nanmean(values, 0)[None])[0], _averages(drawn)
        cases = _averages(~np.isnan(values), of=np.any).sum(0)
        ends = ends_of(samples, cases)
        for key, mean, end, count in zip(keys, means, ends, cases, strict=True):
            scores[key][measure] = Interval(float(mean), *end, int(count))
    undefined = np.isnan(found.values["dice"]) | np.isnan(found.values["hd95_mm"])
    numbers = (
        _averages(found.measured, of=np.any).sum(0),
        _averages((found.measured & undefined).sum(0)[None], of=np.sum)[0],
    )
    averages = {
        key: Cell(scores[key], int(count), int(left_out))
        for key, count, left_out in zip(keys, *numbers, strict=True)
        if count
    }
    everything = {part for name in found.subsets for part in name.split("+")}
    return Summary(
        cells={
            (s, r): cell for (s, r), cell in averages.items() if s is not None and r is not None
        },
        by_subset={name: averages[name, None] for name in found.subsets},
        by_region={name: averages[None, name] for name in found.regions},
        overall=averages[None, None],
        full=next((s for s in found.subsets if set(s.split("+")) == everything), None),
        balance=balance(found, bootstrap),
        contributions=contributions(found, bootstrap),
        resamples=resamples,
        seed=seed,
    )


def _keys(found: Measurements) -> list[_Key]:
    """What ``_averages`` averages: (subset, region), where None stands for all."""
    return [
        *((subset, region) for subset in found.subsets for region in found.regions),
        *((subset, None) for subset in found.subsets),
        *((None, region) for region in found.regions),
        (None, None),
    ]


def _averages(cells: NDArray[Any], *, of: Callable[..., Any] = nanmean) -> NDArray[Any]:
    """Cells (n, S, R), and averages of them, as one array (n, S * R + S + R + 1); see ``_keys``."""
    parts = (cells, of(cells, 2), of(cells, 1), of(cells, (1, 2)))
    return np.concatenate([part.reshape(len(cells), -1) for part in parts], 1)


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
