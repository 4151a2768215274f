"""The commands on folders and files whose names are not UTF-8, as old disks have them."""

from __future__ import annotations

import os
from pathlib import Path

import niftis
from commands import run, settings


def test_names_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    root = tmp_path / os.fsdecode(b"c\xff")
    niftis.write_cases(root, 3)
    for path in list(root.rglob("*_t1.nii.gz")):
        path.rename(path.with_name(os.fsdecode(b"x\xff_t1.nii.gz")))
    folder = tmp_path / "run"
    options = settings("training.steps=1", "data.holdout=1")
    for arguments in (
        ("train", root, "--out", folder, *options),
        ("evaluate", folder),
        ("predict", folder, root, tmp_path / "labels"),
    ):
        code, output = run(*arguments)
        assert code == 0, output
    assert len(list((tmp_path / "labels").glob("*.nii.gz"))) == 3
