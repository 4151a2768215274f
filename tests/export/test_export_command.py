"""``prism-meta export``: the folder appears whole or not at all, and nothing is overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import errors, run
from shaken import NETS, shaken_run

from prism_meta.export.folders import whole_folder
from prism_meta.export.formats import FORMATS
from prism_meta.training.run import Run


@pytest.fixture
def made(tmp_path: Path) -> Run:
    return shaken_run(tmp_path / "run", *NETS["unet"], "data.patch=[16, 16]")


def test_several_formats_in_one_folder(made: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # empty
    options = ("--format", "program", "--format", "hub", "--format", "hub")
    assert run("export", made.folder, "--out", out, *options) == (0, f"exported to {out}\n")
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "config.toml", "model.pt2", "preprocessing.json", "run.json", "weights",
    ]  # fmt: skip
    assert out.stat().st_mode == made.folder.stat().st_mode


def test_a_folder_with_files_is_kept(made: Run, tmp_path: Path) -> None:
    code, output = run("export", made.folder, "--out", made.folder, "--format", "hub")
    assert code == 2
    assert errors(output) == [
        f"{made.folder}: holds files already; give another --out, or remove it"
    ]


def test_an_unknown_format(made: Run, tmp_path: Path) -> None:
    code, output = run("export", made.folder, "--out", tmp_path / "out", "--format", "tflite")
    assert code == 2
    assert errors(output) == [
        f"format: got tflite, expected some of {', '.join(FORMATS)}; use them"
    ]


def test_nothing_is_left_of_a_failure(made: Run, tmp_path: Path) -> None:
    made.weights().write_bytes(b"damaged")
    before = sorted(tmp_path.iterdir())
    code, output = run("export", made.folder, "--out", tmp_path / "out", "--format", "program")
    assert code == 2 and "does not fit config.toml" in output
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with (
        pytest.raises(ValueError, match=r"cannot write .*out: file exists"),
        whole_folder(tmp_path / "out"),
    ):
        pass
    assert (tmp_path / "out").read_text() == "mine"


def test_help_has_examples() -> None:
    code, output = run("export", "--help")
    assert code == 0 and "prism-meta export runs/a --out exported" in output
    assert all(name in output for name in FORMATS)
