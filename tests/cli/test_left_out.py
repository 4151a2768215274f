"""Evaluation leaves damaged cases out, says so wherever its numbers stand, and measures the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from broken import whole
from broken.predictions import IMAGES, LABELS, arguments
from commands import errors, run, settings
from niftis import cut, write_cases

from prism_meta.errors import PrismError
from prism_meta.evaluation.predictor import Predictor
from prism_meta.training.run import Run

pytestmark = pytest.mark.usefixtures("without_drawing")

DAMAGES = {
    **{f"image {what}": IMAGES[what] for what in ("truncated", "with a NaN", "that exists twice")},
    **{f"label {what}": LABELS[what] for what in ("missing", "with a NaN", "of another place")},
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The records of p0 and p2, without p1."""
    folder = tmp_path_factory.mktemp("expected")
    root, _ = whole.cases(folder), whole.trained(folder)
    (root / "p1").rename(folder / "p1")
    assert run(*arguments("evaluate", folder))[0] == 0
    page = (folder / "report" / "report.html").read_text()
    assert "Cases that were left out" not in page
    return (folder / "report" / "records.csv").read_bytes()


@pytest.mark.parametrize("what", DAMAGES)
def test_others_are_measured_as_if_the_damaged_case_were_not_there(
    tmp_path: Path, expected: bytes, what: str
) -> None:
    root, _ = whole.cases(tmp_path), whole.trained(tmp_path)
    DAMAGES[what](root / "p1")
    code, output = run(*arguments("evaluate", tmp_path))
    (fault,) = errors(output)
    assert code == 2 and fault.startswith("case p1: ")
    out = tmp_path / "report"
    assert (out / "records.csv").read_bytes() == expected
    assert json.loads((out / "summary.json").read_text())["left_out"] == [fault]
    page = (out / "report.html").read_text()
    assert "Cases that were left out" in page and "<li>case p1: " in page
    assert "2 cases, every subset" in page
    # The caption is broken to the width of the table, even within long words.
    assert "".join(f"Cases that were left out: {fault}".split()) in "".join(output.split())


def test_a_table_says_nothing_if_no_case_was_left_out(tmp_path: Path) -> None:
    whole.cases(tmp_path), whole.trained(tmp_path)
    code, output = run(*arguments("evaluate", tmp_path))
    assert code == 0 and "left out" not in output
    assert json.loads((tmp_path / "report/summary.json").read_text())["left_out"] == []


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run that held p1 and p3 out, beside its cases."""
    root = write_cases(tmp_path / "cases", 4)
    options = settings("training.steps=1", 'data.test_cases=["p1", "p3"]')
    assert run("train", root, "--out", tmp_path / "run", *options)[0] == 0
    return tmp_path / "run"


def test_only_the_cases_that_were_held_out_matter(tmp_path: Path, trained: Path) -> None:
    cut(tmp_path / "cases" / "p0" / "p0_t1.nii.gz")
    (tmp_path / "cases" / "p2" / "p2_t1.nii.gz").write_bytes(b"not an image")
    code, output = run("evaluate", trained)
    assert (code, errors(output)) == (0, [])


def test_a_held_out_case_that_is_gone(tmp_path: Path, trained: Path) -> None:
    root = tmp_path / "cases"
    (root / "p3").rename(tmp_path / "p3")
    (root / "p0" / "p0_t1.nii.gz").write_bytes(b"not an image")
    code, output = run("evaluate", trained)
    assert (code, errors(output)) == (
        2,
        [f"case p3: was held out, but is not in {root}; restore it, or give a folder of cases"],
    )
    assert "p1," in (trained / "evaluation" / "records.csv").read_text()


def test_the_folder_of_the_cases_is_gone(tmp_path: Path, trained: Path) -> None:
    (tmp_path / "cases").rename(tmp_path / "moved")
    code, output = run("evaluate", trained)
    (fault,) = errors(output)
    assert code == 2 and fault.startswith(f"{tmp_path / 'cases'}: no such folder; ")
    assert not (trained / "evaluation").exists()


def test_all_files_of_the_run_are_read_before_the_first_prediction(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(self: Run) -> None:
        raise PrismError("metrics.jsonl: line 1 is no object; remove the line")

    monkeypatch.setattr(Run, "history", damaged)
    monkeypatch.setattr(Predictor, "evaluate_case", None)
    code, output = run("evaluate", trained)
    assert (code, errors(output)) == (2, ["metrics.jsonl: line 1 is no object; remove the line"])
    assert not (trained / "evaluation").exists()
