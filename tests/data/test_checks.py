"""One case is checked completely, without an error that would stop the others."""

from __future__ import annotations

from pathlib import Path

import pytest
from niftis import OWN, cut, write_case

from prism_meta.data import memory
from prism_meta.data.checks import case_faults
from prism_meta.data.labels import BRATS_LABELS, LabelSet
from prism_meta.data.layouts.folders import load_cases
from prism_meta.data.preprocessing import Preprocessing


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
        "case p0: no label file; add it or remove the case"
    ]
