"""What a survey says of cases that were written with known numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import layouts
import niftis
import numpy as np
import pytest
from commands import SMALL
from niftis import affine_of, save

from prism_meta.data import cases as data_cases
from prism_meta.training.config import Config, load_config
from prism_meta.training.survey.result import Spread
from prism_meta.training.survey.survey import survey

NAMES = ("flair", "t1", "t2")
SHAPES = ((10, 12, 8), (10, 12, 8), (10, 14, 6))
SPACINGS = ((1.0, 1.0, 3.0), (1.0, 1.0, 3.0), (1.0, 2.0, 4.0))
#: Modality -> largest voxel of each case; the smallest is -k. None is missing.
HIGHEST: Mapping[str, Sequence[float | None]] = {
    "flair": (100, 200, None), "t1": (50, None, 70), "t2": (None, 30, 20)
}  # fmt: skip
#: Voxels of the values 1 and 2 in the label of each case.
COUNTS = ((40, 10), (0, 25), (12, 0))


def config(*overrides: str) -> Config:
    return load_config(
        overrides=[*SMALL, 'data.modalities=["flair","t1","t2"]', "data.labels={core=1,rim=2}",
                   'data.regions={whole=["core","rim"]}', *overrides]
    )  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three cases of two patients and two sites, by a manifest."""
    lines = ["case,flair,t1,t2,label,site,patient"]
    for k, (shape, spacing) in enumerate(zip(SHAPES, SPACINGS, strict=True)):
        cells = [f"c{k}"]
        for name in NAMES:
            high = HIGHEST[name][k]
            if high is None:
                cells.append("")
                continue
            image = np.full(shape, 5, np.float32)
            image[0, 0, 0], image[1, 1, 1] = -k, high
            cells.append(save(image, tmp_path / f"c{k}_{name}.nii.gz", affine_of(spacing)).name)
        label = np.zeros(shape, np.int16)
        core, rim = COUNTS[k]
        label.flat[:core], label.flat[core : core + rim] = 1, 2
        cells.append(save(label, tmp_path / f"c{k}_seg.nii.gz", affine_of(spacing)).name)
        lines.append(",".join([*cells, "ABA"[k], ("x", "x", "y")[k]]))
    (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_numbers_in_closed_form(root: Path) -> None:
    found = survey(config(), root)
    assert found.faults == () and found.notes == ()
    assert (found.layout, len(found.cases), found.patients) == ("manifest", 3, 2)
    assert found.sites == {"A": 2, "B": 1}
    assert found.counts == {"flair": 2, "t1": 2, "t2": 2}
    assert found.missing_rates == {name: pytest.approx(1 / 3) for name in NAMES}
    assert found.subsets == {("flair", "t1"): 1, ("flair", "t2"): 1, ("t1", "t2"): 1}
    # Each pair occurs, so that only the three have never been seen in one case.
    assert found.never_together == [NAMES]
    for k, case in enumerate(found.cases):
        assert (case.id, case.site, case.patient) == (f"c{k}", "ABA"[k], ("x", "x", "y")[k])
        assert case.shape == SHAPES[k] and case.spacing == SPACINGS[k] and case.slice_axis == 2
        ml = np.prod(SPACINGS[k]) / 1000
        core, rim = COUNTS[k]
        assert case.classes == pytest.approx({"core": core * ml, "rim": rim * ml})
        assert case.regions == pytest.approx({"whole": (core + rim) * ml})
        assert case.intensities == {
            name: (-k, high[k]) for name, high in HIGHEST.items() if high[k] is not None
        }
    assert found.volumes["core"] == Spread(0.0, pytest.approx(0.096), pytest.approx(0.12))
    assert found.intensities["flair"] == (Spread(-1, -0.5, 0), Spread(100, 150, 200))
    assert found.axes()[1] == (Spread(12, 12, 14), Spread(1.0, 1.0, 2.0))


def test_headers_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = survey(config(), root)

    def refuse(*_: object) -> None:
        raise AssertionError("voxels were read")

    monkeypatch.setattr(data_cases, "read_voxels", refuse)
    fast = survey(config(), root, fast=True)
    assert fast.subsets == whole.subsets and fast.axes() == whole.axes() and fast.faults == ()
    assert fast.volumes == {} and fast.intensities == {} and not fast.voxels


def test_each_voxel_is_read_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, original = [], data_cases.read_voxels

    def recording(path: Path, header: data_cases.NiftiHeader) -> object:
        read.append(path)
        return original(path, header)

    monkeypatch.setattr(data_cases, "read_voxels", recording)
    done: list[tuple[int, int, str]] = []
    survey(config(), root, on_case=lambda *said: done.append(said))
    assert sorted(read) == sorted(root.glob("*.nii.gz"))
    assert done == [(1, 3, "c0"), (2, 3, "c1"), (3, 3, "c2")]


def test_availability_is_that_of_the_training(root: Path) -> None:
    (root / "table.csv").write_text("case,flair,t1,t2\nc0,1,0,0\nc1,1,0,1\nc2,0,1,1\n")
    found = survey(config(f"data.availability={root}/table.csv"), root)
    assert found.faults == ()
    assert found.counts == {"flair": 2, "t1": 1, "t2": 2}
    assert found.never_together == [("flair", "t1")]
    assert list(found.cases[0].intensities) == ["flair", "t1"]  # of all files


def test_a_case_that_is_empty_in_what_training_shows(root: Path) -> None:
    save(np.zeros(SHAPES[0], np.float32), root / "c0_flair.nii.gz", affine_of(SPACINGS[0]))
    found = survey(config(), root)
    assert found.faults == () and found.notes == (
        "all voxels have the same value, so that the model learns nothing from them; restore the files, "
        "or remove them (a missing modality is allowed) (1 file): case c0: flair",
    )
    (root / "table.csv").write_text("case,flair,t1,t2\nc0,1,0,0\nc1,1,0,1\nc2,0,1,1\n")
    (fault,) = survey(config(f"data.availability={root}/table.csv"), root).faults
    assert fault.startswith("case c0: all voxels are 0 in c0_flair.nii.gz; ")


def test_every_fault_at_once(root: Path) -> None:
    """Of a header, of voxels, of a label, and of the split, although training stops at the first kind."""
    (root / "c0_t1.nii.gz").write_bytes(b"")
    save(np.full(SHAPES[0], np.nan, np.float32), root / "c0_flair.nii.gz", affine_of(SPACINGS[0]))
    save(np.full(SHAPES[1], 7, np.int16), root / "c1_seg.nii.gz", affine_of(SPACINGS[1]))
    found = survey(config("data.test_cases=['c2']", "masks.train=full"), root)
    starts = [
        "case c0: c0_t1.nii.gz is empty, expected a NIfTI file",
        "2 training cases of one patient: an episode needs at least 2",
        "case c0: c0_flair.nii.gz has 960 voxels that are NaN or infinite",
        "case c1: c1_seg.nii.gz: label values 7 are not in the label set",
    ]
    assert len(found.faults) == len(starts)
    for fault, start in zip(found.faults, starts, strict=True):
        assert fault.startswith(start) and "; " in fault
    assert [case.usable for case in found.cases] == [False, False, True]
    assert found.faults[3].endswith("(set data.labels)")


def test_images_for_predictions_are_read_but_not_counted(tmp_path: Path) -> None:
    root = layouts.decathlon(tmp_path)
    settings = load_config(overrides=[*SMALL, 'data.modalities=["flair","t1ce"]'])
    found = survey(settings, root)
    assert found.faults == () and len(found.cases) == 3
    assert found.notes == (
        "1 cases without labels are for predictions only, and in no count: BRATS_900",
    )
    niftis.cut(root / "imagesTs" / "BRATS_900.nii.gz")
    (fault,) = survey(settings, root).faults
    assert fault.startswith("case BRATS_900: BRATS_900.nii.gz cannot be read as NIfTI")


def test_a_lack_of_labels_is_said_once(tmp_path: Path) -> None:
    niftis.write_cases(tmp_path, 3, label=None)
    (fault,) = survey(load_config(overrides=[*SMALL]), tmp_path).faults
    assert fault.startswith("data.label: only 0 of 3 cases have 'seg'")


def test_the_dictionary_is_json_with_stable_keys(root: Path) -> None:
    found = survey(config(), root).as_dict()
    assert json.loads(json.dumps(found)) == found
    assert list(found) == [
        "layout", "voxels", "cases", "patients", "sites", "modalities", "subsets", "never_together",
        "shape", "spacing_mm", "volumes_ml", "intensities", "notes", "faults",
    ]  # fmt: skip
    assert found["cases"][2] == {
        "case": "c2", "patient": "y", "site": "A", "modalities": ["t1", "t2"], "label": True,
        "usable": True, "shape": [10, 14, 6], "spacing_mm": [1.0, 2.0, 4.0], "slice_axis": 2,
        "volumes_ml": pytest.approx({"core": 0.096, "rim": 0.0, "whole": 0.096}),
        "intensities": {"t1": [-2.0, 70.0], "t2": [-2.0, 20.0]},
    }  # fmt: skip
    assert found["modalities"]["t1"] == {"cases": 2, "missing_rate": pytest.approx(1 / 3)}
    assert found["spacing_mm"][2] == {"min": 3.0, "median": 3.0, "max": 4.0}
