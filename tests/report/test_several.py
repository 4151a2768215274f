"""Several runs side by side: shared cases, what must match, and the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import CASES, comparison_page, records

from prism_meta.errors import OutputError, PrismError
from prism_meta.records import Record
from prism_meta.report import compare, summarize
from prism_meta.report.runs_page import write_runs_page
from prism_meta.report.several import side_by_side


def run(
    *cases: str, dice: float = 0.5, subsets: str = "t1 t2 t1+t2", regions: str = "WT"
) -> list[Record]:
    return [
        Record(case, subset, region, dice, 4.0)
        for case in cases
        for subset in subsets.split()
        for region in regions.split()
    ]


def test_only_shared_cases_count() -> None:
    a, b = run("p1", "p2", "p3"), [*run("p2", "p3", dice=0.6), *run("p4", dice=0.1)]
    found = side_by_side({"a": a, "b": b, "c": run("p3", "p2", "p9")}, seed=3)
    assert found.cases == ("p2", "p3") and found.first == "a"
    assert found.left_out == {"a": ("p1",), "b": ("p4",), "c": ("p9",)}
    assert found.summaries["b"].overall.dice == pytest.approx(0.6)
    assert list(found.changes) == ["b", "c"]
    assert found.changes["b"] == compare(run("p2", "p3"), run("p2", "p3", dice=0.6), seed=3)
    assert found.note() == (
        "Over the 2 cases that all runs have; left out: a has 1 more (p1); b has 1 more (p4); "
        "c has 1 more (p9)."
    )


def test_the_same_cases_are_said_to_be_the_same() -> None:
    assert side_by_side({"a": run("p1"), "b": run("p1")}).note() == "All runs have the same 1 case."
    many = run(*(f"p{i}" for i in range(9)))
    note = side_by_side({"a": many, "b": run("p8")}).note()
    assert note.endswith("left out: a has 8 more (p0, p1, p2, p3, p4, …).")


def test_differences_of_each_cell() -> None:
    a, b = records(), records(0.05)
    change = side_by_side({"a": a, "b": b}).changes["b"]
    assert len(change.cells) == 15 * 3
    for key, cell in change.cells.items():
        alone = compare(*([r for r in found if (r.subset, r.region) == key] for found in (a, b)))
        assert cell.dice.mean == pytest.approx(alone.overall.dice.mean)
        assert cell.dice.cases == alone.overall.dice.cases
        assert (cell.dice.mean, cell.hd95.mean) == pytest.approx((0.05, 0.0))
    assert change.cells["flair", "ET"].dice.cases == len(CASES) - 1  # one is undefined
    assert len(change.to_dict()["cells"]) == 45


def test_rows_are_by_size_then_in_the_order_of_the_modalities() -> None:
    a = run("p", subsets="t2 t1+t2 t1")
    found = side_by_side({"a": a, "b": run("p")})
    assert [s.subsets for s in found.summaries.values()] == [("t1", "t2", "t1+t2")] * 2
    assert found.modalities == ("t1", "t2")
    # The first case lacks t2, so that its subsets come before those with t2 in the records.
    found = side_by_side({"a": records(), "b": records()})
    assert found.summaries["a"].subsets[3:5] == ("t2", "flair+t1ce")


@pytest.mark.parametrize(
    ("second", "faults"),
    [
        (
            run("p", subsets="t1 pet t1+pet"),
            ("b: has modalities t1, pet, but a has t1, t2; compare runs with the same modalities",),
        ),
        (
            run("p", regions="WT ET"),
            ("b: has regions WT, ET, but a has WT; compare runs with the same regions",),
        ),
        (
            run("p", subsets="t1", regions="TC"),
            (
                "b: has modalities t1, but a has t1, t2; compare runs with the same modalities",
                "b: has regions TC, but a has WT; compare runs with the same regions",
            ),
        ),
        (
            run("q"),
            ("runs: share no case (a has p; b has q); evaluate them on the same folder of cases",),
        ),
        (
            [*run("p", subsets="t1 t2"), *run("q")],
            (
                "1 records do not pair, the first is case p, subset t1+t2, region WT, only in a; "
                "evaluate both runs on the same cases and subsets",
            ),
        ),
        ([], ("b: has no records; evaluate it first",)),
    ],
)
def test_runs_that_cannot_be_compared(second: list[Record], faults: tuple[str, ...]) -> None:
    with pytest.raises(PrismError) as caught:
        side_by_side({"a": run("p"), "b": second})
    assert caught.value.faults == faults


def test_one_run_is_not_several() -> None:
    with pytest.raises(PrismError, match="runs: got 1, expected at least 2; give another run"):
        side_by_side({"a": run("p")})


def words_of(path: Path) -> str:
    html = path.read_text(encoding="utf-8")
    return " ".join(re.sub(r"<(style|script)>.*?</\1>|<[^>]*>", " ", html, flags=re.S).split())


def test_the_page_has_the_numbers(tmp_path: Path) -> None:
    words = words_of(comparison_page(tmp_path))
    assert "Over the 3 cases that all runs have; left out: first has 1 more (p1);" in words
    # Shifts of 0, 0.03 and 0.06; the first case has no t2, so the full subset has two cases.
    full = "● ● ● ● 44.5 43.0 to 46.0 49.5 48.0 to 51.0 40.5 39.0 to 42.0 46.5 45.0 to 48.0 51.5"
    assert full in words
    assert "second &lt;b&gt; minus first" in words
    assert "● ● ● ● +5.0* +5.0 to +5.0 +5.0* +5.0 to +5.0" in words
    assert "-4.0* -4.0 to -4.0" in words and "+0.0 +0.0 to +0.0" in words
    assert "meta.strategy first_order second_order reptile" in words
    assert "prism-meta compare first second third --out runs.html" in words


def test_the_least_page(tmp_path: Path) -> None:
    found = side_by_side({"a": run("p", dice=float("nan")), "b": run("p")})
    words = words_of(write_runs_page(tmp_path / "new" / "runs.html", found))
    assert "Settings that differ" not in words and "How to repeat this page" not in words
    assert "a: 3 records with undefined values are left out." in words
    assert summarize(run("p")).overall.dice == 0.5


def test_a_folder_is_no_page(tmp_path: Path) -> None:
    found = side_by_side({"a": run("p"), "b": run("p")})
    message = f"cannot write {tmp_path}: is a directory; give a file, e.g. {tmp_path / 'runs.html'}"
    with pytest.raises(OutputError, match=re.escape(message)):
        write_runs_page(tmp_path, found)
