"""The choice of an adaptation: closed forms of the rule."""

from __future__ import annotations

import math

import pytest

from prism_meta.training.adaptation.choice import HeldOut, Setting, choose, mean_and_error

SHORT, LONG, FAST = Setting(1e-3, 10), Setting(1e-3, 20), Setting(3e-3, 10)


def held_out(*rows: tuple[float, dict[Setting, float]]) -> list[HeldOut]:
    return [HeldOut((f"p{k}",), before, after) for k, (before, after) in enumerate(rows)]


def gains(*values: float) -> list[HeldOut]:
    """Cases with these gains at the only setting."""
    return held_out(*((0.4, {SHORT: 0.4 + value}) for value in values))


def test_mean_and_error() -> None:
    values = [0.1, 0.2, 0.6]
    mean, error = mean_and_error(values)
    variance = sum((v - 0.3) ** 2 for v in values) / 2
    assert mean == pytest.approx(0.3, abs=1e-15)
    assert error == pytest.approx(math.sqrt(variance / 3), abs=1e-15)


@pytest.mark.parametrize(
    ("values", "adapts"),
    [
        ((0.1, 0.1), True),  # no error
        ((0.0, 0.0), False),  # no gain
        ((-0.1, -0.1), False),
        ((0.3, -0.1), False),  # mean 0.1, error 0.2
        ((0.3, 0.1), True),  # mean 0.2, error 0.1
        ((0.25, 0.0), False),  # both 0.125: not more than its error
        ((0.2, 0.0, 0.1), True),  # mean 0.1, error 0.0577
        ((0.2, -0.1, 0.0), False),  # mean 0.0333, error 0.0882
    ],
)
def test_it_adapts_if_the_mean_gain_is_more_than_its_error(
    values: tuple[float, ...], adapts: bool
) -> None:
    assert (choose(gains(*values)).setting is not None) == adapts


def test_the_setting_with_the_best_mean_is_chosen() -> None:
    rows = held_out(
        (0.1, {SHORT: 0.5, LONG: 0.6, FAST: 0.7}),
        (0.1, {SHORT: 0.5, LONG: 0.6, FAST: 0.2}),
        (0.1, {SHORT: 0.5, LONG: 0.6, FAST: 0.7}),
    )
    assert choose(rows).setting == LONG


def test_of_equal_ones_the_shortest_and_then_the_slowest_is_chosen() -> None:
    after = {LONG: 0.6, FAST: 0.6, SHORT: 0.6}
    assert choose(held_out((0.1, after), (0.2, after))).setting == SHORT


def test_a_case_is_measured_at_the_setting_that_is_best_on_the_others() -> None:
    rows = held_out(
        (0.4, {SHORT: 0.9, LONG: 0.5}),
        (0.4, {SHORT: 0.5, LONG: 0.6}),
        (0.4, {SHORT: 0.5, LONG: 0.7}),
    )
    choice = choose(rows)
    # Means of the others: (0.5, 0.65), (0.7, 0.6), (0.7, 0.55).
    assert [one.setting for one in choice.compared] == [LONG, SHORT, SHORT]
    assert [one.gain for one in choice.compared] == pytest.approx([0.1, 0.1, 0.1], abs=1e-12)
    assert choice.setting == SHORT  # means of all: 0.633, 0.6


def test_a_setting_that_is_best_by_chance_does_not_count_for_the_case_that_made_it_best() -> None:
    """Each of many settings helps one case and harms the others; the best mean is above 'before'."""
    settings = [Setting(1e-3, 10 * k) for k in (1, 2, 3)]
    rows = held_out(*((0.4, {s: 0.9 if s == own else 0.3 for s in settings}) for own in settings))
    assert max(sum(row.after[s] for row in rows) / 3 for s in settings) > 0.4
    choice = choose(rows)
    assert choice.setting is None
    assert [one.gain for one in choice.compared] == pytest.approx([-0.1] * 3, abs=1e-12)


def test_the_reason_has_the_numbers() -> None:
    assert choose(gains(0.3, 0.1)).reason == (
        "adapting changes +20.0 Dice points on held-out cases, standard error 10.0"
    )
    assert choose(gains(0.3, -0.1)).reason == (
        "adapting changes +10.0 Dice points on held-out cases, standard error 20.0, which is not more than "
        "its error"
    )


def test_one_case_or_other_settings_are_refused() -> None:
    rows = held_out((0.4, {SHORT: 0.5}), (0.4, {LONG: 0.5}))
    for wrong in (rows, rows[:1]):
        with pytest.raises(ValueError, match=f"held_out: got {len(wrong)}, expected at least two"):
            choose(wrong)


def test_a_setting_reads_as_text() -> None:
    assert (str(SHORT), str(Setting(0.0005, 1))) == (
        "10 steps at a rate of 0.001",
        "1 step at a rate of 0.0005",
    )
