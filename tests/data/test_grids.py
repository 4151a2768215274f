"""Grids of the files of a case: one within a tenth of a voxel, and resampling of the others."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import nibabel as nib
import niftis
import numpy as np
import pytest
import torch
from helpers import faults_of
from niftis import BIG, SHAPE, save

from prism_meta.data.cache import prepare
from prism_meta.data.cases import Case
from prism_meta.data.grids import overlap, resample
from prism_meta.data.labels import LabelSet
from prism_meta.data.layouts.folders import find_cases, load_cases
from prism_meta.data.preprocessing import Preprocessing

NAMES = ("t1", "t2")
THICK = niftis.affine_of((1.0, 1.0, 10.0))
LESION = LabelSet({"lesion": 1})


def turned(affine: Any, angle: float, around: int = 2) -> Any:
    """The same grid, turned around its own first voxel."""
    rotation = nib.eulerangles.euler2mat(**{"zyx"[2 - around]: angle})
    return nib.affines.from_matvec(rotation @ affine[:3, :3], affine[:3, 3])


def ball(affine: Any, shape: tuple[int, ...], centre: Any, radius: float) -> Any:
    """A ball, given in mm, in an image that is 1 elsewhere."""
    indices = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    places = nib.affines.apply_affine(affine, indices)
    return np.where(np.linalg.norm(places - centre, axis=-1) <= radius, 9.0, 1.0)


def write(root: Path, affines: dict[str, Any], shapes: dict[str, Any] | None = None) -> Path:
    """A case whose files have these affines, with a ball at one place of the patient."""
    centre = nib.affines.apply_affine(affines["t1"], [9, 13, 7])
    for name, affine in affines.items():
        image = ball(affine, (shapes or {}).get(name, SHAPE), centre, 5.0)
        stored = (image > 1).astype(np.int16) if name == "seg" else image.astype(np.float32)
        save(stored, root / "p0" / f"{name}.nii.gz", affine)
    return root


# One grid


@pytest.mark.parametrize("move", [(0.02, 0, 0), (0.09, -0.09, 0.9), (0, 0, -0.95)], ids=str)
def test_files_within_a_tenth_of_a_voxel_are_on_one_grid(tmp_path: Path, move: Any) -> None:
    near = THICK.copy()
    near[:3, 3] += move
    (case,) = load_cases(write(tmp_path, {"t1": THICK, "t2": near, "seg": THICK}), NAMES)
    volume = case.read()
    np.testing.assert_array_equal(volume.affine, THICK)
    assert set(volume.images) == set(NAMES) and volume.label is not None


@pytest.mark.parametrize(
    ("other", "off"),
    [
        (niftis.affine_of((1, 1, 10), (-9.2, 5, 31)), 0.2),
        (niftis.affine_of((1, 1, 10), (-9, 5, 33)), 0.2),
        (niftis.affine_of((1.01, 1, 10)), 0.19),  # 19 voxels from the first to the last
        (turned(THICK, 0.02), 0.464),
        (niftis.affine_of((-1, 1, 10)), 38),
    ],
    ids=["across", "along the slices", "voxels", "turned", "mirrored"],
)
def test_files_beyond_it_are_refused_and_the_option_is_named(
    tmp_path: Path, other: Any, off: float
) -> None:
    write(tmp_path, {"t1": THICK, "t2": other, "seg": THICK})
    (fault,) = faults_of(lambda: load_cases(tmp_path, NAMES))
    assert fault == (
        f"case p0: t2.nii.gz lies up to {off:.3g} voxels off the grid of t1.nii.gz, expected at most "
        '0.1; resample them to one grid, or use align = "resample"'
    )
    assert fault.arguments == ("align",)
    assert load_cases(tmp_path, NAMES, align="resample")


# Resampling onto the grid of the label, else of the first modality

OTHERS: dict[str, tuple[Any, tuple[int, int, int]]] = {
    "moved": (niftis.affine_of((1, 1, 1), (-12, 2, 29)), (26, 30, 20)),
    "finer": (niftis.affine_of((0.5, 0.5, 1)), BIG),
    "another order": (
        niftis.reorient(np.zeros(SHAPE), THICK / [1, 1, 10, 1], "PIR")[1],
        (24, 16, 20),
    ),
    "oblique": (turned(niftis.affine_of((1, 1, 1), (-14, 4, 29)), 0.3), (30, 34, 20)),
}


@pytest.mark.parametrize("which", OTHERS)
@pytest.mark.parametrize("label", [True, False], ids=["label", "no label"])
def test_modalities_are_where_they_were_in_mm(tmp_path: Path, which: str, label: bool) -> None:
    grid = niftis.affine_of((1, 1, 1))
    affine, shape = OTHERS[which]
    affines = {"t1": grid, "t2": affine, **({"seg": grid} if label else {})}
    write(tmp_path, affines, {"t2": shape})
    (case,) = load_cases(tmp_path, NAMES, align="resample")
    assert case.reference.name == ("seg.nii.gz" if label else "t1.nii.gz")
    volume = case.read()
    assert volume.shape == SHAPE and volume.images["t2"].dtype == np.float32
    np.testing.assert_array_equal(volume.affine, grid)
    places = [niftis.world(torch.from_numpy(volume.images[n] > 5), grid) for n in NAMES]
    torch.testing.assert_close(places[1], places[0], atol=0.3, rtol=0)
    assert (volume.images["t2"] > 5).sum() == pytest.approx(
        (volume.images["t1"] > 5).sum(), rel=0.1
    )


def test_the_label_gives_the_grid_and_keeps_its_voxels(tmp_path: Path) -> None:
    fine, thick = niftis.affine_of((1, 1, 1)), niftis.affine_of((1, 1, 4))
    write(
        tmp_path, {"t1": fine, "t2": thick, "seg": thick}, {"t2": (20, 24, 4), "seg": (20, 24, 4)}
    )
    (case,) = load_cases(tmp_path, NAMES, align="resample")
    volume = case.read()
    assert volume.shape == (20, 24, 4) and volume.label is not None and volume.label.any()
    np.testing.assert_array_equal(volume.label, np.asarray(nib.load(case.label).dataobj))
    alone = case.restrict([True, False])
    assert alone.reference == case.reference
    np.testing.assert_array_equal(alone.read(with_label=False).images["t1"], volume.images["t1"])


def test_a_subset_keeps_the_grid_of_the_case(tmp_path: Path) -> None:
    grid, (affine, shape) = niftis.affine_of((1, 1, 1)), OTHERS["moved"]
    write(tmp_path, {"t1": grid, "t2": affine}, {"t2": shape})
    (case,) = load_cases(tmp_path, NAMES, align="resample")
    volume = case.restrict([False, True]).read()
    assert volume.shape == SHAPE and list(volume.images) == ["t2"]
    np.testing.assert_array_equal(volume.images["t2"], case.read().images["t2"])
    (refusing,) = [Case("p0", NAMES, files=case.files)]
    assert refusing.restrict([False, True]).read().shape == shape


def test_what_a_file_does_not_cover_is_0(tmp_path: Path) -> None:
    image = np.full((4, 4, 4), 5.0, np.float32)
    half = niftis.affine_of((1, 1, 1), (2, 0, 0))
    moved = resample(image, half, shape=(8, 4, 4), reference=niftis.affine_of((1, 1, 1), (0, 0, 0)))
    np.testing.assert_array_equal(moved[:, 0, 0], [0, 0, 5, 5, 5, 5, 0, 0])
    thick, fine = (niftis.affine_of((1, 1, n), (0, 0, z)) for n, z in ((10, 0), (1, -4.5)))
    whole = resample(image[..., :1], thick, shape=(4, 4, 10), reference=fine)
    assert (whole == 5).all(), "a thick slice does not fade towards its faces"


def test_files_of_different_places_are_refused(tmp_path: Path) -> None:
    far = niftis.affine_of((1, 1, 1), (200, 5, 31))
    write(tmp_path, {"t1": niftis.affine_of((1, 1, 1)), "t2": far})
    assert faults_of(lambda: load_cases(tmp_path, NAMES, align="resample")) == (
        "case p0: t2.nii.gz lies beside t1.nii.gz and shares no voxel with it; correct the affine in its "
        "header, or remove it",
    )
    assert not overlap(SHAPE, far, SHAPE, np.eye(4)) and overlap(SHAPE, np.eye(4), SHAPE, np.eye(4))


def test_the_cache_tells_the_two_apart(tmp_path: Path) -> None:
    grid = niftis.affine_of((1, 1, 1))
    write(tmp_path / "cases", {"t1": grid, "t2": grid, "seg": grid})
    paths = []
    for align in ("refuse", "resample"):
        cases = load_cases(tmp_path / "cases", NAMES, align=align)
        (cached,) = prepare(
            cases, tmp_path / "cache", preprocessing=Preprocessing((1.0, 1.0, 1.0)), labels=LESION
        )
        paths.append(cached.path)
    assert paths[0] != paths[1]


# What is said


def test_resampling_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    affine, shape = OTHERS["moved"]
    for k in range(5):
        write(tmp_path / str(k), {"t1": niftis.affine_of((1, 1, 1)), "t2": affine}, {"t2": shape})
        (tmp_path / str(k) / "p0").rename(tmp_path / f"p{k}")
        (tmp_path / str(k)).rmdir()
    with caplog.at_level(logging.WARNING):
        cases, faults = find_cases(tmp_path, NAMES, align="resample")
        for case in cases:
            case.read()
    assert len(cases) == 5 and not faults
    assert [record.getMessage() for record in caplog.records] == [
        "modalities on other grids are resampled onto the grid of the label, or of the first modality "
        "without a label (5 files): case p0: t2.nii.gz, case p1: t2.nii.gz, case p2: t2.nii.gz and 2 more"
    ]


@pytest.mark.parametrize(
    ("move", "codes", "told"),
    [
        (0.0, (1, 1), False),
        (0.05, (1, 1), False),
        (3.0, (1, 1), True),
        (3.0, (1, 4), True),
        (3.0, (0, 1), False),
        (3.0, (1, 0), False),
    ],
)
def test_a_qform_that_contradicts_the_sform_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, move: float, codes: Any, told: bool
) -> None:
    image = nib.Nifti1Image(niftis.draw_image(), np.eye(4))
    image.set_qform(niftis.affine_of((1, 1, 1), (move, 0, 0)), code=codes[0])
    image.set_sform(np.eye(4), code=codes[1])
    (tmp_path / "p0").mkdir()
    nib.save(image, tmp_path / "p0" / "t1.nii.gz")
    with caplog.at_level(logging.WARNING):
        (case,) = load_cases(tmp_path, ("t1",))
    lines = [record.getMessage() for record in caplog.records]
    assert lines == told * [
        "qform and sform differ by more than a tenth of a voxel, and the sform is used; correct the "
        "header if that is the wrong one (1 file): case p0: t1.nii.gz (3 voxels)"
    ]
    np.testing.assert_array_equal(case.read().affine, nib.load(case.files["t1"]).affine)


@pytest.mark.parametrize("scale", [1.00002, 0.99999, 1.0009])
def test_scaled_labels_are_rounded(scale: float) -> None:
    label = niftis.draw_label(values=(2, 1, 1)).astype(np.float64)
    encoded = LabelSet({"a": 1, "b": 2}).encode(np.where(label == 1, label * scale, label))
    assert torch.equal(encoded, torch.from_numpy(label.astype(np.uint8)))
    (fault,) = faults_of(lambda: LabelSet({"a": 1, "b": 2}).encode(label * 1.002))
    assert fault.startswith("label values 1.002, 2.004 are not in the label set ")
