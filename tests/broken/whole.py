"""Whole inputs, to be broken: copies of cases and of a run, which are made once per process."""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from pathlib import Path

from commands import run, settings
from niftis import write_cases

#: Options of ``train`` for the cases below.
SETTINGS = settings("training.steps=2")


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@cache
def _cases() -> Path:
    return write_cases(Path(_folder().name) / "cases", 3)


@cache
def _run() -> Path:
    out = Path(_folder().name) / "run"
    options = settings("training.steps=2", "data.holdout=1")
    code, output = run("train", _cases(), "--out", out, *options)
    assert code == 0, output
    return out


def cases(folder: Path) -> Path:
    """Three complete cases p0, p1, p2 in ``folder / "cases"``, whose files are p0/p0_flair.nii.gz etc."""
    return Path(shutil.copytree(_cases(), folder / "cases"))


def trained(folder: Path) -> Path:
    """A run of two steps in ``folder / "run"``, with one case held out. Its cases lie elsewhere."""
    return Path(shutil.copytree(_run(), folder / "run"))


def train(folder: Path, root: Path, *options: object) -> list[object]:
    """The arguments that train on ``root`` for two steps and write ``folder / "out"``."""
    return ["train", root, "--out", folder / "out", *SETTINGS, *options]
