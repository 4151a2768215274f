"""Availability: draws at given rates, both forms of tables, and the messages for bad ones."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import niftis
import numpy as np
import pytest
import torch
from helpers import faults_of
from niftis import write_case, write_cases

from prism_meta.data.availability import (
    apply_availability,
    draw_availability,
    drop_modalities,
    read_availability,
)
from prism_meta.data.layouts.folders import load_cases
from prism_meta.errors import CaseError
from prism_meta.modalities import BRATS

PUBLISHED_RATES = ((0.2, 0.4, 0.6, 0.8), (0.1, 0.3, 0.7, 0.9))
RATES = (
    *PUBLISHED_RATES,
    (0.0,),
    (0.0, 0.0),
    (0.5, 0.5),
    (0.0, 0.9, 0.9),
    (0.33, 0.66, 0.5),
    (0.75,) * 4,
)
HEADER = "data_name,mask_id,mask,pos_mask_ids\n"
PUBLISHED = (
    HEADER + 'p0,10,"[True, True, True, False]","[1, 2, 3, 5, 6, 9, 10]"\n'
    'p1,2,"[False, False, True, False]",[2]\n'
)


def table(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "table.csv"
    path.write_text(text)
    return path


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
        f"{path}, line 2 (p0): expected 0 or 1 for each of flair, t1ce, t1, t2; put at least one 1",
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
        f"{path}, line 3 (p0): expected 0 or 1 for each of flair, t1ce, t1, t2; put at least one 1",
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
        f"{path}, line 2 (p0): expected 0 or 1 for each of flair, t1ce, t1, t2; put at least one 1",
    )


def test_all_faults_of_a_table_are_reported_together(tmp_path: Path) -> None:
    path = table(tmp_path, "case,t1,t2\np0,1,0\np1,x,0\np0,1,1\np2,0,0\n")
    assert faults_of(lambda: read_availability(path, ("t1", "t2"))) == (
        f"{path}, line 3 (p1): expected 0 or 1 for each of t1, t2; put at least one 1",
        f"{path}, line 4: case p0 occurs twice; keep one line",
        f"{path}, line 5 (p2): expected 0 or 1 for each of t1, t2; put at least one 1",
    )


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("", "none"),
        ("\n\n,,\n", "none"),
        ("name,t1,t2\np0,1,1\n", "name, t1, t2"),
        ("case,t1\np0,1\n", "case, t1"),
        ("case;t1;t2\np0;1;1\n", "case;t1;t2"),
        ("case\tt1\tt2\np0\t1\t1\n", r"case\tt1\tt2"),
    ],
)
def test_columns_of_neither_form(tmp_path: Path, text: str, got: str) -> None:
    path = table(tmp_path, text)
    assert faults_of(lambda: read_availability(path, ("t1", "t2"))) == (
        f"{path}: got the columns {got}; "
        "expected case,t1,t2 or data_name,mask_id,mask,pos_mask_ids, separated by commas",
    )


def test_columns_without_lines_and_columns_twice(tmp_path: Path) -> None:
    path = table(tmp_path, "case,t1,t2,t1,case,x,,\n,,\n")
    assert faults_of(lambda: read_availability(path, ("t1", "t2"))) == (
        f"{path}: has the column case twice; keep one of them",
        f"{path}: has the column t1 twice; keep one of them",
        f"{path}: has no line below the columns; add a line for each case",
    )


def test_ragged_lines_and_lines_without_a_name(tmp_path: Path) -> None:
    path = table(tmp_path, 'case,t1,t2,note\np0,1,0,"two\nlines"\np1,1,0,x,1\n,1,0\np2,1\np3,1,1\n')
    assert faults_of(lambda: read_availability(path, ("t1", "t2"))) == (
        f"{path}, line 4 (p1): has 5 cells for 4 columns; remove the rest",
        f"{path}, line 5: has no name of a case; add it",
        f"{path}, line 6 (p2): expected 0 or 1 for each of t1, t2; put at least one 1",
    )


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_are_compared_in_one_unicode_form(tmp_path: Path, form: str) -> None:
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    case, modality = "Jos\u00e9", "t\u00e9"
    write_case(
        tmp_path / "cases" / unicodedata.normalize(form, case),
        modalities=("t1", unicodedata.normalize(form, modality)),
    )
    header = f"case,t1,{unicodedata.normalize(other, modality)}"
    path = table(tmp_path, f"{header}\n{unicodedata.normalize(other, case)},0,1\n")
    for names in (("t1", unicodedata.normalize(form, modality)), ("t1", modality)):
        (found,) = load_cases(tmp_path / "cases", names, availability=path)
        assert list(found.files) == [names[1]]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PK\x03\x04\xff\xfe", "'utf-8' codec can't decode"),
        ("case,t1,t2\np0,1,1\n".encode("utf-16"), "'utf-8' codec can't decode"),
        (b'case,t1,t2\np0,1,"1\n', "unexpected end of data"),
        (b"case,t1,t2\n" + b"x" * 200_000 + b",1,1\n", "field larger than field limit"),
    ],
)
def test_content_that_is_no_table(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    (fault,) = faults_of(lambda: read_availability(path, ("t1", "t2")))
    assert fault.startswith(f"{path}: cannot be read as an availability table ({said}")
    assert fault.endswith("; give a CSV file in UTF-8")


def test_what_is_no_file_is_no_table(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("a\0b"), tmp_path / ("x" * 300)):
        (fault,) = faults_of(lambda path=path: read_availability(path, ("t1", "t2")))
        assert "cannot be read as an availability table (" in fault
        assert "\0" not in fault


def test_table_that_cannot_be_read(tmp_path: Path) -> None:
    absent = tmp_path / "absent.csv"
    assert faults_of(lambda: read_availability(absent, BRATS)) == (
        f"{absent}: cannot be read as an availability table "
        "(No such file or directory); give a CSV file in UTF-8",
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
        f"case p0: {path} lists t1ce, t2, but there is no such file; put 0 there",
        f"case p1: not in {path}; add a line for it",
    )
    assert faults_of(lambda: load_cases(tmp_path / "cases", availability=path)) == expected
    cases = load_cases(tmp_path / "cases")
    assert faults_of(lambda: apply_availability(cases, path)) == expected


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


# ---------------------------------------------------------------- draws


@pytest.mark.parametrize("rates", RATES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 7, 10, 26, 101])
def test_every_rate_is_met_to_one_case_and_no_case_is_empty(
    n: int, rates: tuple[float, ...]
) -> None:
    if sum(n - round(n * r) for r in rates) < n:
        with pytest.raises(ValueError, match="so some case would have no modality"):
            draw_availability(n, rates)
        return
    for seed in range(10):
        available = draw_availability(n, rates, seed=seed)
        assert available.dtype == torch.bool
        assert available.shape == (n, len(rates))
        assert bool(available.any(1).all())
        for count, rate in zip((~available).sum(0).tolist(), rates, strict=True):
            assert count == round(n * rate)
            assert abs(count - n * rate) <= 1


@pytest.mark.parametrize("rates", PUBLISHED_RATES, ids=str)
def test_published_rates_are_met_exactly(rates: tuple[float, ...]) -> None:
    missing = (~draw_availability(100, rates)).sum(0).tolist()
    assert missing == [round(100 * r) for r in rates]


def test_as_many_files_as_cases_leave_one_each() -> None:
    available = draw_availability(40, (0.75,) * 4, seed=3)
    assert available.sum(1).tolist() == [1] * 40


def test_the_seed_decides() -> None:
    one, again, other = (draw_availability(50, PUBLISHED_RATES[0], seed=s) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    draw_availability(50, PUBLISHED_RATES[1])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_modalities_are_missing_independently() -> None:
    """Two rates of a half: all four patterns but the empty one turn up, repairs included."""
    available = draw_availability(4000, (0.2, 0.2), seed=0)
    both = available.all(1).double().mean().item()
    assert both == pytest.approx(0.6, abs=1e-9)  # 1 - 0.2 - 0.2 once no case is empty
    assert available.sum(0).tolist() == [3200, 3200]


@pytest.mark.parametrize(
    ("n", "rates"), [(0, (0.5,)), (5, ()), (5, (1.0, 0.0)), (5, (-0.1, 0.0))], ids=str
)
def test_bad_arguments_are_refused(n: int, rates: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"use n >= 1 and rates in \[0, 1\)") as caught:
        draw_availability(n, rates)
    assert str(caught.value).startswith(f"draw_availability: got n={n}, rates={rates}; ")


def test_impossible_rates_are_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"rates: \(0.8, 0.9\) leave 3 files for 10 cases, so some case would have no "
        "modality; use lower rates",
    ):
        draw_availability(10, (0.8, 0.9))


def test_dropped_modalities_and_absent_files_add_up(tmp_path: Path) -> None:
    write_cases(tmp_path / "cases", 4, missing=("t2",))
    cases = load_cases(tmp_path / "cases")
    dropped = drop_modalities(cases, (0.25, 0.25, 0.0, 0.5), seed=0)
    drawn = draw_availability(4, (0.25, 0.25, 0.0, 0.5), seed=0)
    for case, row in zip(dropped, drawn, strict=True):
        assert torch.equal(case.availability, row & torch.tensor([True, True, True, False]))


def test_a_draw_that_hides_every_file_of_a_case_names_the_arguments(tmp_path: Path) -> None:
    write_cases(tmp_path / "cases", 4, missing=("flair", "t1ce", "t1"))
    cases = load_cases(tmp_path / "cases")
    with pytest.raises(CaseError) as caught:
        drop_modalities(cases, (0.0, 0.0, 0.0, 0.25), seed=0)
    (fault,) = caught.value.faults
    assert fault.endswith(
        ": has only t2, which this draw hides; use an availability table, lower rates or another seed"
    )
    assert fault.arguments == ("table", "rates", "seed")
