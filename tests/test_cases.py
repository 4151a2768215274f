"""Cases on disk: the layouts that are found, and what is said of the files that cannot be used."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import niftis
import numpy as np
import pytest
import torch
from niftis import SHAPE, save, write_case, write_cases

from prism_meta.cases import (
    Case,
    apply_availability,
    load_cases,
    read_availability,
)
from prism_meta.errors import CaseError, PrismError
from prism_meta.labels import BRATS_LABELS, LabelSet
from prism_meta.modalities import BRATS

KEEP = "restore it or remove it (a missing modality is allowed)"
HEADER = "data_name,mask_id,mask,pos_mask_ids\n"
PUBLISHED = (
    HEADER + 'p0,10,"[True, True, True, False]","[1, 2, 3, 5, 6, 9, 10]"\n'
    'p1,2,"[False, False, True, False]",[2]\n'
)


def faults_of(action: Callable[[], object]) -> tuple[str, ...]:
    with pytest.raises(CaseError) as caught:
        action()
    assert str(caught.value) == "\n".join(caught.value.faults)
    return caught.value.faults


def table(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "table.csv"
    path.write_text(text)
    return path


# Layouts

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
        {m: folder / f"p0_{m}.nii.gz" for m in ("flair", "t1ce", "t2")},
        folder / "p0_seg.nii.gz",
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
        "resample them to one grid",
    )


def test_label_of_another_shape(tmp_path: Path) -> None:
    folder = write_case(tmp_path / "p0", label=None)
    save(niftis.draw_label((24, 20, 16)), folder / "seg.nii.gz", niftis.affine_of((1, 1, 1)))
    assert faults_of(lambda: load_cases(tmp_path)) == (
        "case p0: seg.nii.gz has shape (24, 20, 16), but p0_flair.nii.gz has (20, 24, 16); "
        "resample them to one grid",
    )


def test_different_affines(tmp_path: Path) -> None:
    folder = write_case(tmp_path / "p0", missing=("t2",))
    save(niftis.draw_image(), folder / "t2.nii.gz", niftis.affine_of((1, 1, 1), (-9, 5, 33.5)))
    assert faults_of(lambda: load_cases(tmp_path)) == (
        "case p0: t2.nii.gz and p0_flair.nii.gz have different affines (by up to 2.5); "
        "resample them to one grid",
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
        "case p0: t1.nii has an affine that gives its voxels no volume; "
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


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])


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


def store_colour(path: Path) -> None:
    colour = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    save(colour, path, niftis.affine_of((1, 1, 1)))


# Damage, suffix of the file, and a word of the reason that nibabel or gzip gives.
DAMAGES = [
    (cut, ".nii.gz", "end-of-stream"),
    (cut, ".nii", "Expected"),
    (cut_in_header, ".nii.gz", "Cannot work out file type"),
    (cut_in_header, ".nii", "Cannot work out file type"),
    (write_text, ".nii.gz", "is not a gzip file"),
    (write_text, ".nii", "Cannot work out file type"),
    (empty, ".nii.gz", "Empty file"),
    (empty, ".nii", "Empty file"),
    (spoil_start, ".nii.gz", ""),
    (spoil_type, ".nii", "data code 999"),
]
DAMAGED = [(which, *damage) for which in ("t1", "seg") for damage in DAMAGES]
# gzip and nibabel notice no change within the code words of an image; a label has few of them.
DAMAGED.append(("seg", spoil_middle, ".nii.gz", "Error -3"))
# A label in colour can be read; its values are then not in the label set.
DAMAGED.append(("t1", store_colour, ".nii.gz", "DType"))


@pytest.mark.parametrize(("which", "damage", "suffix", "reason"), DAMAGED)
def test_damaged_files(
    tmp_path: Path, which: str, damage: Callable[[Path], None], suffix: str, reason: str
) -> None:
    folder = write_case(tmp_path / "p0", names="{modality}" + suffix)
    damage(folder / f"{which}{suffix}")
    fix = KEEP if which == "t1" else "restore it"
    (fault,) = faults_of(lambda: [case.read() for case in load_cases(tmp_path)])
    start, end = f"case p0: {which}{suffix} cannot be read as NIfTI (", f"); {fix}"
    assert fault.startswith(start)
    assert fault.endswith(end)
    said = fault.removeprefix(start).removesuffix(end)
    assert said and reason in said
    assert len(said) <= 120, "one line, however much the reader says"


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
        "case p3: 2 files for 't2' (p3_t2.nii.gz, x_t2.nii.gz)",
        "case p1: t1.nii.gz has shape (20, 24, 15), but flair.nii.gz has (20, 24, 16)",
        f"case p1: t2.nii.gz cannot be read as NIfTI (Empty file: '{folder.parent}/p1/t2.nii.gz')",
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


# Labels


def test_encode_and_decode() -> None:
    label = niftis.draw_label(values=(2, 1, 4))
    classes = BRATS_LABELS.encode(label)
    assert classes.dtype == torch.uint8
    assert BRATS_LABELS.names == ("background", "necrotic", "oedema", "enhancing")
    for value, index in ((0, 0), (1, 1), (2, 2), (4, 3)):
        assert torch.equal(classes == index, torch.from_numpy(label == value)), value
    decoded = BRATS_LABELS.decode(classes)
    assert decoded.dtype == np.int16
    np.testing.assert_array_equal(decoded, label)
    np.testing.assert_array_equal(BRATS_LABELS.encode(label.astype(np.float64)), classes)


def test_values_above_255_are_labels_too() -> None:
    labels = LabelSet({"cortex": 1035, "lesion": 77})
    assert labels.encode(np.array([0, 77, 1035])).tolist() == [0, 2, 1]
    assert labels.decode(torch.tensor([0, 2, 1])).tolist() == [0, 77, 1035]


def test_regions() -> None:
    classes = torch.tensor([0, 1, 2, 3])
    expected = {
        "WT": [False, True, True, True],
        "TC": [False, True, False, True],
        "ET": [False, False, False, True],
    }
    assert set(BRATS_LABELS.regions) == set(expected)
    for name, where in expected.items():
        assert BRATS_LABELS.region(classes, name).tolist() == where, name
        assert BRATS_LABELS.region(classes.to(torch.uint8), name).tolist() == where, name


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ([0, 3], "3"),
        ([0, 1, -1], "-1"),
        ([0, 2.5], "2.5"),
        ([0, np.nan], "nan"),
        ([9, 8, 7, 6, 5, 3], "3, 5, 6, 7, 8"),
    ],
)
def test_values_outside_the_label_set(values: list[float], named: str) -> None:
    assert faults_of(lambda: BRATS_LABELS.encode(np.array(values))) == (
        f"label values {named} are not in the label set "
        "{0: background, 1: necrotic, 2: oedema, 4: enhancing}; "
        "mend the file or set data.labels",
    )


def test_label_set_faults() -> None:
    assert faults_of(lambda: LabelSet({})) == (
        "labels: none given; name at least one class, e.g. {'lesion': 1}",
    )
    for values in ({"a": 0}, {"a": -1}, {"a": 1, "b": 1}):
        assert faults_of(lambda values=values: LabelSet(values)) == (
            f"labels: got {values}; give each class its own value >= 1 (0 is background)",
        )
    assert faults_of(lambda: LabelSet({"a": 1, "b": 1}, {"all": ("a", "c"), "x": ("d",)})) == (
        "labels: got {'a': 1, 'b': 1}; give each class its own value >= 1 (0 is background)",
        "region 'all': unknown class 'c'; use some of a, b",
        "region 'x': unknown class 'd'; use some of a, b",
    )


# Availability tables


def test_own_table_in_any_column_order(tmp_path: Path) -> None:
    path = table(tmp_path, "t2,site,case,t1,flair,t1ce\n1,x,p0,0,1,0\n 0 ,y,p1,1 ,0,0\n")
    assert read_availability(path, BRATS) == {
        "p0": (True, False, False, True),
        "p1": (False, False, True, False),
    }
    assert read_availability(str(path), ("t1", "t2")) == {"p0": (False, True), "p1": (True, False)}


def test_own_table_as_a_spreadsheet_saves_it(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(b"\xef\xbb\xbfcase,t1,t2\r\np0,1,0\r\n")
    assert read_availability(path, ("t1", "t2")) == {"p0": (True, False)}


def test_published_table(tmp_path: Path) -> None:
    path = table(tmp_path, PUBLISHED)
    assert read_availability(path, ("flair", "t1ce", "t1", "t2")) == {
        "p0": (True, True, True, False),
        "p1": (False, False, True, False),
    }
    # The masks stay in the table's own order whatever the model's is.
    assert read_availability(path, ("t2", "t1", "flair")) == {
        "p0": (False, True, True),
        "p1": (False, True, False),
    }


@pytest.mark.parametrize("column", ["mask", "own"])
def test_cells_are_never_evaluated(tmp_path: Path, column: str) -> None:
    target = tmp_path / "made-by-eval"
    attack = f"__import__('os').mkdir('{target}') or [True, True, True, True]"
    if column == "mask":
        path = table(tmp_path, HEADER + f'p0,1,"{attack}","{attack}"\n')
    else:
        path = table(tmp_path, f'case,flair,t1ce,t1,t2\np0,1,1,1,"{attack}"\n')
    assert faults_of(lambda: read_availability(path, BRATS)) == (
        f"{path}, line 2 (p0): expected 0 or 1 for each of flair, t1ce, t1, t2, at least one 1",
    )
    assert not target.exists()


@pytest.mark.parametrize(
    "row",
    [
        "p0,2,1,1,1",
        "p0,,1,1,1",
        "p0,yes,1,1,1",
        "p0,0.5,1,1,1",
        "p0,0,0,0,0",
        "p0,1,1",
        "p0",
    ],
)
def test_bad_cells_of_an_own_table(tmp_path: Path, row: str) -> None:
    path = table(tmp_path, f"case,flair,t1ce,t1,t2\np1,1,0,0,0\n{row}\n")
    assert faults_of(lambda: read_availability(path, BRATS)) == (
        f"{path}, line 3 (p0): expected 0 or 1 for each of flair, t1ce, t1, t2, at least one 1",
    )


@pytest.mark.parametrize(
    "mask",
    [
        '"[True, True, True]"',
        '"[True, True, True, True, True]"',
        '"[1, 1, 1, 1]"',
        '"[True, None, True, True]"',
        '"(True, True, True, True)"',
        '"[False, False, False, False]"',
        "True",
        "",
        "9" * 5000,
        "[" * 100_000,
        None,
    ],
    ids=lambda mask: str(mask)[:16],
)
def test_bad_masks_of_a_published_table(tmp_path: Path, mask: str | None) -> None:
    path = table(tmp_path, HEADER + ("p0,1\n" if mask is None else f"p0,1,{mask},[1]\n"))
    assert faults_of(lambda: read_availability(path, BRATS)) == (
        f"{path}, line 2 (p0): expected 0 or 1 for each of flair, t1ce, t1, t2, at least one 1",
    )


def test_all_faults_of_a_table_are_reported_together(tmp_path: Path) -> None:
    path = table(tmp_path, "case,t1,t2\np0,1,0\np1,x,0\np0,1,1\np2,0,0\n")
    assert faults_of(lambda: read_availability(path, ("t1", "t2"))) == (
        f"{path}, line 3 (p1): expected 0 or 1 for each of t1, t2, at least one 1",
        f"{path}, line 4: case p0 stands there twice; keep one line",
        f"{path}, line 5 (p2): expected 0 or 1 for each of t1, t2, at least one 1",
    )


@pytest.mark.parametrize(
    ("text", "got"),
    [("", "none"), ("name,t1,t2\np0,1,1\n", "name, t1, t2"), ("case,t1\np0,1\n", "case, t1")],
)
def test_columns_of_neither_form(tmp_path: Path, text: str, got: str) -> None:
    path = table(tmp_path, text)
    assert faults_of(lambda: read_availability(path, ("t1", "t2"))) == (
        f"{path}: got the columns {got}; "
        "expected case,t1,t2 or data_name,mask_id,mask,pos_mask_ids",
    )


def test_table_that_cannot_be_read(tmp_path: Path) -> None:
    absent = tmp_path / "absent.csv"
    assert faults_of(lambda: read_availability(absent, BRATS)) == (
        f"{absent}: cannot be read as an availability table "
        f"([Errno 2] No such file or directory: '{absent}')",
    )
    sheet = tmp_path / "sheet.csv"
    sheet.write_bytes(b"PK\x03\x04\xff\xfe")
    (fault,) = faults_of(lambda: read_availability(sheet, BRATS))
    assert fault.startswith(f"{sheet}: cannot be read as an availability table ('utf-8' codec")


def test_a_table_hides_files_and_they_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cases(tmp_path / "cases", 2)
    cases = load_cases(tmp_path / "cases", availability=table(tmp_path, PUBLISHED))
    assert [list(case.files) for case in cases] == [["flair", "t1ce", "t1"], ["t1"]]
    assert [case.availability.tolist() for case in cases] == [
        [True, True, True, False],
        [False, False, True, False],
    ]
    opened = niftis.record_reads(monkeypatch)
    assert list(cases[1].read().images) == ["t1"]
    assert {path.name for path in opened} == {"p1_t1.nii.gz", "p1_seg.nii.gz"}


def test_a_table_may_hide_more_than_is_missing_and_name_more_cases(tmp_path: Path) -> None:
    write_case(tmp_path / "cases" / "p0", missing=("flair",))
    path = table(tmp_path, "case,flair,t1ce,t1,t2\np9,1,1,1,1\np0,0,1,0,0\n")
    (case,) = load_cases(tmp_path / "cases", availability=path)
    assert list(case.files) == ["t1ce"]


def test_cases_and_files_that_do_not_fit_the_table(tmp_path: Path) -> None:
    write_case(tmp_path / "cases" / "p0", missing=("t1ce", "t2"))
    write_case(tmp_path / "cases" / "p1")
    write_case(tmp_path / "cases" / "p2")
    path = table(tmp_path, "case,flair,t1ce,t1,t2\np0,1,1,0,1\np2,1,1,1,1\n")
    expected = (
        f"case p0: {path} says that t1ce, t2 exists, but there is no such file; put 0 there",
        f"case p1: not in {path}; add a line for it",
    )
    assert faults_of(lambda: load_cases(tmp_path / "cases", availability=path)) == expected
    cases = load_cases(tmp_path / "cases")
    assert faults_of(lambda: apply_availability(cases, path)) == expected


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


@pytest.mark.parametrize(
    ("file", "rates"),
    [
        ("Brats2020_imb_split_mr2468.csv", (0.2, 0.4, 0.6, 0.8)),
        ("Brats2020_imb_split_mr1379.csv", (0.1, 0.3, 0.7, 0.9)),
    ],
)
def test_real_tables(file: str, rates: tuple[float, ...]) -> None:
    path = niftis.real_data() / "splits" / file
    rows = read_availability(path, BRATS)
    assert len(rows) == len(path.read_text().splitlines()) - 1
    missing = 1 - np.mean(list(rows.values()), axis=0)
    # T1 is the most frequent in these tables, then T1ce, FLAIR and T2; the rates are drawn.
    by_modality = dict(zip(BRATS, missing, strict=True))
    assert [by_modality[m] for m in ("t1", "t1ce", "flair", "t2")] == pytest.approx(rates, abs=0.05)
