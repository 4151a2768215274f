"""A strategy is one class and one line: the rest of the project reads the registry."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import mlp

import prism_meta as pm
from prism_meta.bilevel.strategies import ALL_STRATEGIES, strategy_named

TESTS = Path(__file__).parents[1]


def test_a_strategy_of_ones_own_passes_the_common_suite() -> None:
    """In a process of its own, where the plugin registers it before the tests are collected."""
    suite = [TESTS / "bilevel" / f"test_{name}.py" for name in ("strategies", "checkpointing")]
    result = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "own_strategy", "-p", "no:cacheprovider",
            "-k", "Halfway", "--durations=0", *map(str, suite),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    passed = re.search(r"(\d+) passed", result.stdout)
    assert result.returncode == 0 and passed, result.stdout[-3000:]
    # As many tests as for a strategy of ours with one way to use it.
    assert int(passed[1]) >= 80
    assert "failed" not in result.stdout and "skipped" not in result.stdout


@pytest.fixture
def halfway() -> Iterator[type[pm.MetaStrategy]]:
    """The same class in this process, registered while a test runs."""
    kinds = list(ALL_STRATEGIES)
    own = importlib.import_module("own_strategy")
    yield pm.register_strategy(own.Halfway)
    ALL_STRATEGIES[:] = kinds


def test_it_stands_in_preflights_table(halfway: type[pm.MetaStrategy]) -> None:
    problem = mlp()
    report = pm.preflight(problem.model, problem.objective, problem.train)
    assert "Halfway" in report.memory and "  Halfway: " in str(report)
    assert strategy_named("halfway") is halfway


def test_names_are_unique() -> None:
    class Other(pm.SingleLevel):
        pass

    with pytest.raises(
        ValueError, match=r"^Other: the name 'single_level' belongs to SingleLevel$"
    ):
        pm.register_strategy(Other)
    assert Other not in ALL_STRATEGIES


def test_a_class_without_a_name_is_refused() -> None:
    class Nameless(pm.FunctionalStrategy):
        def solve(self, *args: object) -> pm.MetaGradient:
            raise NotImplementedError

    with pytest.raises(ValueError, match=r"^Nameless: has no name; set the class attribute name"):
        pm.register_strategy(Nameless)


def test_an_unknown_name_lists_the_known_ones() -> None:
    message = (
        r"^strategy: got 'maml', expected one of single_level, joint, first_order, second_order, reptile, "
        r"finite_difference, implicit$"
    )
    with pytest.raises(ValueError, match=message):
        strategy_named("maml")
