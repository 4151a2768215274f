"""One case is checked completely, without an error that would stop the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from niftis import OWN, SHAPE, affine_of, cut, save, write_case

from prism_meta.data import memory
from prism_meta.data.cases import Case
from prism_meta.data.checks import check_case, no_label
from prism_meta.data.labels import BRATS_LABELS, LabelSet
from prism_meta.data.layouts.folders import load_cases
from prism_meta.data.preprocessing import Preprocessing


def case_faults(case: Case, **options: Any) -> list[str]:
    return list(check_case(case, **options).faults)


def test_a_good_case_has_no_faults(tmp_path: Path) -> None:
    write_case(tmp_path / "p0")
    (case,) = load_cases(tmp_path)
    assert case_faults(case, preprocessing=Preprocessing(OWN), labels=BRATS_LABELS) == []
    assert case_faults(case, preprocessing=Preprocessing(OWN)) == []


def test_faults_of_voxels_labels_and_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_case(tmp_path / "p0")
    (case,) = load_cases(tmp_path)
    preprocessing = Preprocessing(OWN)
    (fault,) = case_faults(case, preprocessing=preprocessing, labels=LabelSet({"a": 1, "b": 2}))
    assert fault.startswith("case p0: p0_seg.nii.gz: label values 4 are not in the label set")
    cut(folder / "p0_seg.nii.gz")
    cut(folder / "p0_t1.nii.gz")
    faults = case_faults(case, preprocessing=preprocessing, labels=BRATS_LABELS)
    assert [fault.split()[2] for fault in faults] == ["p0_t1.nii.gz", "p0_seg.nii.gz"]
    (fault,) = case_faults(case, preprocessing=preprocessing)
    assert fault.startswith("case p0: p0_t1.nii.gz cannot be read")
    write_case(tmp_path / "p0")
    monkeypatch.setattr(memory, "memory_size", lambda: 10**7)
    (fault,) = case_faults(case, preprocessing=Preprocessing((0.1, 0.1, 0.1)))
    assert "at a spacing of (0.1, 0.1, 0.1) mm, needs about " in fault


def test_a_case_without_label(tmp_path: Path) -> None:
    write_case(tmp_path / "p0", label=None)
    (case,) = load_cases(tmp_path)
    assert case_faults(case, preprocessing=Preprocessing(OWN)) == []
    assert case_faults(case, preprocessing=Preprocessing(OWN), labels=BRATS_LABELS) == [
        no_label(case)
    ]


def test_every_file_is_read_although_another_is_damaged(tmp_path: Path) -> None:
    """So that no fault comes to light only when another one is removed."""
    folder = write_case(tmp_path / "p0")
    (case,) = load_cases(tmp_path)
    cut(folder / "p0_flair.nii.gz")
    save(np.full(SHAPE, np.nan, np.float32), folder / "p0_t1.nii.gz", affine_of(OWN))
    save(np.zeros((4, 4, 4), np.float32), folder / "p0_t2.nii.gz", affine_of(OWN))
    save(np.full(SHAPE, 9, np.int16), folder / "p0_seg.nii.gz", affine_of(OWN))
    checked = check_case(case, preprocessing=Preprocessing(OWN), labels=BRATS_LABELS)
    found = sorted(fault.split()[2].strip(":") for fault in checked.faults)
    assert found == [f"p0_{name}.nii.gz" for name in ("flair", "seg", "t1", "t2")]
    assert checked.volume is not None and list(checked.volume.images) == ["t1ce"]


def test_an_empty_case(tmp_path: Path) -> None:
    folder = write_case(tmp_path / "p0", modalities=("t1",))
    save(np.zeros(SHAPE, np.float32), folder / "p0_t1.nii.gz", affine_of(OWN))
    (case,) = load_cases(tmp_path, ("t1",))
    (fault,) = case_faults(case, preprocessing=Preprocessing(OWN), labels=BRATS_LABELS)
    assert fault.startswith("case p0: all voxels are 0 in p0_t1.nii.gz")
