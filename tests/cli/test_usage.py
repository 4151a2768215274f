"""Arguments that cannot be read, paths with ``~``, and output that cannot be encoded."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from commands import SMALL, errors, run
from niftis import write_cases

from prism_meta.cli import main
from prism_meta.records import Record, write_records

ENCODINGS = ("ascii", "cp1252", "latin-1", "utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "no such command 'trian'"),
        (["train", "--fast"], "no such option: --fast"),
        (["predict", "run"], "missing argument 'CASES'"),
        (["compare", "a", "b", "--seed", "x"], "invalid value for '--seed'"),
        (["train", "a", "b"], "got unexpected extra argument"),
        (["evaluate", ""], "invalid value for 'RUN': got '', expected a file or folder"),
        (["train", "a\0b"], "got 'a\\x00b', expected a file or folder"),
        (["evaluate", "~nobody-here/run"], "whose home folder is unknown"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_one_line(arguments: list[str], message: str) -> None:
    code, output = run(*arguments)
    (line,) = errors(output)
    assert code == 2
    assert message in line and line.endswith(" --help") and "; see " in line


def test_without_arguments_the_help_is_shown() -> None:
    code, output = run()
    assert code == 2 and "Usage" in output and not errors(output)


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    _, output = run("evaluate", "~/run")
    assert errors(output)[0].startswith(f"{tmp_path}/run: no run in this folder")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_command_writes_in_every_encoding(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that the terminal cannot encode are escaped, and the work that was done is reported."""
    cases = write_cases(tmp_path / "Fälle-≥", 3)
    for folder in list(cases.iterdir()):
        folder.rename(folder.with_name(f"日本-{folder.name}"))
    out = tmp_path / "run-≥"
    options = [part for value in (*SMALL, "data.holdout=1") for part in ("-s", value)]
    commands: list[tuple[int, list[object]]] = [
        (0, ["cases", cases, *options]),
        (0, ["train", cases, "--out", out, *options, "-s", "training.steps=1"]),
        (0, ["profile", out, "--only", "predict", "--subsets", "t1", "--repeats", "2"]),
        (0, ["evaluate", out]),
        (0, ["predict", out, cases, tmp_path / "labels-≥"]),
        (0, ["compare", out, out]),
        (2, ["evaluate", tmp_path / "≥"]),
    ]
    for expected, arguments in commands:
        code, text = _main(monkeypatch, encoding, arguments)
        assert code == expected, text
        shown = "≥" if encoding == "utf-8" else "\\u2265"
        assert shown in "".join(text.split())


def _main(
    monkeypatch: pytest.MonkeyPatch, encoding: str, arguments: list[object]
) -> tuple[int, str]:
    """Exit code and output of the command with standard streams of this encoding."""
    written = io.BytesIO()
    for name in ("stdout", "stderr"):
        stream = io.TextIOWrapper(written, encoding, errors="strict", write_through=True)
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(sys, "argv", ["prism-meta", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
        main()
    return int(ended.value.code or 0), written.getvalue().decode("utf-8", "replace")


def test_a_process_with_ascii_output(tmp_path: Path) -> None:
    records = tmp_path / "≥.csv"
    write_records(records, [Record("日本", "t1", "WT", 0.5, 2.0)])
    ended = subprocess.run(
        [sys.executable, "-m", "prism_meta", "compare", records, records],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert "\\u2265" in "".join(ended.stdout.decode("ascii").split())
