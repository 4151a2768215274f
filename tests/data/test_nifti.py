"""NIfTI files read to their end: damage anywhere is found, and headers are not trusted."""

from __future__ import annotations

import gzip
import os
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import niftis
import numpy as np
import pytest
from helpers import faults_of
from niftis import SHAPE, save, write_case
from numpy.typing import NDArray

from prism_meta.data import memory
from prism_meta.data.cases import Case
from prism_meta.data.nifti import NiftiError, read_header, read_voxels

GRID = niftis.affine_of((1, 1, 1))


def read(path: Path) -> NDArray[np.float64]:
    return read_voxels(path, read_header(path))


def case_of(path: Path) -> Case:
    return Case("p0", ("t1",), files={"t1": path})


def notices(content: bytes) -> bool:
    """Whether gzip finds the content damaged."""
    try:
        gzip.decompress(content)
    except (OSError, EOFError, gzip.zlib.error):  # type: ignore[attr-defined]
        return True
    return False


@pytest.mark.parametrize("which", ["image", "label"])
def test_every_flipped_bit_that_gzip_notices_is_a_fault(tmp_path: Path, which: str) -> None:
    array = niftis.draw_image() if which == "image" else niftis.draw_label()
    content = save(array, tmp_path / "t1.nii.gz", GRID).read_bytes()
    noticed = 0
    for place in np.linspace(0, 8 * len(content) - 1, 240).astype(int):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path = tmp_path / "flipped.nii.gz"
        path.write_bytes(flipped)
        if notices(bytes(flipped)):
            noticed += 1
            with pytest.raises(NiftiError):
                read(path)
        else:  # the time or the name in gzip's own header
            np.testing.assert_array_equal(read(path), array)
    assert noticed > 200


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_truncated_files(tmp_path: Path, share: float, suffix: str) -> None:
    path = save(niftis.draw_image(), tmp_path / f"t1{suffix}", GRID)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(NiftiError):
        read(path)


def test_too_long_files(tmp_path: Path) -> None:
    plain, packed = tmp_path / "t1.nii", tmp_path / "t1.nii.gz"
    content = save(niftis.draw_image(), plain, GRID).read_bytes()
    plain.write_bytes(content + b"\0")
    packed.write_bytes(gzip.compress(content + b"garbage"))
    for path in (plain, packed):
        with pytest.raises(
            NiftiError, match=r"longer than its shape \(20, 24, 16\) of float32 voxels"
        ):
            read(path)
    packed.write_bytes(gzip.compress(content) + b"garbage")
    with pytest.raises(NiftiError, match="Not a gzipped file"):
        read(packed)


def test_names_must_say_whether_a_file_is_compressed(tmp_path: Path) -> None:
    image = niftis.draw_image()
    plain, packed = save(image, tmp_path / "a.nii", GRID), save(image, tmp_path / "b.nii.gz", GRID)
    plain, packed = packed.rename(tmp_path / "t1.nii"), plain.rename(tmp_path / "t2.NII.GZ")
    assert case_of(plain).header_faults() == [
        "case p0: t1.nii is compressed, which its name does not say; rename it to t1.nii.gz"
    ]
    assert case_of(packed).header_faults() == [
        "case p0: t2.NII.GZ is not compressed, which its name does not say; rename it to t2.NII"
    ]


def test_nifti_2_and_big_endian(tmp_path: Path) -> None:
    image = niftis.draw_image()
    nib.save(nib.Nifti2Image(image, GRID), tmp_path / "two.nii.gz")
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">f4")
    nib.save(nib.Nifti1Image(image, GRID, header), tmp_path / "big.nii")
    for name in ("two.nii.gz", "big.nii"):
        voxels = read(tmp_path / name)
        np.testing.assert_array_equal(voxels, image)
        assert voxels.dtype.isnative


@pytest.mark.parametrize("axes", [1, 2, 3, 4])
def test_trailing_axes_of_one_are_dropped(tmp_path: Path, axes: int) -> None:
    image = niftis.draw_image()
    save(image.reshape(*SHAPE, *[1] * axes), tmp_path / "t1.nii.gz", GRID)
    np.testing.assert_array_equal(read(tmp_path / "t1.nii.gz"), image)


RGB = [("R", "u1"), ("G", "u1"), ("B", "u1")]
KINDS = [
    (np.dtype(RGB), "has colour voxels, expected real numbers"),
    (np.dtype([*RGB, ("A", "u1")]), "has colour voxels, expected real numbers"),
    (np.dtype(np.complex64), "has complex voxels, expected real numbers"),
    (np.dtype(np.complex128), "has complex voxels, expected real numbers"),
]


@pytest.mark.parametrize(("dtype", "problem"), KINDS)
def test_voxels_that_are_no_numbers(tmp_path: Path, dtype: np.dtype[np.void], problem: str) -> None:
    path = save(np.zeros(SHAPE, dtype), tmp_path / "t1.nii.gz", GRID)
    assert faults_of(case_of(path).read) == (
        f"case p0: t1.nii.gz {problem}; convert it to one channel",
    )


def patched(offset: int, form: str, *values: float) -> Callable[[Path], None]:
    def patch(path: Path) -> None:
        content = bytearray(path.read_bytes())
        struct.pack_into(f"<{form}", content, offset, *values)
        path.write_bytes(content)

    return patch


def scaled_affine(factor: float) -> Callable[[Path], None]:
    rows = niftis.affine_of((factor, factor, factor))[:3].flatten()
    return patched(280, "12f", *rows)


HEADERS = {
    "endless offset": (patched(108, "f", np.inf), "has a damaged header (vox_offset is inf)"),
    "no offset": (patched(108, "f", np.nan), "has a damaged header (vox_offset is nan)"),
    "endless slope": (patched(112, "f", np.inf), "has a damaged header (scl_slope is inf)"),
    "no slope": (patched(112, "f", np.nan), "has a damaged header (scl_slope is nan)"),
    "endless intercept": (patched(116, "f", np.inf), "has a damaged header (scl_inter is inf)"),
    "bits": (
        patched(72, "h", 8),
        "cannot be read as NIfTI (its header has an invalid bitpix)",
    ),
    "code": (
        patched(254, "h", 130),
        "cannot be read as NIfTI (its header has an invalid sform_code",
    ),
    "low offset": (patched(108, "f", 100), "cannot be read as NIfTI (vox offset 100 too low"),
    "far offset": (patched(108, "f", 1e9), "is too short for its shape"),
    "pair": (patched(344, "4s", b"ni1\0"), "cannot be read as NIfTI (its voxels are in another"),
    "huge": (patched(42, "3h", 30000, 30000, 30000), "is too short for its shape (30000, 30000"),
    "none": (patched(42, "h", 0), "has shape (0, 24, 16), expected 3-D"),
    "negative": (patched(42, "h", -20), "has shape (-20, 24, 16), expected 3-D"),
    "microns": (scaled_affine(0.004), "has voxels of 0.004 x 0.004 x 0.004 mm, expected 0.01"),
    "metres": (scaled_affine(1000), "has voxels of 1e+03 x 1e+03 x 1e+03 mm, expected 0.01"),
    "far": (patched(292, "f", 1e20), "lies 1e+20 mm from the origin"),
    "no affine": (patched(280, "12f", *[np.nan] * 12), "has an invalid affine"),
    "flat": (patched(280, "8f", *[1, 0, 0, 0] * 2), "has an invalid affine"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_cannot_be_right(tmp_path: Path, name: str) -> None:
    damage, problem = HEADERS[name]
    path = save(niftis.draw_image(), tmp_path / "t1.nii", GRID)
    damage(path)
    (fault,) = case_of(path).header_faults()
    assert fault.startswith(f"case p0: t1.nii {problem}")
    assert "; " in fault


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_header_cannot_ask_for_more_than_the_file_can_hold(tmp_path: Path, suffix: str) -> None:
    path = save(niftis.draw_image(), tmp_path / "t1.nii", GRID)
    patched(42, "3h", 30000, 30000, 30000)(path)
    if suffix == ".nii.gz":
        (tmp_path / "t1.nii.gz").write_bytes(gzip.compress(path.read_bytes()))
        path = tmp_path / "t1.nii.gz"
    with pytest.raises(NiftiError, match=r"is too short for its shape \(30000, 30000, 30000\)"):
        read_header(path)


def test_memory_is_checked_before_voxels_are_read(tmp_path: Path) -> None:
    path = save(niftis.draw_image(), tmp_path / "t1.nii", GRID)
    patched(42, "3h", 20000, 20000, 2000)(path)
    os.truncate(path, 352 + 4 * 20000 * 20000 * 2000)  # a hole, which takes no space
    (fault,) = case_of(path).header_faults()
    assert fault.startswith(
        "case p0: t1.nii has shape (20000, 20000, 2000) and needs about 9.6e+03 GB of memory, but "
    )
    assert fault.endswith("; correct its header")


def test_a_case_of_many_files_is_checked_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_case(tmp_path / "p0")
    files = {m: tmp_path / "p0" / f"p0_{m}.nii.gz" for m in ("t1", "t2", "flair")}
    case = Case("p0", tuple(files), files=files)
    monkeypatch.setattr(memory, "memory_size", lambda: 20 * 24 * 16 * 31)
    (fault,) = faults_of(case.read)
    assert fault.startswith(
        "case p0: needs about 0.000246 GB of memory, but there are 0.000238 GB; "
    )
    monkeypatch.setattr(memory, "memory_size", lambda: 20 * 24 * 16 * 33)
    case.read()


def test_what_is_no_regular_file_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.nii")
    (tmp_path / "folder.nii").mkdir()
    for name, kind in (("pipe", "no regular file"), ("folder", "a folder")):
        (fault,) = case_of(tmp_path / f"{name}.nii").header_faults()
        assert fault.startswith(f"case p0: {name}.nii is {kind}, expected a NIfTI file; restore")


@pytest.mark.parametrize(("slope", "inter"), [(1e30, 0), (1e-30, 0), (2, 1e30), (3e38, 3e38)])
def test_scaled_voxels_are_exact(tmp_path: Path, slope: float, inter: float) -> None:
    path = save(niftis.draw_label(), tmp_path / "t1.nii", GRID)
    patched(112, "2f", slope, inter)(path)
    image = case_of(path).read().images["t1"]
    slope, inter = float(np.float32(slope)), float(np.float32(inter))
    np.testing.assert_array_equal(image, niftis.draw_label() * slope + inter)


@pytest.mark.parametrize("dtype", [np.int32, np.float64])
def test_values_that_float32_cannot_hold_are_kept(tmp_path: Path, dtype: type) -> None:
    values = (niftis.draw_label() + 2**30).astype(dtype) if dtype is np.int32 else None
    if values is None:
        values = niftis.draw_image().astype(np.float64) * 1e200
    save(values, tmp_path / "t1.nii.gz", GRID)
    image = case_of(tmp_path / "t1.nii.gz").read().images["t1"]
    assert image.dtype == np.float64
    np.testing.assert_array_equal(image, values)
