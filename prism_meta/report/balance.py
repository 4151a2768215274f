"""What each modality contributes to Dice, and how evenly Dice is spread over the subsets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from prism_meta.report.bootstrap import Array, Bootstrap, Interval, ends_of, nanmean
from prism_meta.report.measures import Measurements


@dataclass(frozen=True)
class Contribution:
    """What is lost without a modality.

    Args:
        overall: mean drop of Dice over all regions; above 0 if the modality helps.
        by_region: the same per region.
        pairs: number of pairs of subsets, with and without the modality.
    """

    overall: Interval
    by_region: dict[str, Interval]
    pairs: int

    def to_dict(self) -> dict[str, Any]:
        """The contribution as JSON values; NaN is None."""
        return {
            "dice_drop": self.overall.to_dict(),
            "by_region": {name: drop.to_dict() for name, drop in self.by_region.items()},
            "pairs": self.pairs,
        }


@dataclass(frozen=True)
class Balance:
    """How evenly mean Dice is spread over the subsets.

    Args:
        spread: the highest minus the lowest mean Dice of a subset.
        deviation: standard deviation of mean Dice over the subsets (divided by their number).
        worst: the subset with the lowest mean Dice.
        worst_single: the single modality with the lowest mean Dice; None if none was measured.
    """

    spread: Interval
    deviation: Interval
    worst: str
    worst_single: str | None

    def to_dict(self) -> dict[str, Any]:
        """The balance as JSON values; NaN is None."""
        return {
            "dice_spread": self.spread.to_dict(),
            "dice_deviation": self.deviation.to_dict(),
            "worst_subset": self.worst,
            "worst_single": self.worst_single,
        }


def contributions(found: Measurements, bootstrap: Bootstrap) -> dict[str, Contribution]:
    """The contribution of each modality: the drop of Dice when it is removed.

    Dice from each subset with the modality, minus Dice from the same subset without it, is averaged over
    the pairs of subsets and the regions of a case, then over cases. A case counts in the pairs that it has.
    A modality without any such pair is left out.

    Args:
        found: the measurements.
        bootstrap: resamples of their cases.
    """
    dice = found.values["dice"]
    parts = [frozenset(name.split("+")) for name in found.subsets]
    result = {}
    for modality in dict.fromkeys(part for name in found.subsets for part in name.split("+")):
        pairs = [
            (i, parts.index(whole - {modality}))
            for i, whole in enumerate(parts)
            if modality in whole and whole - {modality} in parts
        ]
        if not pairs:
            continue
        drop = np.stack([dice[:, i] - dice[:, j] for i, j in pairs], 1)  # (cases, pairs, regions)
        rows = np.concatenate([nanmean(drop, (1, 2))[:, None], nanmean(drop, 1)], 1)
        overall, *regions = bootstrap.intervals(rows)
        by_region = dict(zip(found.regions, regions, strict=True))
        result[modality] = Contribution(overall, by_region, len(pairs))
    return result


def balance(found: Measurements, bootstrap: Bootstrap) -> Balance:
    """The balance of mean Dice over subsets.

    Args:
        found: the measurements.
        bootstrap: resamples of their cases.
    """
    dice, cases = found.values["dice"], len(found.cases)
    drawn = bootstrap.means(dice.reshape(cases, -1)).reshape(-1, *dice.shape[1:])
    means, samples = nanmean(nanmean(dice, 0), 1), nanmean(drawn, 2)  # (S,) and (R, S)
    points = [statistic(means[None])[0] for statistic in (_spread, _deviation)]
    ends = ends_of(np.stack([_spread(samples), _deviation(samples)], 1), np.full(2, cases))
    spread, deviation = (
        Interval(float(point), *end, cases) for point, end in zip(points, ends, strict=True)
    )
    # A subset without any defined Dice cannot be called the worst.
    place = dict(zip(found.subsets, np.nan_to_num(means, nan=2.0).tolist(), strict=True))
    order = sorted(found.subsets, key=lambda name: place[name])
    single = [name for name in order if "+" not in name]
    return Balance(spread, deviation, order[0], single[0] if single else None)


def _spread(means: Array) -> Array:
    """Highest minus lowest along the last axis; fmax and fmin leave NaN out without a warning."""
    spread: Array = np.fmax.reduce(means, 1) - np.fmin.reduce(means, 1)
    return spread


def _deviation(means: Array) -> Array:
    gaps: Array = means - nanmean(means, 1)[:, None]
    deviation: Array = np.sqrt(nanmean(gaps * gaps, 1))
    return deviation
