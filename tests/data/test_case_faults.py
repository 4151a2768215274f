"""What is said of folders and files that cannot be used."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import niftis
import numpy as np
import pytest
from helpers import faults_of
from niftis import SHAPE, cut, save, write_case

from prism_meta.data.layouts.folders import load_cases
from prism_meta.modalities import BRATS

KEEP = "restore it or remove it (a missing modality is allowed)"


# Faults of folders


def test_no_such_folder(tmp_path: Path) -> None:
    root = tmp_path / "nowhere"
    assert faults_of(lambda: load_cases(root)) == (
        f"{root}: no such folder; give a folder with one folder per case",
    )


def test_root_is_a_file(tmp_path: Path) -> None:
    root = save(niftis.draw_image(), tmp_path / "t1.nii.gz")
    assert faults_of(lambda: load_cases(root)) == (
        f"{root}: no such folder; give a folder with one folder per case",
    )


def test_empty_folder(tmp_path: Path) -> None:
    assert faults_of(lambda: load_cases(tmp_path, ("t1", "t2"))) == (
        f"{tmp_path}: no case found; expected folders with files like *t1.nii.gz or *t2.nii.gz",
    )


def test_empty_case_folder(tmp_path: Path) -> None:
    write_case(tmp_path / "p0")
    (tmp_path / "p1").mkdir()
    assert faults_of(lambda: load_cases(tmp_path)) == (
        "case p1: no modality; expected a file like *flair.nii.gz or *t1ce.nii.gz or *t1.nii.gz or "
        "*t2.nii.gz, found nothing; add a file or remove the folder",
    )


def test_case_with_only_a_label(tmp_path: Path) -> None:
    write_case(tmp_path / "p0", missing=BRATS)
    write_case(tmp_path / "p1")
    assert faults_of(lambda: load_cases(tmp_path)) == (
        "case p0: no modality; expected a file like *flair.nii.gz or *t1ce.nii.gz or *t1.nii.gz or "
        "*t2.nii.gz, found p0_seg.nii.gz; add a file or remove the folder",
    )


def test_several_files_for_one_modality(tmp_path: Path) -> None:
    folder = write_case(tmp_path / "p0")
    save(niftis.draw_image(), folder / "t1.nii", niftis.affine_of((1, 1, 1)))
    save(niftis.draw_image(), folder / "p0-t1n.nii.gz", niftis.affine_of((1, 1, 1)))
    save(niftis.draw_label(), folder / "old_seg.nii.gz", niftis.affine_of((1, 1, 1)))
    assert faults_of(lambda: load_cases(tmp_path)) == (
        "case p0: 3 files for 't1' (p0-t1n.nii.gz, p0_t1.nii.gz, t1.nii); keep one per folder",
        "case p0: 2 files for 'seg' (old_seg.nii.gz, p0_seg.nii.gz); keep one per folder",
    )


def test_two_folders_of_one_name(tmp_path: Path) -> None:
    write_case(tmp_path / "HGG" / "p0")
    write_case(tmp_path / "LGG" / "p0")
    assert faults_of(lambda: load_cases(tmp_path)) == (
        "case p0: 2 folders of this name; rename all but one",
    )


# Faults of files


def test_different_shapes(tmp_path: Path) -> None:
    folder = write_case(tmp_path / "p0", missing=("t2",))
    save(niftis.draw_image((20, 24, 15)), folder / "t2.nii.gz", niftis.affine_of((1, 1, 1)))
    assert faults_of(lambda: load_cases(tmp_path)) == (
        "case p0: t2.nii.gz has shape (20, 24, 15), but p0_flair.nii.gz has (20, 24, 16); "
        'resample them to one grid, or use align = "resample"',
    )


def test_label_of_another_shape(tmp_path: Path) -> None:
    folder = write_case(tmp_path / "p0", label=None)
    save(niftis.draw_label((24, 20, 16)), folder / "seg.nii.gz", niftis.affine_of((1, 1, 1)))
    assert faults_of(lambda: load_cases(tmp_path)) == (
        "case p0: seg.nii.gz has shape (24, 20, 16), but p0_flair.nii.gz has (20, 24, 16); "
        'resample them to one grid, or use align = "resample"',
    )


def test_different_affines(tmp_path: Path) -> None:
    folder = write_case(tmp_path / "p0", missing=("t2",))
    save(niftis.draw_image(), folder / "t2.nii.gz", niftis.affine_of((1, 1, 1), (-9, 5, 33.5)))
    assert faults_of(lambda: load_cases(tmp_path)) == (
        "case p0: t2.nii.gz lies up to 2.5 voxels off the grid of p0_flair.nii.gz, expected at most 0.1; "
        'resample them to one grid, or use align = "resample"',
    )


def test_affines_that_differ_by_rounding_are_one_grid(tmp_path: Path) -> None:
    folder = write_case(tmp_path / "p0", missing=("t2",))
    save(niftis.draw_image(), folder / "t2.nii.gz", niftis.affine_of((1, 1, 1), (-9, 5, 31.004)))
    assert load_cases(tmp_path)[0].availability.all()


def test_affine_without_volume(tmp_path: Path) -> None:
    folder = write_case(tmp_path / "p0", names="{modality}.nii")
    path = folder / "t1.nii"
    content = bytearray(path.read_bytes())
    content[280:328] = bytes(48)  # the rows of the sform
    path.write_bytes(content)
    assert faults_of(lambda: load_cases(tmp_path)) == (
        "case p0: t1.nii has an invalid affine (its voxels have no volume); "
        "set its voxel sizes and axes",
    )


def test_four_axes(tmp_path: Path) -> None:
    folder = write_case(tmp_path / "p0", missing=("flair",))
    save(np.zeros((*SHAPE, 4), np.float32), folder / "flair.nii.gz", niftis.affine_of((1, 1, 1)))
    assert faults_of(lambda: load_cases(tmp_path)) == (
        "case p0: flair.nii.gz has shape (20, 24, 16, 4), expected 3-D (D, H, W); "
        "give one volume per file",
    )


def test_one_slice_as_a_2d_file(tmp_path: Path) -> None:
    save(np.ones(SHAPE[:2], np.float32), tmp_path / "p0" / "t1.nii.gz")
    assert faults_of(lambda: load_cases(tmp_path)) == (
        "case p0: t1.nii.gz has shape (20, 24), expected 3-D (D, H, W); give one volume per file",
    )


@pytest.mark.parametrize(
    ("value", "count"), [(np.nan, 1), (np.inf, 3), (-np.inf, 2)], ids=["nan", "inf", "-inf"]
)
def test_nan_and_infinity(tmp_path: Path, value: float, count: int) -> None:
    folder = write_case(tmp_path / "p0", missing=("t1",))
    image = niftis.draw_image()
    image[10, 10, :count] = value
    save(image, folder / "t1.nii.gz", niftis.affine_of((1, 1, 1)))
    (case,) = load_cases(tmp_path)
    assert faults_of(case.read) == (
        f"case p0: t1.nii.gz has {count} voxels that are NaN or infinite; "
        "repair the file or remove it (a missing modality is allowed)",
    )


def cut_in_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def write_text(path: Path) -> None:
    path.write_text("Access denied. Log in to download this file.\n" * 20)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def spoil_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = b"\xff" * (len(content) - len(content) // 2)
    path.write_bytes(content)


def spoil_start(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[20:60] = b"\xff" * 40
    path.write_bytes(content)


def spoil_type(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[70:72] = struct.pack("<h", 999)
    path.write_bytes(content)


UNREADABLE = "cannot be read as NIfTI ("
# Damage, suffix of the file, and what is said of it.
DAMAGES = [
    (cut, ".nii.gz", UNREADABLE + "Compressed file ended before the end-of-stream"),
    (cut, ".nii", "is too short for its shape (20, 24, 16) of "),
    (cut_in_header, ".nii.gz", UNREADABLE),
    (cut_in_header, ".nii", UNREADABLE + "it has no NIfTI header)"),
    (write_text, ".nii.gz", UNREADABLE + "it has no NIfTI header)"),
    (write_text, ".nii", UNREADABLE + "it has no NIfTI header)"),
    (empty, ".nii.gz", "is empty, expected a NIfTI file"),
    (empty, ".nii", "is empty, expected a NIfTI file"),
    (spoil_middle, ".nii.gz", UNREADABLE),
    (spoil_start, ".nii.gz", UNREADABLE),
    (spoil_type, ".nii", UNREADABLE + "data code 999"),
]
DAMAGED = [(which, *damage) for which in ("t1", "seg") for damage in DAMAGES]


@pytest.mark.parametrize(("which", "damage", "suffix", "problem"), DAMAGED)
def test_damaged_files(
    tmp_path: Path, which: str, damage: Callable[[Path], None], suffix: str, problem: str
) -> None:
    folder = write_case(tmp_path / "p0", names="{modality}" + suffix)
    damage(folder / f"{which}{suffix}")
    fix = KEEP if which == "t1" else "restore it"
    (fault,) = faults_of(lambda: [case.read() for case in load_cases(tmp_path)])
    start, end = f"case p0: {which}{suffix} ", f"; {fix}"
    assert fault.startswith(start + problem)
    assert fault.endswith(end)
    said = fault.removeprefix(start).removesuffix(end).removeprefix(UNREADABLE)
    assert said and len(said) <= 121, "one line, however much the reader says"


def test_file_that_vanishes_after_the_search(tmp_path: Path) -> None:
    write_case(tmp_path / "p0")
    (case,) = load_cases(tmp_path)
    case.files["t1"].unlink()
    (fault,) = faults_of(case.read)
    assert fault.startswith("case p0: p0_t1.nii.gz cannot be read as NIfTI (No such file")
    assert fault.endswith(KEEP)


def test_all_faults_of_all_cases_are_reported_together(tmp_path: Path) -> None:
    grid = niftis.affine_of((1, 1, 1))
    write_case(tmp_path / "p0", missing=BRATS)
    folder = write_case(tmp_path / "p1", missing=("t1", "t2"), names="{modality}.nii.gz")
    save(niftis.draw_image((20, 24, 15)), folder / "t1.nii.gz", grid)
    empty(save(niftis.draw_image(), folder / "t2.nii.gz", grid))
    write_case(tmp_path / "p2")
    folder = write_case(tmp_path / "p3")
    save(niftis.draw_image(), folder / "x_t2.nii.gz", grid)
    faults = faults_of(lambda: load_cases(tmp_path))
    assert [fault.split(" (/")[0].split("; ")[0] for fault in faults] == [
        "case p0: no modality",
        "case p1: t1.nii.gz has shape (20, 24, 15), but flair.nii.gz has (20, 24, 16)",
        "case p1: t2.nii.gz is empty, expected a NIfTI file",
        "case p3: 2 files for 't2' (p3_t2.nii.gz, x_t2.nii.gz)",
    ]


def test_read_reports_all_volumes_of_a_case_together(tmp_path: Path) -> None:
    folder = write_case(tmp_path / "p0", missing=("t1",))
    image = niftis.draw_image()
    image[0, 0, 0] = np.nan
    save(image, folder / "p0_t1.nii.gz", niftis.affine_of((1, 1, 1)))
    for name in ("t2", "seg"):
        cut(folder / f"p0_{name}.nii.gz")
    faults = faults_of(load_cases(tmp_path)[0].read)
    assert [fault.split()[2] for fault in faults] == [
        "p0_t1.nii.gz", "p0_t2.nii.gz", "p0_seg.nii.gz"
    ]  # fmt: skip
