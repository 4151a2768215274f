"""Cases on disk: the layouts that are found, and what is read of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import niftis
import numpy as np
import pytest
import torch
from niftis import cut, save, write_case

from prism_meta.data.cases import Case
from prism_meta.data.labels import BRATS_LABELS, LabelSet
from prism_meta.data.layouts.folders import load_cases
from prism_meta.errors import CaseError, PrismError
from prism_meta.modalities import BRATS

LAYOUTS = {
    "plain": ("{modality}.nii.gz", {}),
    "plain, not compressed": ("{modality}.nii", {}),
    "BraTS 2018": ("{case}_{modality}.nii.gz", {}),
    "BraTS 2018, not compressed": ("{case}_{modality}.nii", {}),
    "BraTS 2023": (
        "{case}-{modality}.nii.gz", {"flair": "t2f", "t1ce": "t1c", "t1": "t1n", "t2": "t2w"}
    ),
    "gadolinium": ("{case}_{modality}.nii", {"t1ce": "T1Gd"}),
    "upper case": ("{case}_{modality}.NII.GZ", {m: m.upper() for m in (*BRATS, "seg")}),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path: Path, layout: str) -> None:
    names, renamed = LAYOUTS[layout]
    ids = ["BraTS-GLI-00000-000", "BraTS-GLI-00001-000"]
    for k, case_id in enumerate(ids):
        folder = write_case(tmp_path / "written" / case_id, missing=BRATS[: 2 * k])
        (tmp_path / "cases" / case_id).mkdir(parents=True)
        for path in folder.iterdir():
            name = path.name.removesuffix(".nii.gz").removeprefix(f"{case_id}_")
            new = names.format(case=case_id, modality=renamed.get(name, name))
            nib.save(nib.load(path), tmp_path / "cases" / case_id / new)

    cases = load_cases(tmp_path / "cases")

    assert [case.id for case in cases] == ids
    assert [case.availability.tolist() for case in cases] == [
        [True] * 4,
        [False, False, True, True],
    ]
    for case in cases:
        volume = case.read()
        assert list(volume.images) == list(case.files)
        for name, image in volume.images.items():
            expected = niftis.draw_image(index=BRATS.index(name))
            np.testing.assert_array_equal(image, expected, err_msg=name)
        assert volume.label is not None
        np.testing.assert_array_equal(volume.label, niftis.draw_label())


def test_case_is_written_as_files_and_nothing_else(tmp_path: Path) -> None:
    folder = write_case(tmp_path / "p0", missing=("t1",))
    (case,) = load_cases(tmp_path)
    assert case == Case(
        "p0",
        BRATS,
        files={m: folder / f"p0_{m}.nii.gz" for m in ("flair", "t1ce", "t2")},
        label=folder / "p0_seg.nii.gz",
    )


def test_cases_without_label_are_taken(tmp_path: Path) -> None:
    write_case(tmp_path / "p0", label=None)
    (case,) = load_cases(tmp_path)
    assert case.label is None
    assert case.read().label is None


def test_read_without_label(tmp_path: Path) -> None:
    folder = write_case(tmp_path / "p0")
    (case,) = load_cases(tmp_path)
    cut(folder / "p0_seg.nii.gz")  # its voxels are not read, so this does not matter
    assert case.read(with_label=False).label is None


def test_nested_folders_are_searched_and_sorted_by_name(tmp_path: Path) -> None:
    write_case(tmp_path / "LGG" / "a")
    write_case(tmp_path / "HGG" / "sub" / "c")
    write_case(tmp_path / "HGG" / "b")
    (tmp_path / "HGG" / "survival.csv").write_text("a table beside the cases is no case")
    assert [case.id for case in load_cases(tmp_path)] == ["a", "b", "c"]


def test_symlinked_files_and_folders(tmp_path: Path) -> None:
    source = write_case(tmp_path / "elsewhere" / "x", names="{modality}.nii.gz")
    linked = tmp_path / "cases" / "p0"
    linked.mkdir(parents=True)
    for name in ("flair.nii.gz", "t2.nii.gz", "seg.nii.gz"):
        (linked / name).symlink_to(source / name)
    (tmp_path / "cases" / "p1").symlink_to(source)
    cases = load_cases(tmp_path / "cases")
    assert [(c.id, list(c.files)) for c in cases] == [("p0", ["flair", "t2"]), ("p1", list(BRATS))]
    np.testing.assert_array_equal(cases[0].read().images["t2"], niftis.draw_image(index=3))


def test_a_folder_that_is_one_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_case(tmp_path / "p7")
    monkeypatch.chdir(folder)
    for root in (folder, str(folder), Path(), Path("../p7")):
        (case,) = load_cases(root)
        assert case.id == "p7"
        assert set(case.files) == set(BRATS)
        assert case.read().label is not None


def test_hidden_files_and_folders_are_skipped(tmp_path: Path) -> None:
    folder = write_case(tmp_path / "p0", missing=("t1",))
    for name in ("._p0_flair.nii.gz", "._p0_t1.nii.gz", ".p0_seg.nii.gz", ".DS_Store"):
        (folder / name).write_text("not an image")
    (tmp_path / ".trash").mkdir()
    (tmp_path / ".trash" / "t1.nii.gz").write_text("not an image")
    (case,) = load_cases(tmp_path)
    assert list(case.files) == ["flair", "t1ce", "t2"]


def test_other_files_are_skipped(tmp_path: Path) -> None:
    folder = write_case(tmp_path / "p0", missing=("t2",))
    for name in ("p0_t2.txt", "p0_t2.nii.gz.bak", "p0_dwi.nii.gz", "t2.json", "p0t2.nii.gz"):
        (folder / name).write_text("not an image")
    (case,) = load_cases(tmp_path)
    assert list(case.files) == ["flair", "t1ce", "t1"]


@pytest.mark.parametrize(
    "names", ["{modality}.nii.gz", "{case}_{modality}.nii", "x-{modality}.nii"]
)
def test_t1_never_matches_t1ce(tmp_path: Path, names: str) -> None:
    write_case(tmp_path / "p0", missing=("t1",), names=names)
    write_case(tmp_path / "p1", missing=("t1ce",), names=names)
    first, second = load_cases(tmp_path)
    assert list(first.files) == ["flair", "t1ce", "t2"]
    assert list(second.files) == ["flair", "t1", "t2"]


def test_custom_modalities_and_label(tmp_path: Path) -> None:
    modalities = ("flair", "t1", "t1post", "t2")
    options: dict[str, Any] = {
        "modalities": modalities,
        "label": "lesion",
        "names": "{modality}.nii.gz",
    }
    write_case(tmp_path / "p0", **options)
    write_case(tmp_path / "p1", missing=("t1",), **options)
    first, second = load_cases(tmp_path, modalities, label="lesion")
    assert first.modalities == modalities
    assert {n: p.name for n, p in first.files.items()} == {m: f"{m}.nii.gz" for m in modalities}
    assert first.label == tmp_path / "p0" / "lesion.nii.gz"
    assert list(second.files) == ["flair", "t1post", "t2"]
    assert load_cases(tmp_path, modalities)[0].label is None, "the label has another name"


def test_an_absent_file_is_a_missing_modality_and_never_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_case(tmp_path / "p0", missing=("t1ce", "t1"))
    there = {folder / f"p0_{n}.nii.gz" for n in ("flair", "t2", "seg")}
    opened = niftis.record_reads(monkeypatch)
    (case,) = load_cases(tmp_path)
    assert case.availability.tolist() == [True, False, False, True]
    assert set(opened) == there
    opened.clear()
    assert list(case.read().images) == ["flair", "t2"]
    assert set(opened) == there


def test_volume_carries_the_files_grid(tmp_path: Path) -> None:
    write_case(tmp_path / "p0", spacing=(1.0, 0.5, 2.0), codes="PSL")
    volume = load_cases(tmp_path)[0].read()
    assert volume.shape == (24, 16, 20)
    assert volume.spacing == pytest.approx((0.5, 2.0, 1.0))
    assert nib.aff2axcodes(volume.affine) == ("P", "S", "L")
    assert {image.shape for image in volume.images.values()} == {volume.shape}
    assert {image.dtype for image in volume.images.values()} == {np.dtype(np.float32)}


def test_a_fourth_axis_of_one_is_dropped(tmp_path: Path) -> None:
    folder = write_case(tmp_path / "p0", missing=("t1",), names="{modality}.nii.gz")
    image = niftis.draw_image()[..., None]
    save(image, folder / "t1.nii.gz", niftis.affine_of((1, 1, 1)))
    (case,) = load_cases(tmp_path)
    np.testing.assert_array_equal(case.read().images["t1"], image[..., 0])


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_restrict(tmp_path: Path, kind: Callable[[list[bool]], torch.Tensor | list[bool]]) -> None:
    write_case(tmp_path / "p0", missing=("t2",))
    (case,) = load_cases(tmp_path)
    shown = case.restrict(kind([True, False, True, True]))
    assert list(shown.files) == ["flair", "t1"]
    assert shown.availability.tolist() == [True, False, True, False], "t2 has no file to show"
    assert (shown.id, shown.modalities, shown.label) == (case.id, case.modalities, case.label)
    assert list(case.files) == ["flair", "t1ce", "t1"], "the case itself stays as it was"
    with pytest.raises(ValueError, match="shorter"):
        case.restrict(kind([True, False]))


def test_errors_are_one_kind() -> None:
    """The command line catches ``PrismError``; research code may catch ``ValueError``."""
    assert issubclass(CaseError, PrismError)
    assert issubclass(PrismError, ValueError)


# Real cases


def test_real_brats_cases() -> None:
    cases = load_cases(niftis.real_data() / "brats-tcga")
    assert len(cases) == 13
    assert all(case.availability.all() and case.label is not None for case in cases)
    assert all(case.id.startswith("Brats18_TCIA") for case in cases)
    volume = cases[0].restrict([False, True, False, False]).read()
    assert list(volume.images) == ["t1ce"]
    assert volume.shape == (240, 240, 155)
    assert volume.spacing == pytest.approx((1, 1, 1))
    assert volume.label is not None
    assert BRATS_LABELS.encode(volume.label).unique().tolist() == [0, 1, 2, 3]


def test_real_lesion_cases() -> None:
    modalities = ("flair", "t1", "t1post", "t2")
    cases = load_cases(niftis.real_data() / "ms-lesions", modalities, label="lesion")
    assert [case.id for case in cases] == ["patient19", "patient26"]
    assert all(case.availability.all() and case.label is not None for case in cases)
    volume = cases[0].restrict([True, False, False, False]).read()
    assert volume.shape == (182, 218, 182)
    assert volume.label is not None
    assert LabelSet({"lesion": 1}).encode(volume.label).unique().tolist() == [0, 1]
