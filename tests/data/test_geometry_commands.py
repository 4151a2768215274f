"""The commands on stacks of slices, with the default spacing and patch sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from commands import errors, run
from niftis import save
from stacks import STACKS, Stack, oblique

pytestmark = pytest.mark.usefixtures("without_drawing")

NAMES = ("bssfp", "lge", "t2")
CARDIAC = Stack((120, 90, 8), oblique((120, 90, 8), (1.2, 1.2, 10.0)), 2)
SLICES: tuple[str, ...] = ()
VOLUMES = ("data.patch=[64,64,64]", "data.batch_size=1", "model.depth=4")
#: (qform code, sform code) of the files.
CODES = {"both": (1, 1), "qform only": (1, 0), "sform only": (0, 2), "none": (0, 0)}


def options(*extra: str) -> list[str]:
    given = (
        f"data.modalities={json.dumps(NAMES)}", "data.labels={lesion=1}", "data.batch_size=2",
        "model.width=2", "model.depth=2", "training.steps=2", *extra,
    )  # fmt: skip
    return [part for value in given for part in ("--set", value)]


def write(root: Path, stack: Stack, *, codes: tuple[int, int] = (1, 1), count: int = 2) -> Path:
    """Cases whose headers have these codes; the last one lacks a modality."""
    for k in range(count):
        folder = stack.write(root / f"p{k}", radius=14.0, modalities=NAMES, seed=100 * k)
        for path in folder.iterdir():
            image = nib.load(path)
            affine = image.affine
            image.set_qform(affine, code=codes[0])
            image.set_sform(affine, code=codes[1])
            nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, image.header), path)
    (root / f"p{count - 1}" / "t2.nii.gz").unlink()
    return root


def through(tmp_path: Path, root: Path, *extra: str) -> Path:
    """Train, evaluate and predict; returns the folder of predictions."""
    trained, labels = tmp_path / "run", tmp_path / "labels"
    code, output = run("train", root, "--out", trained, *options(*extra))
    assert code == 0, output
    code, output = run("evaluate", trained, root)
    assert code == 0, output
    records = (trained / "evaluation" / "records.csv").read_text().splitlines()
    assert len(records) == 1 + 7 + 3  # every subset of three modalities, and of two
    code, output = run("predict", trained, root, labels)
    assert code == 0, output
    return labels


def assert_on_grid(written: Path, source: Path) -> None:
    predicted, given = nib.load(written), nib.load(source)
    assert predicted.shape == given.shape
    for name in (
        "qform_code",
        "sform_code",
        "srow_x",
        "srow_y",
        "srow_z",
        "qoffset_x",
        "quatern_b",
    ):
        np.testing.assert_array_equal(predicted.header[name], given.header[name], err_msg=name)
    np.testing.assert_array_equal(predicted.header["pixdim"][:4], given.header["pixdim"][:4])
    np.testing.assert_array_equal(predicted.affine, given.affine)


@pytest.mark.parametrize("sizes", [SLICES, VOLUMES], ids=["slices", "volumes"])
def test_a_cardiac_set(tmp_path: Path, sizes: tuple[str, ...]) -> None:
    root = write(tmp_path / "cases", CARDIAC)
    labels = through(tmp_path, root, *sizes)
    for name in ("p0", "p1"):
        assert_on_grid(labels / f"{name}.nii.gz", root / name / "lge.nii.gz")


@pytest.mark.parametrize("codes", CODES)
def test_header_codes_are_kept(tmp_path: Path, codes: str) -> None:
    root = write(tmp_path / "cases", STACKS["short-axis"], codes=CODES[codes])
    labels = through(tmp_path, root)
    assert_on_grid(labels / "p0.nii.gz", root / "p0" / "bssfp.nii.gz")
    header = nib.load(labels / "p0.nii.gz").header
    assert (int(header["qform_code"]), int(header["sform_code"])) == CODES[codes]


@pytest.mark.parametrize("name", STACKS)
def test_every_stack(tmp_path: Path, name: str) -> None:
    root = write(tmp_path / "cases", STACKS[name])
    labels = through(tmp_path, root, "data.spacing=[3,3,5]")
    assert_on_grid(labels / "p1.nii.gz", root / "p1" / "bssfp.nii.gz")


def _misaligned(root: Path) -> Path:
    """The LGE images of a set on thicker slices that are moved and turned a little."""
    stack = STACKS["short-axis"]
    write(root, stack)
    turn: Any = nib.eulerangles.euler2mat(0.05, 0.02)
    affine = np.eye(4)
    affine[:3, :3] = turn @ stack.affine[:3, :3] @ np.diag([1.1, 1.1, 1.0])
    affine[:3, 3] = stack.affine[:3, 3] + [2.0, -1.0, 3.0]
    for k in range(2):
        image = np.random.default_rng(k).normal(100, 5, (56, 42, 8)).astype(np.float32)
        save(image, root / f"p{k}" / "lge.nii.gz", affine)
    return root


def test_files_on_other_grids(tmp_path: Path) -> None:
    root = _misaligned(tmp_path / "cases")
    code, output = run("train", root, "--out", tmp_path / "refused", *options())
    assert (code, errors(output)) == (
        2,
        [
            f"case p{k}: lge.nii.gz has shape (56, 42, 8), but bssfp.nii.gz has (60, 45, 8); resample "
            'them to one grid, or use align = "resample" (set data.align)'
            for k in range(2)
        ],
    )
    labels = through(tmp_path, root, "data.align=resample")
    for k in range(2):
        assert_on_grid(labels / f"p{k}.nii.gz", root / f"p{k}" / "bssfp.nii.gz")
    assert not (tmp_path / "refused").exists()


def test_labels_on_the_grid_of_one_modality(tmp_path: Path) -> None:
    root = _misaligned(tmp_path / "cases")
    labels = through(tmp_path, root, "data.align=resample")
    trained = tmp_path / "run"
    code, output = run("predict", trained, root, tmp_path / "lge", "--grid", "lge")
    assert code == 0, output
    for k in range(2):
        assert_on_grid(tmp_path / "lge" / f"p{k}.nii.gz", root / f"p{k}" / "lge.nii.gz")
    code, output = run("predict", trained, root, tmp_path / "first", "--grid", "bssfp")
    assert code == 0, output  # the grid that is taken without the option
    for k in range(2):
        same = [nib.load(folder / f"p{k}.nii.gz") for folder in (labels, tmp_path / "first")]
        np.testing.assert_array_equal(*(np.asarray(image.dataobj) for image in same))
    code, output = run("predict", trained, root, tmp_path / "t2", "--grid", "t2")
    assert (code, errors(output)) == (
        2, ["case p1: has no t2, on whose grid its labels should lie; leave --grid out"]
    )  # fmt: skip
    assert [path.name for path in (tmp_path / "t2").glob("*.nii.gz")] == ["p0.nii.gz"]
    code, output = run("predict", trained, root, tmp_path / "t9", "--grid", "t9")
    assert (code, errors(output)) == (
        2, ["grid: unknown modality t9; use one of bssfp, lge, t2"]
    )  # fmt: skip
    assert not (tmp_path / "t9").exists()
