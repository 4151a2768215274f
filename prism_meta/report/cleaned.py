"""The numbers after a clean-up of labels, beside those of the labels as predicted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from prism_meta.errors import one_line
from prism_meta.files import atomic, cannot_write
from prism_meta.records import Record, write_records
from prism_meta.report.averages import Summary, summarize
from prism_meta.report.text import format_dice, format_mm, subset_scores

#: The records after the clean-up, with the columns of ``records.csv``.
CLEANED_RECORDS = "records_cleaned.csv"


class CleanedTable(NamedTuple):
    """A table of text, with a row per subset and one of the means.

    Args:
        rules: what the clean-up does.
        heads: of the columns, e.g. ``Dice % WT``.
        rows: name of the row and its cells, each with both numbers.
    """

    rules: str
    heads: list[str]
    rows: list[tuple[str, list[str]]]


@dataclass(frozen=True)
class Cleaned:
    """The measurements after a clean-up.

    Args:
        rules: what the clean-up does, as a sentence without a full stop.
        records: of the same cases, subsets and regions as those without the clean-up.

    Example:
        >>> before = [Record("case1", "t1", "WT", 0.5, 40.0)]
        >>> cleaned = Cleaned("WT: only the largest component", [Record("case1", "t1", "WT", 0.625, 4.0)])
        >>> cleaned.table(summarize(before)).rows[0]
        ('t1', ['50.0 → 62.5', '50.0 → 62.5', '40.0 → 4.0', '40.0 → 4.0'])
    """

    rules: str
    records: Sequence[Record]

    @cached_property
    def summary(self) -> Summary:
        """Averages of the records."""
        return summarize(self.records)

    def table(self, before: Summary) -> CleanedTable:
        """The averages ``before`` and after the clean-up."""
        regions = [*before.regions, "mean"]
        rows = [
            (name, _pairs(subset_scores(before, name), subset_scores(self.summary, name)))
            for name in before.subsets
        ]
        means = [_means(summary) for summary in (before, self.summary)]
        rows.append((f"mean of {len(before.subsets)} subsets", _pairs(*means)))
        heads = [f"{head} {region}" for head in ("Dice %", "HD95 mm") for region in regions]
        return CleanedTable(self.rules, heads, rows)


@contextmanager
def written_or_removed(folder: Path, cleaned: Cleaned | None) -> Iterator[None]:
    """Write ``records_cleaned.csv`` if the block succeeds, or remove that of an earlier report.

    Raises:
        OutputError: it cannot be written or removed.
    """
    path = folder / CLEANED_RECORDS
    if cleaned is None:
        yield
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(path, error) from error
        return
    with atomic(path) as partial:
        write_records(
            partial,
            [replace(r, case=one_line(r.case), region=one_line(r.region)) for r in cleaned.records],
        )
        yield


def _means(summary: Summary) -> tuple[list[float], list[float]]:
    cells = [*(summary.by_region[name] for name in summary.regions), summary.overall]
    return [cell.dice for cell in cells], [cell.hd95 for cell in cells]


def _pairs(
    before: tuple[list[float], list[float]], after: tuple[list[float], list[float]]
) -> list[str]:
    return [
        f"{show(a)} → {show(b)}"
        for show, old, new in zip((format_dice, format_mm), before, after, strict=True)
        for a, b in zip(old, new, strict=True)
    ]
