"""Formats scores as text. The tables in the terminal and on the page use it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from prism_meta.errors import PrismError, raise_faults
from prism_meta.report.averages import Summary
from prism_meta.report.bootstrap import Interval


def format_number(value: float, scale: float = 1.0, *, digits: int = 1, sign: bool = False) -> str:
    """A number multiplied by ``scale``, or a dash for NaN.

    Example:
        >>> format_number(0.125, 100.0), format_number(2.0, sign=True), format_number(math.nan)
        ('12.5', '+2.0', '–')
    """
    return "–" if math.isnan(value) else f"{scale * value:{'+' if sign else ''}.{digits}f}"


def format_dice(value: float) -> str:
    """Dice in percent, or a dash for NaN."""
    return format_number(value, 100.0)


def format_mm(value: float) -> str:
    """A distance in mm, or a dash for NaN."""
    return format_number(value)


def format_ends(
    interval: Interval, scale: float = 1.0, *, digits: int = 1, sign: bool = False
) -> str:
    """The ends of an interval, both multiplied by ``scale``, or a dash if there is none.

    Example:
        >>> format_ends(Interval(0.5, 0.25, 0.75, 4), 100.0)
        '25.0 to 75.0'
    """
    if math.isnan(interval.low):
        return "–"
    low, high = (
        format_number(x, scale, digits=digits, sign=sign) for x in (interval.low, interval.high)
    )
    return f"{low} to {high}"


def format_interval(interval: Interval, scale: float) -> tuple[str, str]:
    """A mean difference and its interval, both multiplied by ``scale``."""
    mean = format_number(interval.mean, scale, sign=True)
    return mean, format_ends(interval, scale, sign=True)


def undefined_note(summary: Summary) -> str:
    """A sentence about the undefined records; empty if there are none."""
    count = summary.overall.undefined
    return f" {count} records with undefined values are left out." if count else ""


def shown_modalities(summary: Summary, modalities: Sequence[str]) -> dict[str, tuple[bool, ...]]:
    """The modalities of each subset, as booleans in the order of ``modalities``.

    Raises:
        PrismError: a subset names a modality that is not in ``modalities``.
    """
    faults = [
        f"subset {subset!r}: expected modalities of {', '.join(modalities)} joined by '+'; "
        "give the modalities that the records were made with"
        for subset in summary.subsets
        if not set(subset.split("+")) <= set(modalities)
    ]
    raise_faults(PrismError, faults)
    return {s: tuple(name in s.split("+") for name in modalities) for s in summary.subsets}


def subset_scores(summary: Summary, subset: str) -> tuple[list[float], list[float]]:
    """Dice and HD95 of a subset: one value per region, then the mean; NaN if not measured."""
    cells = [summary.cells.get((subset, region)) for region in summary.regions]
    cells.append(summary.by_subset[subset])
    return (
        [cell.dice if cell else math.nan for cell in cells],
        [cell.hd95 if cell else math.nan for cell in cells],
    )
