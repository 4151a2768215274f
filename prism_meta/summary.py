"""Averages of records, paired comparisons of two runs, and records as CSV files."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_meta.errors import PrismError, raise_faults
from prism_meta.files import atomic
from prism_meta.metrics import Record

#: Columns of a file of records.
HEADER: tuple[str, ...] = ("case", "subset", "region", "dice", "hd95_mm")

_MOST_FAULTS = 10  # a wrong separator spoils every line; ten of them show it


@dataclass(frozen=True)
class Cell:
    """Averages of one group of records.

    Args:
        dice: mean Dice in [0, 1]; NaN when no value is defined.
        hd95: mean HD95 in mm; NaN when no value is defined.
        cases: number of cases in the group.
        undefined: number of records whose Dice or HD95 is NaN and so was left out of that mean.
    """

    dice: float
    hd95: float
    cases: int
    undefined: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The four numbers, NaN as None."""
        return {
            "dice": _json(self.dice),
            "hd95_mm": _json(self.hd95),
            "cases": self.cases,
            "undefined": self.undefined,
        }


@dataclass(frozen=True)
class Summary:
    """Averages of a set of records; made by ``summarize``.

    Args:
        cells: per (subset, region), the mean over cases.
        by_subset: per subset, the mean over its cells.
        by_region: per region, the mean over its cells.
        overall: the mean over all cells.
        worst: the subset of the lowest mean Dice.
        full: the subset of all modalities that the subsets name; None if it was not measured.
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
    """Average over cases in each (subset, region), then over these cells; NaN is left out.

    Args:
        records: measurements, each (case, subset, region) once.
        subset_order: names of the subsets in the order wanted; that of the records unless told.

    Raises:
        PrismError: there are no records, one is there twice, or the order lacks a subset.

    Example:
        >>> a = Record("case1", "flair", "WT", 0.5, 4.0)
        >>> b = Record("case2", "flair", "WT", 0.9, float("nan"))
        >>> summarize([a, b]).by_subset["flair"]
        Cell(dice=0.7, hd95=4.0, cases=2, undefined=1)
    """
    table = _unique(records, "records")
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
        # A subset without any defined Dice is not known to be the worst.
        worst=min(names, key=lambda s: (math.isnan(by_subset[s].dice), by_subset[s].dice)),
        full=next((s for s in names if set(s.split("+")) == everything), None),
    )


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
            "mean": _json(self.mean),
            "low": _json(self.low),
            "high": _json(self.high),
            "cases": self.cases,
        }


@dataclass(frozen=True)
class Change:
    """What changed from run a to run b: ``dice`` in [-1, 1], ``hd95`` in mm (down is better)."""

    dice: Interval
    hd95: Interval

    def to_dict(self) -> dict[str, Any]:
        """Both intervals, NaN as None."""
        return {"dice": self.dice.to_dict(), "hd95_mm": self.hd95.to_dict()}


@dataclass(frozen=True)
class Comparison:
    """Paired differences b - a of two runs; made by ``compare``.

    Args:
        overall: over all cells.
        by_region: per region, over the subsets.
        by_subset: per subset, over the regions.
        cases: number of cases that both runs have.
        undefined: number of pairs of records left out, at least in part, since a value is NaN.
        resamples: number of bootstrap resamples.
        seed: seed of the bootstrap.
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
        seed: seed of the bootstrap.
        resamples: number of resamples, at least 1.

    Raises:
        PrismError: the records do not pair, one is there twice, or there are none.

    Example:
        >>> a = [Record(f"case{i}", "t1", "WT", 0.5, 9.0) for i in range(4)]
        >>> b = [Record(f"case{i}", "t1", "WT", 0.75, 7.0) for i in range(4)]
        >>> compare(a, b).overall.dice
        Interval(mean=0.25, low=0.25, high=0.25, cases=4)

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    if resamples < 1:
        raise PrismError(f"resamples: got {resamples}, expected at least 1; 10000 is usual")
    first, second = _unique(a, "a"), _unique(b, "b")
    unpaired = [key for key in (*first, *second) if (key in first) != (key in second)]
    if unpaired:
        case, subset, region = unpaired[0]
        raise PrismError(
            f"{len(unpaired)} records do not pair, the first is case {case}, subset {subset}, "
            f"region {region}, only in {'a' if unpaired[0] in first else 'b'}; "
            "evaluate both runs on the same cases and subsets"
        )
    cases, names, regions = (tuple(dict.fromkeys(key[i] for key in first)) for i in range(3))
    cases = tuple(sorted(cases))  # so that the draws do not depend on the order of the records
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


def write_records(path: Path | str, records: Sequence[Record]) -> None:
    """Write ``records`` as CSV: ``case,subset,region,dice,hd95_mm``; NaN is ``nan``.

    Raises:
        OutputError: the file cannot be written; what was there before is kept.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "records.csv"
        >>> write_records(path, [Record("case1", "flair+t1", "WT", 0.875, 2.0)])
        >>> read_records(path)
        [Record(case='case1', subset='flair+t1', region='WT', dice=0.875, hd95=2.0)]
    """
    with atomic(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        writer.writerows((r.case, r.subset, r.region, r.dice, r.hd95) for r in records)


def read_records(path: Path | str) -> list[Record]:
    """Read records that ``write_records`` wrote.

    Raises:
        PrismError: the file cannot be read; every bad line is named with its number.
    """
    path, records, faults = Path(path), [], []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            if tuple(header) != HEADER:
                raise PrismError(
                    f"{path}, line 1: got {','.join(header)!r}, expected {','.join(HEADER)!r}; "
                    "give a file of records that an evaluation wrote"
                )
            for row in filter(None, reader):
                try:
                    records.append(_record(row))
                except ValueError as error:
                    faults.append(f"{path}, line {reader.line_num}: {error}")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise PrismError(f"cannot read {path}: {reason}; give a file of records") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise PrismError(f"{path}: {error}; give a CSV file in UTF-8") from error
    if len(faults) > _MOST_FAULTS:
        faults[_MOST_FAULTS:] = [f"{path}: and {len(faults) - _MOST_FAULTS} more such lines"]
    raise_faults(PrismError, faults)
    return records


def _record(row: Sequence[str]) -> Record:
    if len(row) != len(HEADER):
        raise ValueError(f"got {len(row)} values, expected {len(HEADER)}: {', '.join(HEADER)}")
    numbers = []
    for name, text, most in zip(HEADER[3:], row[3:], (1.0, math.inf), strict=True):
        try:
            number = float(text)
        except ValueError:
            raise ValueError(f"{name} is {text!r}, expected a number or nan") from None
        if math.isinf(number) or number < 0 or number > most:
            wanted = "in [0, 1]" if most == 1 else "in mm, 0 or more"
            raise ValueError(f"{name} is {text}, expected a number {wanted}, or nan")
        numbers.append(number)
    return Record(row[0], row[1], row[2], *numbers)


def _unique(records: Sequence[Record], name: str) -> dict[tuple[str, str, str], Record]:
    """Records by (case, subset, region), or the error that one is there twice or there are none."""
    if not records:
        raise PrismError(f"{name}: got no records, expected at least one; evaluate a case first")
    table = {(r.case, r.subset, r.region): r for r in records}
    if len(table) < len(records):
        seen: set[tuple[str, str, str]] = set()
        for record in records:
            key = (record.case, record.subset, record.region)
            if key in seen:
                raise PrismError(
                    f"{name}: case {key[0]}, subset {key[1]}, region {key[2]} is there twice; "
                    "give each case its own name"
                )
            seen.add(key)
    return table


def _mean(values: Iterable[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan


def _nanmean(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """As ``np.nanmean``, without its warning where all values are NaN."""
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


def _json(value: float) -> float | None:
    return None if math.isnan(value) else value
