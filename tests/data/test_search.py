"""Which folders are cases: links, outputs of the package, and good cases beside damaged ones."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from helpers import faults_of
from niftis import cut, write_case, write_cases

from prism_meta.data.layouts.folders import find_cases, load_cases
from prism_meta.data.layouts.search import OUTPUT_MARKS

PARENT = ("..", "../..", "../../..")


def ids(root: Path) -> list[str]:
    return [case.id for case in load_cases(root)]


@pytest.mark.parametrize("target", [*PARENT, ".", "../p1", "/"])
@pytest.mark.parametrize("count", [1, 2])
def test_links_to_parents_end(tmp_path: Path, target: str, count: int) -> None:
    root = write_cases(tmp_path / "cases", 2, missing=("t1", "t2", "t1ce"))
    for k in range(count):
        (root / "p0" / f"up{k}").symlink_to(target)
        (root / f"root{k}").symlink_to(root)
    assert ids(root) == ["p0", "p1"]


def test_links_that_form_a_cycle(tmp_path: Path) -> None:
    root = write_cases(tmp_path / "cases", 2, missing=("t1", "t2", "t1ce"))
    for name in ("a", "b"):
        (root / name).mkdir()
    (root / "a" / "to_b").symlink_to(root / "b")
    (root / "b" / "to_a").symlink_to(root / "a")
    (root / "x").symlink_to(root / "y")
    (root / "y").symlink_to(root / "x")
    (root / "self").symlink_to("self")
    assert ids(root) == ["p0", "p1"]


def test_a_folder_counts_once_under_its_own_name(tmp_path: Path) -> None:
    root = write_cases(tmp_path / "cases", 2)
    (root / "a_link").symlink_to(root / "p1")
    elsewhere = write_case(tmp_path / "elsewhere" / "x", names="{modality}.nii.gz")
    (root / "first").symlink_to(elsewhere)
    (root / "second").symlink_to(elsewhere)
    assert ids(root) == ["first", "p0", "p1"]


def test_a_link_to_nothing_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_cases(tmp_path / "cases", 1)
    (root / "p1").symlink_to(tmp_path / "lost")
    assert ids(root) == ["p0"]
    assert caplog.messages == [f"{root / 'p1'} is a link to nothing and is skipped"]


@pytest.mark.parametrize("mark", OUTPUT_MARKS)
def test_outputs_are_no_cases(tmp_path: Path, mark: str) -> None:
    root = write_cases(tmp_path / "cases", 2)
    write_case(root / "out" / "deep" / "p9")
    write_case(root / "out" / "p0")
    (root / "out" / mark).write_text("")
    assert ids(root) == ["p0", "p1"]
    assert faults_of(lambda: load_cases(root / "out")) == (
        f"{root / 'out'}: has {mark}, so it is an output of prism-meta, expected a folder of cases; "
        f"give the folder of the cases, or rename {mark} if it is yours",
    )


def test_good_cases_are_found_beside_damaged_ones(tmp_path: Path) -> None:
    root = write_cases(tmp_path / "cases", 4)
    cut(root / "p1" / "p1_t1.nii.gz")
    (root / "p1" / "p1_t1.nii.gz").write_bytes(b"")
    (root / "p2" / "p2_seg.nii.gz").write_bytes(b"")
    (root / "p4").mkdir()
    cases, faults = find_cases(root)
    assert [case.id for case in cases] == ["p0", "p3"]
    assert [fault.split(":")[0] for fault in faults] == ["case p1", "case p2", "case p4"]
    assert faults_of(lambda: load_cases(root)) == tuple(faults)
    cases, faults = find_cases(root, label=None)
    assert [case.id for case in cases] == ["p0", "p2", "p3"]
    assert all(case.label is None for case in cases)
    assert [fault.split(":")[0] for fault in faults] == ["case p1", "case p4"]


def test_two_folders_of_one_name_are_both_left_out(tmp_path: Path) -> None:
    for folder in ("a/p0", "b/p0", "a/p1"):
        write_case(tmp_path / folder)
    cases, faults = find_cases(tmp_path)
    assert [case.id for case in cases] == ["p1"]
    assert faults == ["case p0: 2 folders of this name; rename all but one"]


def test_folders_that_cannot_be_searched_are_faults(tmp_path: Path) -> None:
    for root in (tmp_path / "no", tmp_path / ("x" * 300), Path("a\0b")):
        cases, (fault,) = find_cases(root)
        assert cases == []
        assert fault == f"{root}: no such folder; give a folder with one folder per case"


def test_names_are_composed_whatever_the_file_system_writes(tmp_path: Path) -> None:
    composed = "Jos\u00e9"
    write_case(tmp_path / unicodedata.normalize("NFD", composed))
    assert ids(tmp_path) == [composed]
    write_case(tmp_path / composed)
    assert faults_of(lambda: load_cases(tmp_path)) == (
        f"case {composed}: 2 folders of this name; rename all but one",
    )


@pytest.mark.parametrize("name", [b"p\xff", b"p\n0", b"p\x1b[31m"])
def test_names_that_tables_cannot_hold(tmp_path: Path, name: bytes) -> None:
    write_case(tmp_path / os.fsdecode(name))
    (fault,) = faults_of(lambda: load_cases(tmp_path))
    fault.encode()
    assert fault.startswith("case p\\") or fault.startswith(r"case p\udcff")
    assert fault.endswith("expected a name that tables can hold; rename the folder")


def test_names_that_are_too_long_for_outputs(tmp_path: Path) -> None:
    write_case(tmp_path / ("\u00e9" * 101), names="{modality}.nii.gz")
    write_case(tmp_path / ("\u00e9" * 100), names="{modality}.nii.gz")
    cases, (fault,) = find_cases(tmp_path)
    assert [case.id for case in cases] == ["\u00e9" * 100]
    assert fault.endswith(
        ": the name has 202 bytes, expected at most 200, because outputs are named after the case; "
        "rename the folder"
    )


def test_a_file_belongs_to_the_longest_name(tmp_path: Path) -> None:
    names = ("t1", "post_t1", "x_seg")
    write_case(tmp_path / "p0", modalities=names)
    (case,) = load_cases(tmp_path, names)
    assert {m: f.name for m, f in case.files.items()} == {m: f"p0_{m}.nii.gz" for m in names}
    assert case.label is not None and case.label.name == "p0_seg.nii.gz"
