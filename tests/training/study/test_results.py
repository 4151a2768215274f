"""The results of a study survive kills and several writers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prism_meta.errors import OutputError, PrismError
from prism_meta.training.study.results import RESULTS, Result, Results


def _result(key: str) -> Result:
    return Result(key, "one  seed 0", 3, 3, 1.23456789, 7, {"p1": {"t1": 1 / 3}}, float("nan"))


def test_what_is_appended_is_read_with_five_digits(tmp_path: Path) -> None:
    Results(tmp_path).append(_result("a"))
    found = Results(tmp_path)["a"]
    assert found.scores["p1"]["t1"] == 0.33333 and found.seconds == 1.2346
    assert found.validation != found.validation


def test_half_a_line_is_made_again_and_harms_no_other(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.append(_result("a"))
    with (tmp_path / RESULTS).open("a") as file:
        file.write('{"key": "b", "tit')
    again = Results(tmp_path)
    assert list(again) == ["a"]
    again.append(_result("c"))
    assert list(Results(tmp_path)) == ["a", "c"]
    assert (tmp_path / RESULTS).read_bytes().count(b"\n") == 2


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / RESULTS).write_text('{"key": 1}\n' + json.dumps({"key": "b"}) + "\n")
    with pytest.raises(PrismError) as error:
        Results(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / RESULTS}, line 1: is no result of a run; remove the line, and the run is made again"
    )


def test_another_process_is_seen(tmp_path: Path) -> None:
    one, two = Results(tmp_path), Results(tmp_path)
    two.append(_result("a"))
    assert "a" not in one
    one.read()
    assert "a" in one


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    results = Results(tmp_path / "file")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        results.append(_result("a"))
