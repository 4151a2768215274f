"""The statistics and the page of a study."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from prism_meta.errors import PrismError
from prism_meta.report.study.page import FILES, write_study_report
from prism_meta.report.study.scores import MethodScores, ScoredRun
from prism_meta.report.study.statistics import (
    CrossedBootstrap,
    averages,
    difference,
    holm,
    seeds_needed,
)
from prism_meta.report.study.table import study_table


def _scores(dice: np.ndarray, seeds: tuple[int, ...] | None = None) -> MethodScores:
    n, cases, subsets = dice.shape
    return MethodScores(
        seeds or tuple(range(n)),
        tuple(f"p{i}" for i in range(cases)),
        tuple(f"s{i}" for i in range(subsets)),
        dice,
    )


def _run(method: str, seed: int, value: float, *, budget: str = "gradients") -> ScoredRun:
    scores = {f"p{i}": {"t1": value, "t2": value / 2} for i in range(3)}
    return ScoredRun(
        method, "all", budget, seed, scores, steps=5, evaluations=10, seconds=2.0 + value
    )


def test_bootstrap_of_one_seed_is_that_of_its_cases() -> None:
    dice = np.random.default_rng(0).random((1, 6, 4))
    mean, worst = CrossedBootstrap(1, 6, seed=3, resamples=500).averages(dice)
    rng = np.random.default_rng(3)
    rng.multinomial(1, [1.0], size=500)
    weights = rng.multinomial(6, np.full(6, 1 / 6), size=500) / 6
    by_hand = weights @ dice[0]
    np.testing.assert_allclose(mean, by_hand.mean(1), atol=1e-12)
    np.testing.assert_allclose(worst, by_hand.min(1), atol=1e-12)


def test_crossed_interval_has_the_variance_of_both_factors() -> None:
    """With dice = a_seed + b_case the variance of the mean is that of both means together."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=40), rng.normal(size=30)
    dice = (a[:, None] + b[None])[..., None]
    mean, _ = CrossedBootstrap(40, 30, resamples=20_000).averages(dice)
    expected = a.var() / 40 + b.var() / 30
    assert mean.var() == pytest.approx(expected, rel=0.05)


def test_a_difference_without_spread_has_an_interval_without_width() -> None:
    dice = np.random.default_rng(2).random((5, 4, 3)) / 2
    found = difference(_scores(dice + 0.25), _scores(dice))
    assert found is not None
    interval = found.averages.mean
    assert interval.mean == pytest.approx(0.25) and interval.low == pytest.approx(0.25)
    assert interval.high == pytest.approx(0.25)


def test_difference_takes_the_shared_seeds_in_their_order() -> None:
    dice = np.arange(6, dtype=float).reshape(3, 2, 1) / 10
    own = _scores(dice[::-1].copy() + 0.1, seeds=(2, 1, 0))
    found = difference(own, _scores(dice[:2], seeds=(0, 1)))
    assert found is not None and found.seeds == 2
    assert found.averages.mean.mean == pytest.approx(0.1)
    assert difference(own, _scores(dice[:1], seeds=(7,))) is None


def test_worst_subset_is_that_of_each_seed() -> None:
    dice = np.array([[[0.1, 0.9]], [[0.9, 0.3]]])
    assert averages(_scores(dice)).worst.mean == pytest.approx(0.2)


def test_effect_size_and_p_equal_scipys_paired_test() -> None:
    from scipy.stats import ttest_rel

    rng = np.random.default_rng(4)
    one, two = rng.random((2, 8, 5, 3))
    found = difference(_scores(one), _scores(two))
    assert found is not None
    a, b = one.mean((1, 2)), two.mean((1, 2))
    assert found.p == pytest.approx(ttest_rel(a, b).pvalue, rel=1e-9)
    assert found.effect_size == pytest.approx((a - b).mean() / (a - b).std(ddof=1))


def test_one_seed_has_an_interval_over_cases_and_no_p() -> None:
    own = np.array([0.5, 0.6, 0.7])[None, :, None] * np.ones((1, 3, 2))
    found = difference(_scores(own), _scores(np.full((1, 3, 2), 0.25)))
    assert found is not None
    assert math.isnan(found.p)
    mean = found.averages.mean
    assert (mean.low, mean.mean, mean.high) == pytest.approx((0.25, 0.35, 0.45))


def test_one_case_has_no_interval() -> None:
    found = difference(_scores(np.full((3, 1, 2), 0.5)), _scores(np.full((3, 1, 2), 0.25)))
    assert found is not None and math.isnan(found.averages.mean.low)


def test_holm_leaves_nan_out_and_is_monotone() -> None:
    assert holm([0.02, float("nan"), 0.01]) == [
        0.02,
        pytest.approx(float("nan"), nan_ok=True),
        0.02,
    ]
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize(("d", "n"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_seeds_needed_are_those_of_cohens_tables(d: float, n: int) -> None:
    assert seeds_needed(1.0, d, level=0.05, power=0.8) == n


def test_seeds_needed_ends() -> None:
    assert seeds_needed(float("nan"), 0.1, level=0.05, power=0.8) is None
    assert seeds_needed(1.0, 1e-6, level=0.05, power=0.8) is None
    assert seeds_needed(0.0, 0.1, level=0.05, power=0.8) == 2


def test_folds_of_a_seed_are_one_and_half_a_seed_is_left_out() -> None:
    half = {"p1": {"t1": 0.5}}, {"p2": {"t1": 0.7}}
    runs = [ScoredRun("a", "all", "gradients", seed, part) for seed in (0, 1) for part in half]
    assert MethodScores.of(runs).dice.shape == (2, 2, 1)
    assert MethodScores.of(runs[:3]).seeds == (0,)


def test_cases_from_other_subsets_are_refused() -> None:
    runs = [ScoredRun("a", "all", "gradients", 0, {"p1": {"t1": 0.5}, "p2": {"t2": 0.5}})]
    message = (
        "a, seed 0: case p2 was tested from other subsets than case p1; use cases with the same "
        "modalities"
    )
    with pytest.raises(PrismError) as error:
        MethodScores.of(runs)
    assert str(error.value) == message


def test_a_budget_is_compared_with_the_reference_at_equal_gradients() -> None:
    runs = [_run("one", seed, 0.4) for seed in (0, 1)]
    runs += [_run("two", seed, 0.6, budget="time") for seed in (0, 1)]
    first, second = study_table(runs, reference="one", base="gradients")
    assert [row.method for row in first.rows] == ["one"]
    assert [row.method for row in second.rows] == ["one", "two"]
    against = second.rows[1].against
    assert against is not None and against.averages.mean.mean == pytest.approx(0.15)
    assert second.rows[1].time == pytest.approx(2.6 / 2.4)


def test_few_seeds_mark_no_difference(tmp_path: Path) -> None:
    marked = []
    for count in (4, 5):
        runs = [_run(n, s, 0.4 + 0.1 * (n == "two")) for n in ("one", "two") for s in range(count)]
        write_study_report(tmp_path, runs, title="A", reference="one", base="gradients")
        marked.append("+7.5 (+7.5 to +7.5)*" in (tmp_path / "study.md").read_text())
    assert marked == [False, True]


def test_page_markdown_and_csv_have_the_same_rows(tmp_path: Path) -> None:
    runs = [
        _run(name, s, 0.4 + 0.1 * (name == "t<o")) for name in ("one", "t<o") for s in (0, 1, 2)
    ]
    page = write_study_report(tmp_path, runs, title="A & B", reference="one", base="gradients")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    html = page.read_text()
    assert "t&lt;o" in html and "A &amp; B" in html and "t<o" not in html
    rows = list(csv.DictReader((tmp_path / "study.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == ["one", "t<o"]
    assert float(rows[1]["mean_difference"]) == pytest.approx(0.075)
    assert "| t<o | 3 | 5 | 10 |" in (tmp_path / "study.md").read_text()
