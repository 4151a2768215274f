"""The tables of docs/evidence.md are those of the results, and its verdicts follow from the intervals."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EVIDENCE: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks" / "evidence.py"))


def test_the_tables_are_those_of_the_results() -> None:
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert page.count("<!-- table ") == page.count("<!-- end -->") == len(EVIDENCE["TABLES"])
    assert EVIDENCE["filled"](page) == page


@pytest.mark.parametrize(
    ("low", "high", "seeds", "side", "told"),
    [
        (0.01, 0.03, 10, +1, "confirmed"),
        (0.01, 0.03, 10, -1, "the opposite"),
        (-0.03, -0.01, 5, +1, "the opposite"),
        (-0.03, -0.01, 5, -1, "confirmed"),
        (-0.01, 0.02, 10, +1, "not confirmed"),
        (0.01, 0.03, 4, +1, "too few trainings"),
    ],
)
def test_a_verdict_follows_from_the_interval(
    low: float, high: float, seeds: int, side: int, told: str
) -> None:
    row = {"mean_difference_low": str(low), "mean_difference_high": str(high), "seeds": str(seeds)}
    assert EVIDENCE["verdict"](row, "mean", side) == told


def test_the_folds_of_one_seed_are_as_many_trainings() -> None:
    row = {"mean_difference_low": "0.01", "mean_difference_high": "0.03", "seeds": "1"}
    assert EVIDENCE["verdict"](row, "mean", +1, folds=5) == "confirmed"
