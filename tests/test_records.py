"""Records on disk: names that a spreadsheet would compute, and damaged files."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import faults_of

from prism_meta import records
from prism_meta.errors import PrismError
from prism_meta.records import Record, read_records, write_records

NAMES = [
    f"{apostrophes}{first}{rest}"
    for apostrophes in ("", "'", "''")
    for first in ("=", "+", "-", "@", "\t", "\r", "\n", "a", "'", '"', ",", ";")
    for rest in ("", "1+1", "'=", ' "x", y')
]


def test_every_name_comes_back_and_none_is_a_formula(tmp_path: Path) -> None:
    written = [Record(name, f"{name}s", f"{name}r", 0.5, 1.0) for name in dict.fromkeys(NAMES)]
    write_records(tmp_path / "r.csv", written)
    assert [repr(r) for r in read_records(tmp_path / "r.csv")] == [repr(r) for r in written]
    raw = (tmp_path / "r.csv").read_bytes().decode()
    for cell in raw.replace('"', "").replace("\r\n", ",").split(","):
        assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))


def test_names_that_are_no_formula_are_written_as_they_are(tmp_path: Path) -> None:
    write_records(tmp_path / "r.csv", [Record("'a", "t1", "WT", 0.5, 1.0)])
    assert "\n'a,t1,WT,0.5,1.0" in (tmp_path / "r.csv").read_text()


HEADER = ",".join(records.HEADER).encode() + b"\n"
REST = b",1,1,1,1,1,1,1"
GOOD = b"p,t1,WT,0.5,1.0" + REST + b"\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            HEADER + GOOD + GOOD,
            "r.csv, line 3: case, subset and region are those of line 2; restore",
        ),
        (HEADER + GOOD + b"q\xff,t1,WT,1,1\n", "r.csv, line 3: 'utf-8' codec can't decode"),
        (HEADER + GOOD + b"q,t1,WT,1,1", "r.csv, line 3: ends without a line break"),
        (
            HEADER + b",t1,WT,1,1" + REST + b"\n",
            "r.csv, line 2: case is empty, expected a name; restore",
        ),
        (
            HEADER + b"p,t1,WT,0_1,1" + REST + b"\n",
            "r.csv, line 2: dice is '0_1', expected a number or nan",
        ),
        (HEADER + b"p" * 200_000 + b",t1,WT,1,1\n", "r.csv, line 2: field larger than field limit"),
        (
            b"",
            "r.csv, line 1: got '', expected 'case,subset,region,dice,hd95_mm,nsd_1mm,predicted_ml,true_ml,"
            "true_lesions,missed_lesions,false_lesions,diagonal_mm'; give a records.csv",
        ),
        (b"x" * 500 + b"\n", "r.csv, line 1: got 'xxx"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value[:40],
)
def test_a_damaged_file_is_named_with_its_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "r.csv").write_bytes(content)
    (fault,) = faults_of(lambda: read_records(tmp_path / "r.csv"), PrismError)
    assert message in fault and "; " in fault and len(fault) < 400


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_bytes(b"\xef\xbb\xbf" + HEADER + GOOD)
    assert read_records(tmp_path / "r.csv") == [
        Record("p", "t1", "WT", 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    ]


def test_every_number_comes_back_and_counts_are_whole_numbers(tmp_path: Path) -> None:
    record = Record("p", "t1", "WT", 0.5, 1.0, 0.25, 1 / 3, 0.0, 12.0, 2.0, 0.0, 300.5)
    write_records(tmp_path / "r.csv", [record])
    assert read_records(tmp_path / "r.csv") == [record]
    line = (tmp_path / "r.csv").read_text().splitlines()[1]
    assert line == "p,t1,WT,0.5,1.0,0.25,0.3333333333333333,0.0,12,2,0,300.5"


def test_a_file_of_an_older_version_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("case,subset,region,dice,hd95_mm\np,t1,WT,0.5,1.0\n")
    (fault,) = faults_of(lambda: read_records(tmp_path / "r.csv"), PrismError)
    assert fault.startswith(
        f"{tmp_path / 'r.csv'}, line 1: got 'case,subset,region,dice,hd95_mm', "
    )
    assert fault.endswith("diagonal_mm'; it is of an older version, so evaluate the run again")


def test_a_file_without_an_end_is_refused() -> None:
    if not Path("/dev/zero").exists():
        pytest.skip("this system has no /dev/zero")
    with pytest.raises(PrismError, match="has more than 268435456 bytes; give"):
        read_records("/dev/zero")
