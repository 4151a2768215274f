"""A report of odd input: cases that were left out, names that are no UTF-8, lines of another form."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from prism_meta.errors import OutputError
from prism_meta.records import Record
from prism_meta.report import html, summarize
from prism_meta.report.figures.curves import training_curves, weight_curves
from prism_meta.report.html import REPORT_FILES, write_report
from prism_meta.report.tables import results_table

RECORDS = [Record(f"c{i}", name, "WT", 0.5, 4.0) for name in ("t1", "t1+t2") for i in range(2)]
FAULTS = ("case p1: p1_t1.nii.gz is <empty>; restore it", "case p2: no label file; add one")


def report(folder: Path, **changes: Any) -> Path:
    options: dict[str, Any] = {
        "title": "A run", "records": RECORDS, "modalities": ("t1", "t2"),
        "class_names": ("background", "core"), "policy_statement": "none",
    }  # fmt: skip
    return write_report(folder, **{**options, **changes})


def test_a_page_says_what_was_left_out(tmp_path: Path) -> None:
    page = report(tmp_path, faults=FAULTS).read_text()
    assert "Cases that were left out" in page and "p1_t1.nii.gz is &lt;empty&gt;" in page
    assert json.loads((tmp_path / "summary.json").read_text())["left_out"] == list(FAULTS)
    assert "left out" not in report(tmp_path).read_text()


def test_a_table_says_what_was_left_out() -> None:
    options: dict[str, Any] = {"title": "", "policy": "none", "modalities": ("t1", "t2")}
    for faults in (FAULTS, ()):
        stream = io.StringIO()
        table = results_table(summarize(RECORDS), faults=faults, **options)
        Console(file=stream, width=300).print(table)
        text = "".join(stream.getvalue().split())
        assert ("Casesthatwereleftout:" in text) == bool(faults)
        assert all("".join(fault.split()) in text for fault in faults)


@pytest.mark.parametrize("name", [os.fsdecode(b"p\xff"), "p\udfff", "p\x00", "日本", "a\nb"])
def test_names_of_every_kind_are_written(tmp_path: Path, name: str) -> None:
    records = [Record(f"{i}{name}", "t1", f"{name}", 0.5, 4.0) for i in range(2)]
    report(tmp_path, records=records, title=name, faults=[name], facts={name: name})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (name if name == "日本" else "p") in page
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["title"]


ODD: list[Any] = [
    {}, {"step": 1}, {"train_loss": "high"}, {"step": "one", "train_loss": 1.0}, {"terms": []},
    {"terms": {"fuse": "a"}}, {"terms": {"fuse": [1, "a", None]}}, {"terms": {"fuse": {"a": 1}}},
    {"terms": {"shown": [1], "preference": [1.0, 2.0, 3.0], "delta": "abc"}},
    {"terms": {"shown": "ab", "preference": [1.0, 2.0]}}, {"terms": {"shown": None, "delta": [1.0]}},
    {"epoch": None, "terms": {"beta": [1.0, 2.0]}}, {"epoch": [1], "terms": {"beta": 3}},
    {"step": 10**400, "train_loss": 10**400}, {"step": math.inf, "train_loss": math.nan},
    {"train_loss": True}, [], "text", 3, None, [1, 2], {"validation": 3}, {"validation": {"last": 3}},
    {"validation": {"last": {"dice": "high", "worst": None}, "ema": []}},
]  # fmt: skip


@pytest.mark.parametrize("line", ODD, ids=str)
def test_lines_of_the_history_may_lack_everything(line: Any) -> None:
    good = {"step": 2, "epoch": 1, "train_loss": 1.0, "terms": {"fuse": 1.0, "beta": [1.0, 2.0]}}
    for curves in (training_curves, weight_curves):
        curves([line], ("t1", "t2"))
        assert curves([good, line, good], ("t1", "t2")) is not None


def test_all_three_files_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in REPORT_FILES}
    write = html.write_records

    def full(*arguments: Any) -> None:
        write(*arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(html, "write_records", full)
    with pytest.raises(OutputError, match="no space left on device; "):
        report(tmp_path, title="Another run")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", REPORT_FILES)
def test_a_folder_in_the_place_of_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(OutputError, match=rf"cannot write .*{name}: is a directory; "):
        report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
