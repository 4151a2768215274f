"""Data sets as they lie in hospitals: each layout is found, said aloud, and can be trained on."""

from __future__ import annotations

import shutil
from pathlib import Path

import layouts
import nibabel as nib
import niftis
import numpy as np
import pytest
from commands import errors, run, settings
from layouts import LAYOUTS, NAMES
from niftis import save, write_cases

from prism_meta.data.layouts.base import Found
from prism_meta.data.layouts.folders import LAYOUTS as ALL
from prism_meta.data.layouts.folders import find, find_cases, load_cases
from prism_meta.data.layouts.names import FileNames

pytestmark = pytest.mark.usefixtures("without_drawing", "memory_by_voxels")

FILES = FileNames(NAMES)
MODALITIES = 'data.modalities=["flair", "t1ce"]'


def found(root: Path, names: FileNames = FILES, layout: str | None = None) -> Found:
    return find(root, names, layout=layout)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("named", [False, True])
def test_each_layout_is_found(tmp_path: Path, kind: str, named: bool) -> None:
    written = LAYOUTS[kind]
    root = written.write(tmp_path / "data")
    got = found(root, layout=written.name if named else None)
    assert got.faults == []
    assert got.sentence().startswith(f"layout: {written.title}, 3 cases")
    assert tuple(case.id for case in got.cases) == written.ids
    assert tuple(case.patient for case in got.cases) == (written.patients or written.ids)
    assert tuple(case.site for case in got.cases) == written.sites
    for k, case in enumerate(got.cases):
        there = NAMES if k < 2 or written.complete else NAMES[:1]
        assert tuple(case.files) == there
        volume = case.read()
        for m, name in enumerate(there):
            np.testing.assert_array_equal(volume.images[name], layouts.image(k, m), err_msg=name)
        assert volume.label is not None
        np.testing.assert_array_equal(volume.label, niftis.draw_label())
    # Predictions need no labels.
    assert not any(case.label for case in found(root, FileNames(NAMES, None)).cases)


def test_every_layout_has_a_test() -> None:
    assert {written.name for written in LAYOUTS.values()} == {layout.name for layout in ALL}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_each_layout_is_surveyed_trains_evaluates_and_predicts(tmp_path: Path, kind: str) -> None:
    written = LAYOUTS[kind]
    root = written.write(tmp_path / "data")
    # An episode needs two patients: where one has two of the three cases, none is held out.
    hold = len(set(written.patients or written.ids)) == 3
    options = settings("training.steps=2", MODALITIES, f"data.holdout={int(hold)}")
    code, output = run("plan", root, "--out", tmp_path / "plan.toml", *options)
    assert code == 0, output
    code, output = run("cases", root, *options)
    assert code == 0, output
    assert f"{root}: {written.title}, 3 cases of " in output
    code, output = run("train", root, "--out", tmp_path / "run", *options)
    assert code == 0, output
    assert f"layout: {written.title}, 3 cases" in output
    given = () if hold else (root,)
    code, output = run("evaluate", tmp_path / "run", *given, "--out", tmp_path / "report")
    assert code == 0, output
    code, output = run("predict", tmp_path / "run", root, tmp_path / "labels")
    assert code == 0, output
    ids = [*written.ids, *(["BRATS_900"] if kind == "Decathlon" else [])]
    assert sorted(p.name for p in (tmp_path / "labels").glob("*.nii.gz")) == [
        f"{n}.nii.gz" for n in ids
    ]
    for name in ids:
        image = nib.load(tmp_path / "labels" / f"{name}.nii.gz")
        assert image.shape == niftis.SHAPE
        np.testing.assert_array_equal(image.affine, layouts.AFFINE)


# Names


CARDIAC = ("bssfp", "DE", "t2")


def cardiac(root: Path, late: str = "LGE", label: str = "gd") -> Path:
    for k in range(3):
        for m, name in enumerate(("C0", late, "T2")):
            save(layouts.image(k, m), root / f"p{k}" / f"p{k}_{name}.nii.gz", layouts.AFFINE)
        save(niftis.draw_label(), root / f"p{k}" / f"p{k}_{label}.nii.gz", layouts.AFFINE)
    return root


def training(root: Path, *options: str) -> tuple[int, str]:
    names = 'data.modalities=["bssfp", "DE", "t2"]'
    return run(
        "train", root, "--out", root.parent / "run", *settings("training.steps=2", names, *options)
    )


def test_a_modality_by_another_name_is_told(tmp_path: Path) -> None:
    root = cardiac(tmp_path / "data")
    code, output = training(root)
    assert code == 2 and not (tmp_path / "run").exists()
    assert errors(output) == [
        "data.modalities: none of 3 cases has 'DE', expected files like *DE.nii.gz, found files that end "
        'in _LGE (3), of which _LGE is the nearest; name it LGE there, or set data.files.DE = ["*_LGE*"]'
    ]
    assert "layout: a folder per case, 3 cases" in output
    assert training(root, 'data.files.DE=["*_LGE*"]')[0] == 0


def test_a_modality_without_any_file_is_told(tmp_path: Path) -> None:
    code, output = training(cardiac(tmp_path / "data", late="T2w_map"))
    assert code == 2
    (fault,) = errors(output)
    assert fault.startswith("data.modalities: none of 3 cases has 'DE'")
    assert "_T2w_map (3); name it as they do" in fault
    shutil.rmtree(tmp_path / "data")
    root = cardiac(tmp_path / "data")
    for path in root.rglob("*_LGE.nii.gz"):
        path.unlink()
    assert errors(training(root)[1]) == [
        "data.modalities: none of 3 cases has 'DE', expected files like *DE.nii.gz, found no other "
        "files; add its files, or correct the name"
    ]


def test_a_label_that_most_lack_is_told(tmp_path: Path) -> None:
    root = cardiac(tmp_path / "data", late="DE", label="segm")
    code, output = training(root)
    assert code == 2
    assert errors(output) == [
        "data.label: only 0 of 3 cases have 'seg', expected files like *seg.nii.gz, found files that end "
        'in _segm (3), of which _segm is the nearest; name it segm there, or set data.files.seg = ["*_segm*"]'
    ]
    assert training(root, "data.label=segm")[0] == 0


def test_a_prediction_may_lack_a_modality_everywhere_but_says_so(tmp_path: Path) -> None:
    root = cardiac(tmp_path / "data", late="DE")
    assert training(root)[0] == 0
    other = cardiac(tmp_path / "other")
    code, output = run("predict", tmp_path / "run", other, tmp_path / "labels")
    assert code == 0
    assert "no case has DE; found other files that end in _LGE (3), _gd (3)" in output


def test_names_of_known_data_sets() -> None:
    names = FileNames(("flair", "t1", "t1ce", "t2", "lge", "adc"), "seg")
    wanted = {
        "x-t2f.nii.gz": "flair", "x_T2w.nii": "t2", "x_T1w.nii.gz": "t1", "x_DE.nii.gz": "lge",
        "sub-1_ce-gadolinium_T1w.nii.gz": "t1ce", "t1gd": "t1ce", "SMIR.MR_ADC.nii": "adc",
        "x_MR_ADC.nii": "adc", "x_gd.nii.gz": "seg", "x_msk.nii.gz": "seg", "x_lesion.nii.gz": None,
        "x_mask.nii.gz": None, "pre/FLAIR.nii.gz": "flair", "orig/FLAIR.nii.gz": None,
    }  # fmt: skip
    assert {file: names.owner(file) for file in wanted} == wanted


def test_a_name_of_its_own_comes_first() -> None:
    names = FileNames(("t1", "t1w"), "seg")
    assert names.assign(["a_t1.nii", "a_t1w.nii", "a_seg.nii", "a_msk.nii"]) == {
        "t1": ["a_t1.nii"], "t1w": ["a_t1w.nii"], "seg": ["a_seg.nii"]
    }  # fmt: skip
    patterns = FileNames(("t1",), None, {"t1": ("*_bias*", "new/*")})
    assert patterns.assign(["a_t1.nii", "a_BIAS.nii"]) == {"t1": ["a_BIAS.nii"]}
    assert patterns.assign(["old/a_t1.nii", "new/a.nii"]) == {"t1": ["new/a.nii"]}


# Layouts


def test_folders_in_a_case_are_no_cases(tmp_path: Path) -> None:
    root = write_cases(tmp_path, 2)
    (root / "p0" / "dicom").mkdir()
    write_cases(root / "p1" / "derivatives", 2)
    assert [case.id for case in load_cases(root)] == ["p0", "p1"]
    assert [case.id for case in load_cases(root / "p0")] == ["p0"]
    (root / "dicom").mkdir()  # this one may be a case that lost its files
    assert find_cases(root)[1][0].startswith("case dicom: no modality")


def test_subfolders_for_labels_are_searched_if_asked_for(tmp_path: Path) -> None:
    for k in range(2):
        save(layouts.image(k, 0), tmp_path / "images" / f"train_{k}_C0.nii.gz", layouts.AFFINE)
        save(niftis.draw_label(), tmp_path / "labels" / f"train_{k}_gd.nii.gz", layouts.AFFINE)
    got = found(tmp_path, FileNames(("bssfp",)), "flat")
    assert got.faults == []
    assert [case.id for case in got.cases] == ["train_0", "train_1"]
    assert all(case.label for case in got.cases)


def test_test_images_are_cases_without_labels(tmp_path: Path) -> None:
    root = layouts.decathlon(tmp_path)
    names = FileNames(NAMES, None)
    assert [case.id for case in found(root / "imagesTs", names).cases] == ["BRATS_900"]
    assert len(found(root / "imagesTr").cases) == 3
    raw = layouts.nnunet(tmp_path / "raw")
    save(layouts.image(0, 0), raw / "imagesTs" / "q_0000.nii.gz", layouts.AFFINE)
    assert [case.id for case in found(raw, names).cases] == ["p0", "p1", "p2", "q"]
    assert [case.id for case in found(raw / "imagesTs", names).cases] == ["q"]
    assert [case.id for case in found(raw).cases] == ["p0", "p1", "p2"]


def test_sessions_without_any_modality_are_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = layouts.bids(tmp_path)
    save(layouts.image(0, 0), root / "sub-03" / "func" / "sub-03_bold.nii.gz", layouts.AFFINE)
    got = found(root)
    assert got.faults == [] and len(got.cases) == 3
    assert caplog.messages == [
        f"{root}: 1 sessions have none of flair, t1ce and are skipped: sub-03"
    ]
    assert [case.id for case in found(root / "sub-01").cases] == ["sub-01_ses-1", "sub-01_ses-2"]


def test_a_channel_of_a_file_is_read_alone(tmp_path: Path) -> None:
    root = layouts.decathlon(tmp_path, modality={"0": "T1gd", "1": "FLAIR"})
    case = found(root).cases[0]
    assert case.channels == {"flair": 1, "t1ce": 0}
    volume = case.restrict([True, False]).read()
    assert list(volume.images) == ["flair"] and volume.shape == niftis.SHAPE
    np.testing.assert_array_equal(volume.images["flair"], layouts.image(0, 1))
