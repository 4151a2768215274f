"""Label volumes lie where their case lies: every field of the header that says so is kept."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import niftis
import numpy as np
import pytest
from niftis import SHAPE

from prism_meta.data.layouts.folders import load_cases
from prism_meta.evaluation.saving import save_labels

CODES = [(q, s) for q in (0, 1, 2, 4) for s in (0, 1, 2, 4)]
OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.4, -0.3, 0.7) @ np.diag([1.2, -1.2, 10.0]), (31.0, -20.0, 7.0)
)
KINDS: dict[str, Any] = {"NIfTI-1": nib.Nifti1Image, "NIfTI-2": nib.Nifti2Image}


def place(header: Any) -> dict[str, Any]:
    """What a header says of where the voxels lie."""
    names = [n for n in header if n.startswith(("quatern", "qoffset", "srow", "qform", "sform"))]
    fields = {name: np.float32(header[name]).tolist() for name in (*names, "xyzt_units")}
    return {**fields, "pixdim": np.float32(header["pixdim"][:4]).tolist()}


@pytest.mark.parametrize("affine", [OBLIQUE, np.diag([2.0, 2.0, 2.0, 1.0])], ids=["oblique", "RAS"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("q", "s"), CODES)
def test_codes_and_affines_are_kept(tmp_path: Path, q: int, s: int, kind: str, affine: Any) -> None:
    source = KINDS[kind](niftis.draw_image(), affine)
    source.set_qform(affine, code=q)
    source.set_sform(affine, code=s)
    source.header.set_xyzt_units("mm", "sec")
    (tmp_path / "p0").mkdir()
    nib.save(source, tmp_path / "p0" / "t1.nii.gz")
    (case,) = load_cases(tmp_path, ("t1",))
    labels = niftis.draw_label()
    save_labels(tmp_path / "out.nii.gz", labels, case)
    written, source = nib.load(tmp_path / "out.nii.gz"), nib.load(case.files["t1"])
    assert (int(written.header["qform_code"]), int(written.header["sform_code"])) == (q, s)
    assert place(written.header) == place(source.header)
    np.testing.assert_allclose(written.affine, source.affine, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(written.dataobj), labels)
    assert written.get_data_dtype() == np.int16
    assert written.header.get_slope_inter() in ((1.0, 0.0), (None, None))


def test_a_file_of_five_axes(tmp_path: Path) -> None:
    image = nib.Nifti1Image(niftis.draw_image()[..., None, None], OBLIQUE)
    (tmp_path / "p0").mkdir()
    nib.save(image, tmp_path / "p0" / "t1.nii.gz")
    (case,) = load_cases(tmp_path, ("t1",))
    assert case.read().shape == SHAPE
    save_labels(tmp_path / "out.nii.gz", niftis.draw_label(), case)
    written = nib.load(tmp_path / "out.nii.gz")
    assert written.shape == SHAPE
    np.testing.assert_array_equal(written.affine, nib.load(case.files["t1"]).affine)


def test_scaled_sources_do_not_scale_the_labels(tmp_path: Path) -> None:
    niftis.save(niftis.draw_image(), tmp_path / "p0" / "t1.nii.gz", OBLIQUE)
    path = tmp_path / "p0" / "t1.nii.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[112:120] = np.array([0.5, 3.0], "<f4").tobytes()
    path.write_bytes(gzip.compress(bytes(content)))
    (case,) = load_cases(tmp_path, ("t1",))
    save_labels(tmp_path / "out.nii.gz", niftis.draw_label(), case)
    written = nib.load(tmp_path / "out.nii.gz")
    assert sorted(np.unique(np.asarray(written.dataobj))) == [0, 1, 2, 4]
