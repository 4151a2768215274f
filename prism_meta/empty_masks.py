"""What an empty mask gives: named policies, and records under another policy than their own.

Every table prints its policy, because the choice moves averages by more than most methods do.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Protocol

from prism_meta.records import Record


class EmptyPolicy(Protocol):
    """What an empty mask gives: ``(dice, hd95)``."""

    name: str
    statement: str

    def both(self, diagonal: float) -> tuple[float, float]:
        """The value if neither the prediction nor the truth has a voxel of the region."""

    def one(self, diagonal: float) -> tuple[float, float]:
        """The value if only one of them has: a missed tumour or an invented one."""


class BratsEmpty:
    """The BraTS rule: both empty is perfect, one empty is the worst of the 240x240x155 mm grid."""

    name = "brats"
    statement = "both empty: Dice 1, HD95 0; one empty: Dice 0, HD95 373.13 mm"

    def both(self, diagonal: float) -> tuple[float, float]:
        return 1.0, 0.0

    def one(self, diagonal: float) -> tuple[float, float]:
        return 0.0, 373.13


class NanEmpty:
    """Undefined values are NaN, and averages leave them out; a missed tumour still has Dice 0."""

    name = "nan"
    statement = "both empty: NaN; one empty: Dice 0, HD95 NaN (averages leave NaN out)"

    def both(self, diagonal: float) -> tuple[float, float]:
        return math.nan, math.nan

    def one(self, diagonal: float) -> tuple[float, float]:
        return 0.0, math.nan


class DiagonalEmpty:
    """The BraTS rule, but one empty mask gives the diagonal of the case's own volume in mm."""

    name = "diagonal"
    statement = "both empty: Dice 1, HD95 0; one empty: Dice 0, HD95 the volume's diagonal in mm"

    def both(self, diagonal: float) -> tuple[float, float]:
        return 1.0, 0.0

    def one(self, diagonal: float) -> tuple[float, float]:
        return 0.0, diagonal


#: All policies, by the names that configurations use.
EMPTY_POLICIES: tuple[EmptyPolicy, ...] = (BratsEmpty(), NanEmpty(), DiagonalEmpty())


def rescored(record: Record, policy: EmptyPolicy) -> Record:
    """The record as an evaluation under ``policy`` gives it.

    Dice, HD95 and surface Dice change if the prediction or the truth is empty, which their volumes tell.

    Args:
        record: a record with volumes and a diagonal.
        policy: what an empty mask gives.

    Example:
        >>> missed = Record("p1", "t1", "ET", 0.0, 373.13, 0.0, 0.0, 2.5, 1, 1, 0, 300.0)
        >>> rescored(missed, DiagonalEmpty()).hd95
        300.0
    """
    there = (record.predicted_ml > 0) + (record.true_ml > 0)
    if there == 2:
        return record
    dice, hd95 = policy.one(record.diagonal) if there else policy.both(record.diagonal)
    return replace(record, dice=dice, hd95=hd95, nsd=dice)
