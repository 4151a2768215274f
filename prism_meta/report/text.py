"""Formats scores as text. The tables in the terminal and on the page use it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from prism_meta.errors import PrismError, raise_faults
from prism_meta.report.averages import Summary
from prism_meta.report.bootstrap import Interval


def format_dice(value: float) -> str:
    """Dice in percent, or a dash for NaN."""
    return "–" if math.isnan(value) else f"{100 * value:.1f}"


def format_mm(value: float) -> str:
    """A distance in mm, or a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.1f}"


def format_interval(interval: Interval, scale: float) -> tuple[str, str]:
    """A mean difference and its interval, both multiplied by ``scale``."""
    mean, low, high = (scale * x for x in (interval.mean, interval.low, interval.high))
    return (
        "–" if math.isnan(mean) else f"{mean:+.1f}",
        "–" if math.isnan(low) else f"{low:+.1f} to {high:+.1f}",
    )


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
