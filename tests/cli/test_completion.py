"""Completion in a shell: commands, options, run folders and keys of the configuration."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prism_meta.cli.commands import COMMANDS, app
from prism_meta.cli.completing import complete_key, complete_run
from prism_meta.training.config import Config

PROGRAM = "from prism_meta.cli import main\nmain()\n"


def completed(words: str) -> list[str]:
    """What bash is offered for the last word."""
    env = {
        "_PRISM_META_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    return CliRunner().invoke(app, env=env, prog_name="prism-meta").stdout.split()


def test_commands_and_options_are_completed() -> None:
    assert completed("prism-meta ") == [*COMMANDS]
    assert completed("prism-meta ev") == ["evaluate"]
    assert completed("prism-meta evaluate --we") == ["--weights"]
    assert completed("prism-meta evaluate --js") == ["--json"]


def test_run_folders_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("runs/a", "runs/b", "top"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "run.json").touch()
    (tmp_path / "runs" / "cases").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert complete_run("") == complete_run("to") == ["top"]
    assert complete_run("runs/") == ["runs/a", "runs/b"]
    assert complete_run("~/runs/b") == ["~/runs/b"]
    assert complete_run(f"{tmp_path}/t") == [f"{tmp_path}/top"]
    assert complete_run("none/") == complete_run("~nobody-here/") == complete_run("r") == []
    assert completed("prism-meta predict runs/") == ["runs/a", "runs/b"]
    assert completed("prism-meta compare runs/a ru") == []


def test_keys_are_completed() -> None:
    keys = complete_key("")
    assert {"seed=", "training.steps=", "meta.strategy=", "data.patch="} <= set(keys)
    assert len(keys) > 60 and all(key.count(".") == 1 or key == "seed=" for key in keys)
    assert {key.partition(".")[0].rstrip("=") for key in keys} == {*Config.model_fields}
    assert completed("prism-meta train cases --set meta.inner_s") == [
        "meta.inner_steps=",
        "meta.inner_state=",
    ]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_is_shown(shell: str) -> None:
    env = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    code = "import sys; sys.argv[0] = 'prism-meta'\n" + PROGRAM
    done = subprocess.run(
        [sys.executable, "-c", code, "--show-completion", shell],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"_PRISM_META_COMPLETE=complete_{shell}" in done.stdout


@pytest.mark.skipif(os.name == "nt" or not shutil.which("bash"), reason="there is no bash")
def test_bash_completes(tmp_path: Path) -> None:
    """The script that bash itself gets, and what it then offers."""
    program = tmp_path / "prism-meta"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {tmp_path}/start.py "$@"\n')
    program.chmod(0o755)
    start = f"import sys\nsys.argv[0] = {str(program)!r}\n{PROGRAM}"
    (tmp_path / "start.py").write_text(start)
    script = """
        eval "$(prism-meta --show-completion)"
        COMP_WORDS=(prism-meta pre); COMP_CWORD=1
        _prism_meta_completion prism-meta
        echo "${COMPREPLY[@]}"
    """
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-c", script], env=env, capture_output=True, text=True, check=True
    )
    assert (done.stdout.strip(), done.stderr) == ("predict", "")
