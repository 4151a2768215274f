"""``prism-meta cases`` finds each fault of the cases that ``prism-meta train`` would stop at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from commands import errors, run

from broken import Broken, cases, layouts, tables
from broken.test_broken import files

#: Data sets and availability tables that ``train`` refuses.
BROKEN = [
    broken
    for kind in (cases, layouts, tables)
    for broken in kind.BROKEN
    if not broken.name.startswith(("predict, ", "evaluate, "))
]
#: One in so many runs also where slow tests do not: all of them take three minutes.
QUICK = 20


def surveying(arguments: Sequence[object]) -> list[object]:
    """The command that looks for the faults before the training with these arguments."""
    command, root, out, _, *options = arguments
    assert (command, out) == ("train", "--out")
    return ["cases", root, *options]


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(broken, id=broken.name, marks=[pytest.mark.slow] if k % QUICK else [])
        for k, broken in enumerate(BROKEN)
    ],
)
def test_training_finds_no_fault_that_cases_did_not(broken: Broken, tmp_path: Path) -> None:
    arguments = broken.command(tmp_path)
    before = files(tmp_path)
    code, output = run(*surveying(arguments))
    assert code == 2, output
    assert "Traceback" not in output
    assert files(tmp_path) == before
    trained = errors(run(*arguments)[1])
    assert trained and set(trained) <= set(errors(output))
