"""Scores of single cases: from all modalities that a case has, and over all of its subsets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from prism_meta.records import Record
from prism_meta.report.bootstrap import nanmean
from prism_meta.report.measures import Measurements


@dataclass(frozen=True)
class CaseScores:
    """The scores of one case. NaN is a score that is undefined.

    Args:
        case: name of the case.
        subset: the largest subset that was measured: all modalities that the case has.
        modalities: those modalities.
        regions: region -> Dice in [0, 1] from ``subset``.
        dice: mean of these.
        hd95: mean HD95 from ``subset`` over the regions, in mm.
        mean: mean Dice over all measured subsets and regions.
        worst: the subset with the lowest mean Dice over the regions.
        worst_dice: that Dice.
    """

    case: str
    subset: str
    modalities: tuple[str, ...]
    regions: Mapping[str, float]
    dice: float
    hd95: float
    mean: float
    worst: str
    worst_dice: float


def score_cases(records: Sequence[Record]) -> list[CaseScores]:
    """The scores of each case, sorted by name.

    Raises:
        PrismError: there are no records, or one occurs twice.

    Example:
        >>> records = [Record("p1", s, "WT", dice, 4.0) for s, dice in (("t1", 0.5), ("t1+t2", 0.75))]
        >>> (found,) = score_cases(records)
        >>> found.dice, found.mean, found.worst, found.modalities
        (0.75, 0.625, 't1', ('t1', 't2'))
    """
    found = Measurements.of(records)
    dice, hd95 = found.values["dice"], found.values["hd95_mm"]
    by_subset = nanmean(dice, 2)  # (cases, subsets)
    sizes = np.array([name.count("+") + 1 for name in found.subsets])
    result = []
    for i, case in enumerate(found.cases):
        measured = found.measured[i].any(1)
        largest = int(np.where(measured, sizes, 0).argmax())
        own = [name for name, there in zip(found.subsets, measured, strict=True) if there]
        lowest = int(np.nan_to_num(by_subset[i], nan=math.inf).argmin())
        result.append(
            CaseScores(
                case=case,
                subset=found.subsets[largest],
                modalities=tuple(dict.fromkeys(part for name in own for part in name.split("+"))),
                regions=dict(zip(found.regions, dice[i, largest].tolist(), strict=True)),
                dice=float(by_subset[i, largest]),
                hd95=float(nanmean(hd95[i, largest], 0)),
                mean=float(nanmean(by_subset[i], 0)),
                worst=found.subsets[lowest],
                worst_dice=float(by_subset[i, lowest]),
            )
        )
    return result


class Group(NamedTuple):
    """How many cases of a group have each modality.

    Args:
        name: name of the group.
        cases: names of its cases.
        counts: the number of cases with each modality, in order.
        complete: the number of cases that have them all.
    """

    name: str
    cases: tuple[str, ...]
    counts: tuple[int, ...]
    complete: int


def group_row(name: str, cases: Mapping[str, Sequence[str]], modalities: Sequence[str]) -> Group:
    """Count the modalities of a group.

    Args:
        name: name of the group.
        cases: case -> names of its modalities.
        modalities: names of all M modalities, in order.

    Example:
        >>> group_row("training", {"p1": ["t1", "t2"], "p2": ["t1"]}, ("t1", "t2"))
        Group(name='training', cases=('p1', 'p2'), counts=(2, 1), complete=1)
    """
    counts = tuple(sum(modality in there for there in cases.values()) for modality in modalities)
    complete = sum(set(modalities) <= set(there) for there in cases.values())
    return Group(name, tuple(cases), counts, complete)
