"""Paired comparisons of two runs, with bootstrap intervals over cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prism_meta.errors import PrismError
from prism_meta.records import Record, index_records
from prism_meta.report.bootstrap import Bootstrap, Interval, nanmean


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
        cells: per (subset, region).
        cases: number of cases that both runs have.
        undefined: number of pairs of records with a NaN value, which is left out.
        resamples: number of bootstrap resamples.
        seed: random seed of the bootstrap.
    """

    overall: Change
    by_region: dict[str, Change]
    by_subset: dict[str, Change]
    cells: dict[tuple[str, str], Change]
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
            "cells": [
                {"subset": subset, "region": region, **change.to_dict()}
                for (subset, region), change in self.cells.items()
            ],
        }


def compare(
    a: Sequence[Record],
    b: Sequence[Record],
    *,
    seed: int = 0,
    resamples: int = 10_000,
    names: tuple[str, str] = ("a", "b"),
) -> Comparison:
    """Paired differences b - a with percentile bootstrap intervals over cases.

    The cells of one case are not independent, so the case is the unit: differences are first
    averaged within a case, then cases are drawn with replacement. All rows share the draws.

    Args:
        a: records of the first run.
        b: records of the second run, of the same cases, subsets and regions.
        seed: random seed of the bootstrap.
        resamples: number of resamples, at least 1. Defaults to 10,000.
        names: of both runs; messages use them.

    Returns:
        The differences per subset, per region and over all, each with its interval.

    Raises:
        PrismError: the records do not pair, one occurs twice, or there are none.

    Example:
        >>> a = [Record(f"case{i}", "t1", "WT", 0.5, 9.0) for i in range(4)]
        >>> b = [Record(f"case{i}", "t1", "WT", 0.75, 7.0) for i in range(4)]
        >>> compare(a, b).overall.dice
        Interval(mean=0.25, low=0.25, high=0.25, cases=4)

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    first, second = index_records(a, names[0]), index_records(b, names[1])
    unpaired = [key for key in (*first, *second) if (key in first) != (key in second)]
    if unpaired:
        case, subset, region = unpaired[0]
        raise PrismError(
            f"{len(unpaired)} records do not pair, the first is case {case}, subset {subset}, "
            f"region {region}, only in {names[0] if unpaired[0] in first else names[1]}; "
            "evaluate both runs on the same cases and subsets"
        )
    cases, subsets, regions = (tuple(dict.fromkeys(key[i] for key in first)) for i in range(3))
    cases = tuple(sorted(cases))  # the draws must not depend on the order of the records
    rank = [{key: i for i, key in enumerate(axis)} for axis in (cases, subsets, regions)]
    # (cases, subsets, regions, 2): Dice and HD95; NaN where a case was not measured in a cell.
    gap = np.full((len(cases), len(subsets), len(regions), 2), np.nan)
    undefined = 0
    for key, old in first.items():
        new = second[key]
        pair = (new.dice - old.dice, new.hd95 - old.hd95)
        undefined += math.isnan(pair[0]) or math.isnan(pair[1])
        gap[tuple(places[part] for places, part in zip(rank, key, strict=True))] = pair
    groups = [gap.reshape(len(cases), -1, 2)]
    groups += [gap[:, :, i] for i in range(len(regions))]
    groups += [gap[:, i] for i in range(len(subsets))]
    cells = [(i, j) for i in range(len(subsets)) for j in range(len(regions))]
    groups += [gap[:, i, j, None] for i, j in cells]
    rows = np.stack([nanmean(group, 1) for group in groups], 1)  # (cases, groups, 2)
    bootstrap = Bootstrap(len(cases), seed=seed, resamples=resamples)
    flat = bootstrap.intervals(rows.reshape(len(cases), -1))
    changes = [Change(dice, hd95) for dice, hd95 in zip(flat[::2], flat[1::2], strict=True)]
    over, per = iter(changes[1:]), changes[1 + len(regions) + len(subsets) :]
    return Comparison(
        overall=changes[0],
        by_region=dict(zip(regions, over, strict=False)),
        by_subset=dict(zip(subsets, over, strict=False)),
        cells={(subsets[i], regions[j]): change for (i, j), change in zip(cells, per, strict=True)},
        cases=len(cases),
        undefined=undefined,
        resamples=resamples,
        seed=seed,
    )
