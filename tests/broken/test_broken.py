"""Every broken input is refused alike: code 2, a line per fault with its fix, and nothing is left over."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import run

from broken import Broken, cases, commands, configs, layouts, predictions, records, runs, tables

KINDS = (cases, commands, configs, layouts, predictions, records, runs, tables)
BROKEN = [broken for kind in KINDS for broken in kind.BROKEN]


def files(folder: Path) -> dict[str, bytes | None]:
    """All files and folders with their content; not the cache of prepared cases, which is kept."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        assert ".partial" not in name, f"half-written: {name}"
        if ".prism-meta-cache" not in name:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


@pytest.mark.usefixtures("without_drawing", "without_metrics", "checked_once")
@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_a_broken_input_is_refused(broken: Broken, tmp_path: Path) -> None:
    arguments = broken.command(tmp_path)
    before = files(tmp_path)
    code, output = run(*arguments)
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 2, output
    assert "Traceback" not in output
    assert lines and all("; " in line for line in lines), output
    for part in broken.says:
        assert part in "\n".join(lines)
    after = files(tmp_path)
    if broken.keeps:
        assert before.items() <= after.items()
    else:
        assert after == before


def test_names_are_different() -> None:
    names = [broken.name for broken in BROKEN]
    assert len(set(names)) == len(names)
