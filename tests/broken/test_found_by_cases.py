"""``prism-meta cases`` finds each fault of cases that another command would stop at or leave out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from commands import errors, run

from broken import Broken, cases, layouts, tables
from broken.test_broken import files

pytestmark = pytest.mark.slow

#: Data sets and availability tables that a command refuses. Evaluation and prediction meet the same damages
#: as training, so that of these only damaged labels are tried.
BROKEN = [
    broken
    for kind in (cases, layouts, tables)
    for broken in kind.BROKEN
    if not broken.name.startswith(("predict, ", "evaluate, ")) or "label" in broken.name
    # Of the 24 bits that test_broken flips in a file, a few.
    if not re.search(r"bit \d*[1-7,9] of 24", broken.name)
]
#: One in so many meets the later command, too.
LATER = 20


def surveying(arguments: Sequence[object]) -> list[object]:
    """The command that looks for the faults before the command with these arguments."""
    if arguments[0] == "train":
        _, root, out, _, *options = arguments
        assert out == "--out"
        return ["cases", root, *options]
    _, run_folder, root, *_ = arguments
    return ["cases", root, "--config", Path(str(run_folder)) / "config.toml"]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_the_faults_of_later_commands_are_found(broken: Broken, tmp_path: Path) -> None:
    arguments = broken.command(tmp_path)
    before = files(tmp_path)
    code, output = run(*surveying(arguments))
    assert code == 2, output
    assert "Traceback" not in output
    assert files(tmp_path) == before
    for part in broken.says:
        assert part in "\n".join(errors(output))


@pytest.mark.parametrize(
    "broken",
    [
        *BROKEN[::LATER],
        *(broken for broken in BROKEN if broken.name.startswith(("evaluate, ", "folders: "))),
    ],
    ids=lambda broken: broken.name,
)
def test_no_later_command_finds_a_fault_that_cases_did_not(broken: Broken, tmp_path: Path) -> None:
    arguments = broken.command(tmp_path)
    found = errors(run(*surveying(arguments))[1])
    later = errors(run(*arguments)[1])
    assert later
    for fault in later:  # the keys of a trained run cannot be set, so that evaluation names none
        assert any(one.startswith(fault) for one in found), fault
