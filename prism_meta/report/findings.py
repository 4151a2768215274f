"""Averages and their intervals as lines of text, which the terminal and the page show."""

from __future__ import annotations

import math
from typing import NamedTuple

from prism_meta.report.averages import Summary
from prism_meta.report.bootstrap import Interval
from prism_meta.report.text import format_ends, format_number


class Unit(NamedTuple):
    """How a measure is shown.

    Args:
        title: its name and unit.
        scale: factor from the records to this unit.
        digits: number of decimals.
        sign: whether a plus is shown.
    """

    title: str
    scale: float = 1.0
    digits: int = 1
    sign: bool = False


#: How the measures of records are shown, by the names of ``MEASURES``.
UNITS = {
    "dice": Unit("Dice, %", 100.0),
    "hd95_mm": Unit("HD95, mm"),
    "nsd_1mm": Unit("surface Dice at 1 mm, %", 100.0),
    "volume_error_ml": Unit("volume error, ml", sign=True),
    "relative_volume_error": Unit("volume error, % of the truth", 100.0, sign=True),
    "true_lesions": Unit("true lesions per case", digits=2),
    "missed_lesions": Unit("missed lesions per case", digits=2),
    "false_lesions": Unit("false lesions per case", digits=2),
}
_POINTS = Unit("", 100.0)
#: A difference of two Dice values.
CHANGE = Unit("Dice, points", 100.0, sign=True)


class Finding(NamedTuple):
    """One line.

    Args:
        title: what it is, with its unit.
        mean: the mean.
        ends: the 95% interval, or a dash.
    """

    title: str
    mean: str
    ends: str


def findings(summary: Summary) -> list[list[Finding]]:
    """The averages over all subsets and regions, the balance, and the contributions, in three sections.

    A measure that the records do not have is left out.

    Example:
        >>> from prism_meta.records import Record
        >>> from prism_meta.report import summarize
        >>> records = [
        ...     Record(case, name, "WT", 0.4 + gain + 0.2 * (name == "t1+t2"), 4.0)
        ...     for case, gain in (("c1", 0.0), ("c2", 0.1)) for name in ("t1", "t2", "t1+t2")
        ... ]
        >>> for section in findings(summarize(records)):
        ...     print(section[0].title, section[0].mean, section[0].ends)
        Dice, % 51.7 46.7 to 56.7
        best minus worst subset, Dice points 20.0 20.0 to 20.0
        Dice lost without t1, points +20.0 +20.0 to +20.0
    """
    averages = []
    for measure, unit in UNITS.items():
        score = summary.overall.scores[measure]
        if measure in ("dice", "hd95_mm") or not math.isnan(score.mean):
            averages.append(_finding(unit.title, score, unit))
        if measure == "dice" and len(summary.regions) > 1:
            averages += [
                _finding(f"Dice {region}, %", cell.scores[measure], unit)
                for region, cell in summary.by_region.items()
            ]
    balance = summary.balance
    names = {"worst subset": balance.worst, "worst single modality": balance.worst_single}
    evenness = [
        _finding("best minus worst subset, Dice points", balance.spread, _POINTS),
        _finding("standard deviation of subsets, Dice points", balance.deviation, _POINTS),
        *(
            _finding(f"{title} ({name}), Dice, %", summary.by_subset[name].scores["dice"], _POINTS)
            for title, name in names.items()
            if name is not None
        ),
    ]
    lost = [
        _finding(f"Dice lost without {name}, points", contribution.overall, CHANGE)
        for name, contribution in summary.contributions.items()
    ]
    return [section for section in (averages, evenness, lost) if section]


def bootstrap_note(summary: Summary) -> str:
    """A sentence about the intervals."""
    return (
        f"95% percentile bootstrap over {summary.overall.cases} cases, {summary.resamples} resamples, "
        f"seed {summary.seed}."
    )


def _finding(title: str, score: Interval, unit: Unit) -> Finding:
    mean = format_number(score.mean, unit.scale, digits=unit.digits, sign=unit.sign)
    return Finding(title, mean, format_ends(score, unit.scale, digits=unit.digits, sign=unit.sign))
