"""Averages by hand, paired intervals with a known answer, and records on disk."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import bootstrap

from prism_meta.errors import OutputError, PrismError
from prism_meta.records import HEADER, Record, read_records, write_records
from prism_meta.report import Cell, Comparison, compare, summarize

NAN = math.nan

# Two cases, three subsets, two regions; t1+t2 has one undefined HD95, t1 has no HD95 in ET at all.
RECORDS = [
    Record("a", "t2", "WT", 0.8, 2.0), Record("b", "t2", "WT", 0.6, 4.0),
    Record("a", "t2", "ET", 0.5, 6.0), Record("b", "t2", "ET", 0.3, 8.0),
    Record("a", "t1", "WT", 0.4, 10.0), Record("b", "t1", "WT", 0.2, 20.0),
    Record("a", "t1", "ET", 0.0, NAN), Record("b", "t1", "ET", NAN, NAN),
    Record("a", "t1+t2", "WT", 0.9, 1.0), Record("b", "t1+t2", "WT", 0.7, NAN),
    Record("a", "t1+t2", "ET", 1.0, 0.0), Record("b", "t1+t2", "ET", 0.6, 3.0),
]  # fmt: skip


def assert_cell(cell: Cell, dice: float, hd95: float, undefined: int) -> None:
    assert (cell.dice, cell.hd95) == pytest.approx((dice, hd95), nan_ok=True)
    assert (cell.cases, cell.undefined) == (2, undefined)


def test_averages_by_hand() -> None:
    summary = summarize(RECORDS)
    assert_cell(summary.cells["t2", "WT"], 0.7, 3.0, 0)
    assert_cell(summary.cells["t2", "ET"], 0.4, 7.0, 0)
    assert_cell(summary.cells["t1", "WT"], 0.3, 15.0, 0)
    assert_cell(summary.cells["t1", "ET"], 0.0, NAN, 2)
    assert_cell(summary.cells["t1+t2", "WT"], 0.8, 1.0, 1)
    assert_cell(summary.cells["t1+t2", "ET"], 0.8, 1.5, 0)
    # Averages are over cells: an undefined cell is left out, a thin one weighs as the others do.
    assert_cell(summary.by_subset["t2"], 0.55, 5.0, 0)
    assert_cell(summary.by_subset["t1"], 0.15, 15.0, 2)
    assert_cell(summary.by_subset["t1+t2"], 0.8, 1.25, 1)
    assert_cell(summary.by_region["WT"], 0.6, 19 / 3, 1)
    assert_cell(summary.by_region["ET"], 0.4, 4.25, 2)
    assert_cell(summary.overall, 0.5, 27.5 / 5, 3)
    assert (summary.worst, summary.full) == ("t1", "t1+t2")


def test_order_is_of_first_appearance_unless_told() -> None:
    summary = summarize(RECORDS)
    assert summary.subsets == ("t2", "t1", "t1+t2")
    assert summary.regions == ("WT", "ET")
    told = summarize(RECORDS, subset_order=("t1", "t3", "t2", "t1+t2"))
    assert told.subsets == ("t1", "t2", "t1+t2")
    assert_cell(told.overall, summary.overall.dice, summary.overall.hd95, 3)
    with pytest.raises(PrismError, match=r"subset_order: lacks t1\+t2; name every subset"):
        summarize(RECORDS, subset_order=("t1", "t2"))


def test_the_worst_subset_has_a_defined_dice() -> None:
    records = [Record("a", "t1", "ET", NAN, NAN), Record("a", "t2", "ET", 0.9, 1.0)]
    summary = summarize(records)
    assert summary.worst == "t2"
    assert summary.full is None  # t1+t2 was not measured
    assert math.isnan(summary.by_subset["t1"].dice)


def test_to_dict_is_strict_json() -> None:
    data = json.loads(json.dumps(summarize(RECORDS).to_dict(), allow_nan=False))
    (cell,) = (c for c in data["cells"] if (c["subset"], c["region"]) == ("t1", "ET"))
    assert (cell["dice"], cell["hd95_mm"], cell["undefined"]) == (0.0, None, 2)
    assert data["worst_subset"] == "t1"
    assert data["overall"]["dice"] == pytest.approx(0.5)


def test_no_records_and_doubles_are_errors() -> None:
    with pytest.raises(PrismError, match="records: got no records, expected at least one"):
        summarize([])
    with pytest.raises(PrismError, match="case a, subset t2, region WT occurs twice; give each"):
        summarize([*RECORDS, RECORDS[0]])


def runs(n: int = 40) -> tuple[list[Record], list[Record], np.ndarray]:
    """Two runs and the known Dice differences of their cases in WT; those in ET are 0.1 more."""
    gains = np.random.default_rng(1).normal(0.05, 0.02, n)
    a, b = [], []
    for i, gain in enumerate(gains):
        for subset in ("t1", "t2"):
            for region, more in (("WT", 0.0), ("ET", 0.1)):
                a.append(Record(f"c{i}", subset, region, 0.4, 9.0))
                b.append(Record(f"c{i}", subset, region, 0.4 + gain + more, 9.0 - 100 * gain))
    random.Random(0).shuffle(b)  # pairs are found by name, not by place
    return a, b, gains


def test_compare_finds_the_known_difference() -> None:
    a, b, gains = runs()
    result = compare(a, b)
    assert result.cases == 40
    assert result.overall.dice.mean == pytest.approx(gains.mean() + 0.05)
    assert result.by_region["WT"].dice.mean == pytest.approx(gains.mean())
    assert result.by_region["ET"].dice.mean == pytest.approx(gains.mean() + 0.1)
    assert result.by_subset["t2"].dice.mean == pytest.approx(gains.mean() + 0.05)
    assert result.overall.hd95.mean == pytest.approx(-100 * gains.mean())
    wt = result.by_region["WT"].dice
    assert wt.low < 0.05 < wt.high
    # The interval is that of the cases; of the records it would be too narrow by half.
    expected = bootstrap(
        (gains,), np.mean, method="percentile", rng=np.random.default_rng(5)
    ).confidence_interval
    assert (wt.low, wt.high) == pytest.approx((expected.low, expected.high), abs=3e-4)
    both = result.overall.dice
    assert both.high - both.low == pytest.approx(wt.high - wt.low)
    assert wt.excludes_zero and not compare(a, a).overall.dice.excludes_zero


def test_compare_is_b_minus_a() -> None:
    a, b, _ = runs()
    there, back = compare(a, b).overall.dice, compare(b, a).overall.dice
    assert there.mean > 0
    assert (back.mean, back.low, back.high) == pytest.approx((-there.mean, -there.high, -there.low))


def test_compare_repeats_with_its_seed() -> None:
    a, b, _ = runs(8)
    first: Comparison = compare(a, b, seed=3, resamples=500)
    assert first == compare(a, b, seed=3, resamples=500)
    assert first.overall.dice.low != compare(a, b, seed=4, resamples=500).overall.dice.low
    assert (first.seed, first.resamples) == (3, 500)


def test_compare_leaves_undefined_pairs_out() -> None:
    a = [Record(c, "t1", "WT", 0.5, h) for c, h in (("x", 1.0), ("y", NAN), ("z", 5.0))]
    b = [Record(c, "t1", "WT", 0.6, h) for c, h in (("x", 2.0), ("y", 3.0), ("z", 8.0))]
    result = compare(a, b)
    assert result.overall.hd95.mean == pytest.approx(2.0)
    assert (result.overall.hd95.cases, result.overall.dice.cases, result.undefined) == (2, 3, 1)
    assert (result.overall.hd95.low, result.overall.hd95.high) == (1.0, 3.0)


def test_one_case_has_no_interval() -> None:
    a, b = [Record("x", "t1", "WT", 0.5, 1.0)], [Record("x", "t1", "WT", 0.75, NAN)]
    result = compare(a, b)
    assert result.overall.dice.mean == 0.25
    assert math.isnan(result.overall.dice.low) and math.isnan(result.overall.dice.high)
    assert not result.overall.dice.excludes_zero
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["overall"]["dice"] == {"mean": 0.25, "low": None, "high": None, "cases": 1}
    assert data["by_region"]["WT"]["hd95_mm"]["mean"] is None


def test_records_that_do_not_pair() -> None:
    a, b, _ = runs(3)
    lost = [r for r in b if (r.case, r.subset) != ("c1", "t2")]
    with pytest.raises(
        PrismError,
        match="2 records do not pair, the first is case c1, subset t2, region WT, only in a; "
        "evaluate both runs on the same cases and subsets",
    ):
        compare(a, lost)
    with pytest.raises(PrismError, match=r"region .., only in b; evaluate both"):
        compare(lost, b)
    with pytest.raises(PrismError, match="resamples: got 0, expected at least 1"):
        compare(a, b, resamples=0)


def test_records_come_back(tmp_path: Path) -> None:
    odd = Record('name, "quoted"\nof ümlauts', "t1", "WT", 1 / 3, NAN)
    path = tmp_path / "deep" / "records.csv"
    write_records(path, [*RECORDS, odd])
    assert path.read_text(encoding="utf-8").splitlines()[0] == ",".join(HEADER)
    back = read_records(path)
    assert [repr(r) for r in back] == [repr(r) for r in [*RECORDS, odd]]
    assert [p.name for p in path.parent.iterdir()] == ["records.csv"]


def test_a_failed_write_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "records.csv"
    write_records(path, RECORDS)
    with pytest.raises(TypeError):
        write_records(path, [*RECORDS, None])  # type: ignore[list-item]
    assert len(read_records(path)) == len(RECORDS)
    with pytest.raises(OutputError, match="cannot write"):
        write_records(tmp_path, RECORDS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x,t1,WT,0.5,1,1,1,1,1,1,1", r"line 3: got 11 values, expected 12: case, subset"),
        ("x,t1,WT,good,1,1,1,1,1,1,1,1", r"line 3: dice is 'good', expected a number or nan"),
        (
            "x,t1,WT,50.0,1,1,1,1,1,1,1,1",
            r"line 3: dice is 50.0, expected a number in \[0, 1\], or nan",
        ),
        (
            "x,t1,WT,0.5,-1,1,1,1,1,1,1,1",
            r"line 3: hd95_mm is -1, expected a number in mm, 0 or more, or nan",
        ),
        ("x,t1,WT,0.5,inf,1,1,1,1,1,1,1", r"line 3: hd95_mm is inf, expected"),
        (
            "x,t1,WT,0.5,1,2,1,1,1,1,1,1",
            r"line 3: nsd_1mm is 2, expected a number in \[0, 1\], or nan",
        ),
        (
            "x,t1,WT,0.5,1,1,-1,1,1,1,1,1",
            r"line 3: predicted_ml is -1, expected a number in ml, 0 or more",
        ),
        (
            "x,t1,WT,0.5,1,1,1,1,1,.5,1,1",
            r"line 3: missed_lesions is .5, expected a whole number, 0 or",
        ),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(f"{','.join(HEADER)}\nx,t1,TC,0.5,1,1,1,1,1,1,1,1\n{line}\n")
    with pytest.raises(PrismError, match=rf"bad\.csv, {message}"):
        read_records(path)


def test_bad_lines_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(",".join(HEADER) + "\n" + "x;t1;WT;0,5;1\n" * 14)
    with pytest.raises(PrismError) as caught:
        read_records(path)
    assert len(caught.value.faults) == 11
    assert caught.value.faults[-1].endswith(
        "and 4 more invalid lines; restore the file or evaluate again"
    )


def test_files_that_are_no_records(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("name,dice\nx,1\n")
    with pytest.raises(PrismError, match=r"other\.csv, line 1: got 'name,dice', expected 'case,"):
        read_records(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PrismError, match=r"other\.csv, line 1: .*give a CSV file in UTF-8"):
        read_records(path)
    with pytest.raises(PrismError, match=r"cannot read .*none\.csv: no such file"):
        read_records(tmp_path / "none.csv")
