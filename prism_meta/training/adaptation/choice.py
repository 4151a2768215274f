"""The rate and the length of an adaptation, chosen by held-out cases, and whether to adapt at all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import NamedTuple


class Setting(NamedTuple):
    """How long to adapt, and how fast.

    Args:
        lr: the rate of Adam.
        steps: number of steps.
    """

    lr: float
    steps: int

    def __str__(self) -> str:
        return f"{self.steps} step{'' if self.steps == 1 else 's'} at a rate of {self.lr:g}"


@dataclass(frozen=True)
class HeldOut:
    """What the others teach about cases that were held out: the cases of one patient, as a rule.

    Args:
        cases: their names.
        before: mean Dice of the model as it is, in [0, 1].
        after: setting -> mean Dice after an adaptation to all other cases.
    """

    cases: tuple[str, ...]
    before: float
    after: Mapping[Setting, float]


@dataclass(frozen=True)
class Compared:
    """The Dice of held-out cases without and with an adaptation.

    Args:
        cases: their names.
        setting: that which is best on all other held-out cases.
        before: mean Dice without an adaptation, in [0, 1].
        after: mean Dice with it, at this setting.
    """

    cases: tuple[str, ...]
    setting: Setting
    before: float
    after: float

    @property
    def gain(self) -> float:
        """``after - before``."""
        return self.after - self.before


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why.

    Args:
        setting: the rate and the length; None keeps the weights as they are.
        reason: one sentence.
        compared: held-out cases without and with an adaptation; empty if none was held out.
        held_out: the Dice of every setting that was tried.
    """

    setting: Setting | None
    reason: str
    compared: tuple[Compared, ...] = ()
    held_out: tuple[HeldOut, ...] = ()


def choose(held_out: Sequence[HeldOut]) -> Choice:
    """Choose the setting with the best mean Dice on held-out cases, if adapting is better than not adapting.

    Of settings with the same Dice the shortest one is chosen, then that of the lowest rate. A setting that
    is the best of many on a few cases owes a part of that to chance. So the gain g_i of held-out cases i is
    measured at the setting that is best on all other held-out cases. The model is adapted only if the mean
    gain is larger than its standard error,

        mean(g) > sd(g) / sqrt(n),

    with the standard deviation of n - 1 degrees of freedom. Otherwise the weights stay as they are.

    Args:
        held_out: two or more, with the same settings.

    Raises:
        ValueError: there are fewer than two, or their settings differ.

    Source: cross-validation with the choice inside, Stone 1974; a standard error as the threshold, Breiman
    et al., Classification and Regression Trees, 1984, section 3.4.3.

    Example:
        >>> a, b = Setting(1e-3, 10), Setting(1e-3, 20)
        >>> chosen = choose(
        ...     [HeldOut(("p0",), 0.4, {a: 0.5, b: 0.6}), HeldOut(("p1",), 0.5, {a: 0.6, b: 0.6})]
        ... )
        >>> chosen.setting
        Setting(lr=0.001, steps=20)
        >>> [round(one.gain, 6) for one in chosen.compared]
        [0.1, 0.1]
        >>> choose([HeldOut(("p0",), 0.4, {a: 0.7}), HeldOut(("p1",), 0.5, {a: 0.4})]).setting is None
        True
    """
    if len(held_out) < 2 or len({frozenset(one.after) for one in held_out}) != 1:
        raise ValueError(
            f"held_out: got {len(held_out)}, expected at least two with the same settings"
        )
    compared = tuple(
        _compare(one, [other for other in held_out if other is not one]) for one in held_out
    )
    mean, error = mean_and_error([one.gain for one in compared])
    best = _best(held_out)
    told = f"{100 * mean:+.1f} Dice points on held-out cases, standard error {100 * error:.1f}"
    if mean > error:
        return Choice(best, f"adapting changes {told}", compared, tuple(held_out))
    reason = f"adapting changes {told}, which is not more than its error"
    return Choice(None, reason, compared, tuple(held_out))


def mean_and_error(gains: Sequence[float]) -> tuple[float, float]:
    """The mean of two or more numbers, and its standard error.

    Example:
        >>> mean_and_error([1.0, 3.0])
        (2.0, 1.0)
    """
    return fmean(gains), stdev(gains) / math.sqrt(len(gains))


def _best(held_out: Sequence[HeldOut]) -> Setting:
    means = {
        setting: fmean(one.after[setting] for one in held_out) for setting in held_out[0].after
    }
    return min(means, key=lambda setting: (-means[setting], setting.steps, setting.lr))


def _compare(one: HeldOut, others: Sequence[HeldOut]) -> Compared:
    setting = _best(others)
    return Compared(one.cases, setting, one.before, one.after[setting])
