"""``--json`` and ``--quiet`` of every command, and what is written where the output is no terminal."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import errors, run, run_json, settings
from niftis import cut, write_cases
from typer.testing import CliRunner

from prism_meta.cli.commands import COMMANDS, app
from prism_meta.training import progress
from prism_meta.training.progress import progress_bars

ESCAPE = "\x1b"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that held one case out, and is evaluated; the cases are beside it."""
    folder = tmp_path_factory.mktemp("output")
    cases = write_cases(folder / "cases", 3)
    options = settings("training.steps=1", "data.holdout=1")
    assert run("train", cases, "--out", folder / "run", *options)[0] == 0
    assert run("evaluate", folder / "run")[0] == 0
    return folder / "run"


#: The words of each command after its name, from the run, its cases and a new folder; some of its keys.
REPORTING: dict[str, tuple[Callable[[Path, Path, Path], list[object]], set[str]]] = {
    "cases": (lambda run, cases, out: [cases, *settings()], {"layout", "cases", "faults"}),
    "plan": (
        lambda run, cases, out: [cases, "--out", out / "plan.toml", "--memory", "1.2GB"],
        {"config", "settings", "choices", "memory"},
    ),
    "train": (
        lambda run, cases, out: [cases, "--out", out / "b", *settings("training.steps=1")],
        {"runs"},
    ),
    "adapt": (
        lambda run, cases, out: [run, cases, "--out", out / "c", "--steps", 1, "--lr", 0.001],
        {"run", "adaptation"},
    ),
    "profile": (
        lambda run, cases, out: [run, "--only", "predict", "--subsets", "t1", "--repeats", 2],
        {"run", "machine", "prediction", "training"},
    ),
    "evaluate": (
        lambda run, cases, out: [run, "--out", out / "report"],
        {"run", "report", "summary", "clean_up", "faults"},
    ),
    "predict": (lambda run, cases, out: [run, cases, out / "labels"], {"labels", "table"}),
    "compare": (lambda run, cases, out: [run, run], {"reference", "averages", "changes"}),
    "report": (lambda run, cases, out: [run, run, "--out", out / "runs.html"], {"page"}),
    "export": (
        lambda run, cases, out: [run, "--out", out / "hub", "--format", "hub"],
        {"out", "formats"},
    ),
    "doctor": (lambda run, cases, out: [], {"version", "machine", "packages", "self_test"}),
}


@pytest.mark.usefixtures("memory_by_voxels")
@pytest.mark.parametrize("command", REPORTING)
def test_json_is_one_object_and_quiet_is_quiet(trained: Path, tmp_path: Path, command: str) -> None:
    arguments, keys = REPORTING[command]
    words = [command, *arguments(trained, trained.parent / "cases", tmp_path)]
    code, found, notes = run_json(*words, "--quiet")
    assert code == 0, notes
    assert keys <= found.keys()
    assert notes == ""


def test_every_command_reports_something() -> None:
    """The demo reports what its parts do; test_ablate_command.py runs a study."""
    assert {*REPORTING, "demo", "ablate"} == {*COMMANDS}


def test_files_that_are_reported_exist(trained: Path, tmp_path: Path) -> None:
    cases = trained.parent / "cases"
    _, found, _ = run_json("predict", trained, cases, tmp_path / "labels")
    assert [Path(file).name for file in found["labels"]] == [f"p{k}.nii.gz" for k in range(3)]
    assert all(Path(file).is_file() for file in (*found["labels"], found["table"]))
    out = tmp_path / "runs"
    fold = ["train", cases, "--out", out, "--fold", "0..1", "--folds", "3"]
    _, found, _ = run_json(*fold, *settings("training.steps=1"))
    assert [each["run"] for each in found["runs"]] == [str(out / f"fold{k}") for k in (0, 1)]
    assert all(Path(each["weights"]["last"]).is_file() for each in found["runs"])
    assert [len(each["held_out"]) for each in found["runs"]] == [1, 1]


def test_faults_are_lines_with_json_too(trained: Path, tmp_path: Path) -> None:
    """What was found before a fault is still reported; without anything there is no object."""
    root = write_cases(tmp_path / "cases", 2)
    cut(root / "p1" / "p1_t1.nii.gz")
    code, found, notes = run_json("evaluate", trained, root, "--out", tmp_path / "report")
    assert code == 2 and found["faults"] == errors(notes) and len(found["faults"]) == 1
    assert run_json("evaluate", tmp_path)[:2] == (2, None)


def test_notes_and_progress_are_on_standard_error(trained: Path, tmp_path: Path) -> None:
    words = ["predict", trained, trained.parent / "cases", tmp_path / "labels"]
    first, again = (CliRunner().invoke(app, [*map(str, words)]) for _ in range(2))
    assert first.stdout == again.stdout == f"3 label volumes in {tmp_path / 'labels'}\n"
    assert "predict: 3 of 3  p2" in first.stderr
    assert "3 of 3 cases were predicted before" in again.stderr
    quiet = CliRunner().invoke(app, [*map(str, words), "-q"])
    assert (quiet.stdout, quiet.stderr) == (first.stdout, "")


class _Stream(io.StringIO):
    """A terminal, or a file."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def shown(monkeypatch: pytest.MonkeyPatch, *, terminal: bool, **environment: str) -> str:
    """What progress writes to such a stream."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", _Stream(terminal=terminal))
    with progress_bars("prepare", "train") as advance:
        for step in range(1, 4):
            advance(step, 3, "case [a]", task="train")
    return sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_bars_move_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    bar = shown(monkeypatch, terminal=True)
    assert ESCAPE in bar and "━" in bar
    for text in (
        shown(monkeypatch, terminal=False),
        shown(monkeypatch, terminal=True, TERM="dumb"),
    ):
        assert text == "train: 3 of 3  case [a]  0 s\n"


def test_lines_come_at_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", _Stream(terminal=False))
    with progress_bars("train") as advance:
        for step in range(1, 31):
            now[0] += 1.0
            advance(step, 30, "")
    lines = sys.stderr.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines == [f"train: {k} of 30  {k} s" for k in (10, 20, 30)]


def in_terminal(*words: str, **environment: str) -> str:
    """What the command line writes to a pseudo-terminal."""
    import pty

    there, here = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", **environment}
    for name in {"NO_COLOR", "FORCE_COLOR"} - environment.keys():
        env.pop(name, None)
    with subprocess.Popen(
        [sys.executable, "-m", "prism_meta", *words], stdin=here, stdout=here, stderr=here, env=env
    ) as process:
        os.close(here)
        parts = []
        with os.fdopen(there, "rb") as terminal:
            while True:
                try:
                    part = terminal.read1()
                except OSError:  # Linux says so that the other end is closed
                    break
                if not part:
                    break
                parts.append(part)
    assert process.returncode == 0
    return b"".join(parts).decode()


def colours(text: str) -> bool:
    """Whether a foreground colour is set, and not only bold or dim."""
    return any(f"{ESCAPE}[{style}3{n}m" in text for style in ("", "1;", "2;") for n in range(8))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
def test_colours_need_a_terminal_and_can_be_switched_off() -> None:
    assert colours(in_terminal("--help"))
    assert not colours(in_terminal("--help", NO_COLOR="1"))
    assert ESCAPE not in in_terminal("--help", TERM="dumb")


def test_no_escapes_in_a_pipe() -> None:
    env: dict[str, Any] = {**os.environ, "TERM": "xterm-256color"}
    for name in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS"):
        env.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "prism_meta", "--help"], capture_output=True, env=env, check=True
    )
    assert ESCAPE.encode() not in done.stdout and not done.stderr
