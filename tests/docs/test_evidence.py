"""The tables of docs/evidence.md are those of the results, and its verdicts follow from the intervals."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from prism_meta.cli.train_command import run_train

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


def test_the_advice_is_the_same_everywhere() -> None:
    """In the README and in the help of ``train``."""
    told = {
        name: " ".join(re.sub(r"[`*\[\]]", "", text).split())
        for name, text in {
            "README": (ROOT / "README.md").read_text(encoding="utf-8"),
            "help": str(run_train.__doc__),
        }.items()
    }
    advice = (
        "Train with one level: no second level was better at equal time in the studies of this project. Use "
        "meta.strategy=first_order to reproduce Meta-Drop, and second_order where a gradient has to pass "
        "through the inner steps, e.g. for learned rates."
    )
    assert all(advice in text for text in told.values()), told["help"]


def test_the_folds_of_one_seed_are_as_many_trainings() -> None:
    row = {"mean_difference_low": "0.01", "mean_difference_high": "0.03", "seeds": "1"}
    assert EVIDENCE["verdict"](row, "mean", +1, folds=5) == "confirmed"
