"""Commands and configurations in the README and in docs/*.md: options, settings and shell syntax exist."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from test_examples import PAGES

from prism_meta.cli.commands import app
from prism_meta.training.config import load_config
from prism_meta.training.study.schema import read_study

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def blocks(*languages: str) -> list[Any]:
    """The blocks of some languages on all pages."""
    pattern = re.compile(rf"```(?:{'|'.join(languages)})\n(.*?)```", re.DOTALL)
    found = [
        pytest.param(block, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, block in enumerate(pattern.findall(page.read_text(encoding="utf-8")))
    ]
    assert found
    return found


def commands(block: str) -> list[list[str]]:
    """The words after ``prism-meta`` or ``-m prism_meta`` of every such line."""
    lines = block.replace("\\\n", " ").splitlines()
    calls = [re.match(r"(?:srun |torchrun .*-m )?prism[-_]meta\s+(\w.*)", line) for line in lines]
    return [shlex.split(call[1], comments=True) for call in calls if call is not None]


@pytest.mark.parametrize("block", blocks("sh", "bash"))
def test_a_shell_block_has_no_syntax_error(block: str, tmp_path: Path) -> None:
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    script = tmp_path / "block.sh"
    script.write_text(block, encoding="utf-8")
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", blocks("sh", "bash"))
def test_commands_and_their_options_exist(block: str) -> None:
    for words in commands(block):
        assert words[0] in COMMANDS, words
        known = {name for param in COMMANDS[words[0]].params for name in param.opts}
        for word in words[1:]:
            assert not word.startswith("-") or word in known, f"{words[0]} has no option {word}"
        pairs = pairwise(words)
        settings = [value for option, value in pairs if option in ("-s", "--set")]
        load_config(overrides=settings)


@pytest.mark.parametrize("block", blocks("toml"))
def test_a_toml_block_is_a_configuration(block: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(block, encoding="utf-8")
    if "[[methods]]" in block:
        assert read_study(path).methods
    else:
        load_config(path)


def test_the_cluster_script_is_read() -> None:
    """So that the tests above do not pass because they find nothing."""
    (page,) = (page for page in PAGES if page.stem == "clusters")
    found = commands(page.read_text(encoding="utf-8"))
    assert ["train", "--resume", "runs/eight"] in found
    assert any("--time-limit" in words for words in found)
    assert sum("fabric.nodes=2" in " ".join(words) for words in found) == 1
