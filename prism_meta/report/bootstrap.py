"""Bootstrap intervals over cases: the cases of one evaluation are drawn with replacement.

The subsets and regions of one case are not independent, so the case is the unit, and all numbers of a
report share the draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_meta.errors import PrismError
from prism_meta.records import nan_to_none

#: Number of resamples for a report. Efron and Tibshirani advise 1000 to 2000 for percentiles.
RESAMPLES = 2000

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean over cases, or another statistic of them, and its 95% interval.

    Args:
        mean: mean over cases; NaN when no value is defined.
        low: 2.5th percentile of the bootstrap; NaN below two cases.
        high: 97.5th percentile; NaN below two cases.
        cases: number of cases with a defined value.
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
            "mean": nan_to_none(self.mean),
            "low": nan_to_none(self.low),
            "high": nan_to_none(self.high),
            "cases": self.cases,
        }


class Bootstrap:
    """Resamples of n cases, which depend only on n, the seed and the number of resamples.

    Args:
        cases: number of cases n, at least 1.
        seed: random seed.
        resamples: number of resamples R, at least 1.

    Raises:
        PrismError: there are no resamples.

    Example:
        >>> bootstrap = Bootstrap(4, seed=0, resamples=1000)
        >>> bootstrap.intervals(np.array([[0.1, 0.5], [0.3, 0.5], [0.1, 0.5], [0.3, 0.5]]))[1]
        Interval(mean=0.5, low=0.5, high=0.5, cases=4)

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """

    def __init__(self, cases: int, *, seed: int = 0, resamples: int = RESAMPLES) -> None:
        if resamples < 1:
            raise PrismError(f"resamples: got {resamples}, expected at least 1; 10000 is usual")
        # How often each case is drawn; the mean of a resample is then one matrix product.
        drawn = np.random.default_rng(seed).multinomial(
            cases, np.full(cases, 1 / cases), size=resamples
        )
        self._weight = drawn.astype(np.float64)

    def means(self, values: Array) -> Array:
        """The means (R, k) of each resample of ``values`` (n, k). NaN is left out.

        Where a resample has no defined value, its mean is NaN.
        """
        known = ~np.isnan(values)
        total = self._weight @ np.where(known, values, 0.0)
        count = self._weight @ known.astype(np.float64)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    def intervals(self, rows: Array) -> list[Interval]:
        """The mean over cases and its interval for each column of ``rows`` (n, k). NaN is left out."""
        cases = (~np.isnan(rows)).sum(0)
        return [
            Interval(float(mean), *ends, int(count))
            for mean, ends, count in zip(
                nanmean(rows, 0), ends_of(self.means(rows), cases), cases, strict=True
            )
        ]


def ends_of(samples: Array, cases: NDArray[np.integer[Any]]) -> list[tuple[float, float]]:
    """The 2.5th and 97.5th percentile of each column of ``samples`` (R, k); NaN is left out.

    Args:
        samples: a statistic of each resample.
        cases: (k,), on how many cases each statistic depends. Below two there is no interval.
    """
    ends = np.full((2, samples.shape[1]), math.nan)
    whole = ~np.isnan(samples).any(0)
    ends[:, whole] = np.percentile(samples[:, whole], (2.5, 97.5), axis=0)
    for column in np.flatnonzero(~whole):
        defined = samples[~np.isnan(samples[:, column]), column]
        if len(defined):
            ends[:, column] = np.percentile(defined, (2.5, 97.5))
    ends[:, cases < 2] = math.nan
    return [(float(low), float(high)) for low, high in ends.T]


def nanmean(values: Array, axis: int | tuple[int, ...]) -> Array:
    """Like ``np.nanmean``, but without a warning if all values are NaN."""
    count = (~np.isnan(values)).sum(axis)
    mean: Array = np.where(count > 0, np.nansum(values, axis) / np.maximum(count, 1), np.nan)
    return mean
