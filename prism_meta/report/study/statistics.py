"""Statistics of a study: intervals over patients and seeds, effect sizes, and how many seeds are needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prism_meta.report.bootstrap import Array, Interval
from prism_meta.report.study.scores import MethodScores

#: Number of resamples.
RESAMPLES = 2000
#: More seeds than this are not searched for.
_MOST_SEEDS = 10_000


@dataclass(frozen=True)
class Averages:
    """Averages of a method over seeds and cases, or their differences between two methods.

    Args:
        mean: mean Dice over all subsets.
        worst: Dice of the worst subset of each seed.
    """

    mean: Interval
    worst: Interval


@dataclass(frozen=True)
class Difference:
    """Paired differences of a method to another, over the seeds that both have.

    Args:
        averages: with intervals over patients and seeds.
        seeds: number of seeds that both have.
        deviation: standard deviation over seeds of the difference of mean Dice; NaN below two seeds.
        effect_size: mean over standard deviation of these differences, Cohen's d of pairs.
        p: two-sided p-value of a paired t-test over seeds; NaN below two seeds.
        corrected: the same after Holm's correction for all methods that are compared; see ``holm``.
    """

    averages: Averages
    seeds: int
    deviation: float
    effect_size: float
    p: float
    corrected: float = math.nan


class CrossedBootstrap:
    """Draws seeds and cases with replacement, independently of each other.

    Each run of a seed tests the same cases, so that neither seeds nor cases alone are independent samples.
    With one seed only cases are drawn; how much trainings differ is then not in the interval.

    Args:
        seeds: number of seeds.
        cases: number of cases.
        seed: of the draws.
        resamples: number of resamples R.

    Source: Owen, The pigeonhole bootstrap, Annals of Applied Statistics 2007.
    """

    def __init__(
        self, seeds: int, cases: int, *, seed: int = 0, resamples: int = RESAMPLES
    ) -> None:
        rng = np.random.default_rng(seed)
        self._seeds, self._cases = (
            rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64) / n
            for n in (seeds, cases)
        )

    def averages(self, dice: Array) -> tuple[Array, Array]:
        """The mean and the worst-subset Dice of each resample, (R,) each; ``dice`` is (seeds, cases, S)."""
        by_subset = np.einsum("rc,ncs->rns", self._cases, dice)
        return (
            np.einsum("rn,rn->r", self._seeds, by_subset.mean(2)),
            np.einsum("rn,rn->r", self._seeds, by_subset.min(2)),
        )


def averages(scores: MethodScores) -> Averages:
    """The averages of one method.

    Example:
        >>> dice = np.array([[[0.2, 0.6]], [[0.4, 0.8]]])
        >>> found = averages(MethodScores((0, 1), ("p1",), ("t1", "t2"), dice))
        >>> round(found.mean.mean, 3), round(found.worst.mean, 3)
        (0.5, 0.3)
    """
    bootstrap = CrossedBootstrap(len(scores.seeds), len(scores.cases))
    drawn, points = bootstrap.averages(scores.dice), _points(scores.dice)
    return Averages(*(_interval(*each, scores) for each in zip(points, drawn, strict=True)))


def difference(scores: MethodScores, reference: MethodScores) -> Difference | None:
    """The paired differences ``scores`` - ``reference``; None if they have no seed in common.

    Example:
        >>> dice = np.array([[[0.5]], [[0.6]]])
        >>> reference = MethodScores((0, 1), ("p1",), ("t1",), dice)
        >>> better = MethodScores((0, 1), ("p1",), ("t1",), dice + [[[0.1]], [[0.2]]])
        >>> found = difference(better, reference)
        >>> round(found.averages.mean.mean, 3), round(found.effect_size, 3)
        (0.15, 2.121)
    """
    from scipy.stats import t

    shared = [seed for seed in scores.seeds if seed in reference.seeds]
    if not shared:
        return None
    own, other = scores.at(shared), reference.at(shared)
    bootstrap = CrossedBootstrap(len(shared), len(own.cases))
    drawn = np.subtract(bootstrap.averages(own.dice), bootstrap.averages(other.dice))
    points = np.subtract(_points(own.dice), _points(other.dice)).tolist()
    both = Averages(*(_interval(*each, own) for each in zip(points, drawn, strict=True)))
    by_seed = (own.dice - other.dice).mean((1, 2))
    if len(shared) < 2:
        return Difference(both, len(shared), math.nan, math.nan, math.nan)
    deviation = float(by_seed.std(ddof=1))
    size = float(by_seed.mean()) / deviation if deviation > 0 else math.nan
    p = 2 * float(t.sf(abs(size) * math.sqrt(len(shared)), len(shared) - 1))
    return Difference(both, len(shared), deviation, size, p)


def holm(values: Sequence[float]) -> list[float]:
    """P-values after Holm's correction for their number; NaN stays and does not count.

    Example:
        >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]

    Source: Holm, Scandinavian Journal of Statistics 1979.
    """
    order = sorted((i for i, p in enumerate(values) if not math.isnan(p)), key=lambda i: values[i])
    corrected, highest = [math.nan] * len(values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * values[i]))
        corrected[i] = highest
    return corrected


def seeds_needed(deviation: float, effect: float, *, level: float, power: float) -> int | None:
    """The number of seeds with which a paired t-test finds an effect.

    Args:
        deviation: standard deviation over seeds of the difference.
        effect: the mean difference to find.
        level: of the two-sided test.
        power: the probability with which it is found.

    Returns:
        The number; None if ``deviation`` is NaN, or more than ten thousand are needed.

    Example:
        >>> seeds_needed(0.02, 0.02, level=0.05, power=0.8)  # d = 1
        10

    Source: Cohen, Statistical Power Analysis for the Behavioral Sciences, 1988, chapter 2.
    """
    from scipy.stats import nct, t

    if math.isnan(deviation):
        return None

    def found(n: int) -> float:
        threshold = t.ppf(1 - level / 2, n - 1)
        shift = effect * math.sqrt(n) / max(deviation, 1e-12)
        return float(1 - nct.cdf(threshold, n - 1, shift) + nct.cdf(-threshold, n - 1, shift))

    low, high = 1, 2
    while found(high) < power:
        low, high = high, high * 2
        if high > _MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if found(middle) >= power else (middle, high)
    return high


def _points(dice: Array) -> tuple[float, float]:
    by_subset = dice.mean(1)
    return float(by_subset.mean()), float(by_subset.min(1).mean())


def _interval(point: float, drawn: Array, scores: MethodScores) -> Interval:
    low, high = (float(end) for end in np.percentile(drawn, (2.5, 97.5)))
    if len(scores.cases) < 2:
        low = high = math.nan
    return Interval(point, low, high, len(scores.cases))
