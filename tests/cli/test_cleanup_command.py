"""The clean-up of a run in ``evaluate`` and ``predict``: numbers without it stay, and nothing is mixed up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from commands import errors, run, settings
from niftis import write_cases

import prism_meta as pm
from prism_meta.cli.unfinished import UNFINISHED
from prism_meta.data.cases import Case
from prism_meta.evaluation.cleanup import Cleanup, RegionRule
from prism_meta.evaluation.predictor import Predictor
from prism_meta.training.cleanup.file import CLEANUP, Chosen, read_cleanup, write_cleanup

NAMES = ("p0", "p1", "p2")
#: A rule that leaves nothing of any prediction.
NONE = Cleanup({"WT": RegionRule(total_ml=1000.0)})
MODALITIES = 'data.modalities=["flair","t1"]'


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with validation, beside its cases."""
    folder = tmp_path_factory.mktemp("made")
    root = write_cases(folder / "cases", len(NAMES))
    options = settings(MODALITIES, "validation.cases=1", "validation.every=2", "training.steps=2")
    code, output = run("train", root, "--out", folder / "run", *options)
    assert code == 0, output
    return folder


@pytest.fixture
def trained(made: Path, tmp_path: Path) -> Path:
    """Copies of the run, with the rule ``NONE``, and of its cases."""
    for name in ("run", "cases"):
        shutil.copytree(made / name, tmp_path / name)
    write_cleanup(tmp_path / "run", Chosen(NONE, 0.5, 0.5), cases=["p0"])
    return tmp_path


def evaluate(folder: Path, name: str, *options: object) -> str:
    code, output = run(
        "evaluate", folder / "run", folder / "cases", "--out", folder / name, *options
    )
    assert code == 0, output
    return output


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_training_writes_it_and_resuming_writes_the_same(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(made / "run", out)
    before = (out / CLEANUP).read_bytes()
    stored = json.loads(before)
    (name,) = json.loads((out / "run.json").read_text())["validation"]
    assert stored["cases"] == [name] and list(stored["regions"]) == ["WT", "TC", "ET"]
    best = pm.Run.open(out).history()[-1]["validation"]["best"]["dice"]
    assert (
        stored["dice"] == pytest.approx(best, abs=1e-6) and stored["cleaned_dice"] >= stored["dice"]
    )
    (out / CLEANUP).unlink()
    for command in (("evaluate", out, made / "cases"), ("predict", out, made / "cases", out / "x")):
        code, output = run(*command)
        assert code == 2 and errors(output) == [
            f"{out / CLEANUP}: is missing; choose it again with prism-meta train --resume {out}, or use "
            "--clean-up none"
        ]
    code, output = run("train", "--resume", out)
    assert code == 0, output
    assert (out / CLEANUP).read_bytes() == before


@pytest.mark.usefixtures("without_drawing")
def test_an_evaluation_shows_both(trained: Path) -> None:
    output = evaluate(trained, "both")
    assert "every subset of modalities" in output
    assert "after the clean-up (WT: none if under 1000 ml)" in " ".join(output.split())
    both = trained / "both"
    plain, cleaned = (pm.read_records(both / n) for n in ("records.csv", "records_cleaned.csv"))
    assert [(r.case, r.subset, r.region) for r in plain] == [
        (r.case, r.subset, r.region) for r in cleaned
    ]
    assert any(r.predicted_ml > 0 for r in plain)
    assert all(r.predicted_ml == 0 and r.dice == 0 and r.false_lesions == 0 for r in cleaned)
    assert [r.true_ml for r in cleaned] == [r.true_ml for r in plain]
    summary = json.loads((both / "summary.json").read_text())
    assert summary["cleaned"]["rules"] == "WT: none if under 1000 ml"
    assert summary["cleaned"]["overall"]["dice"] == 0 and summary["overall"]["dice"] > 0
    page = (both / "report.html").read_text()
    assert "After the clean-up" in page and f"{100 * summary['overall']['dice']:.1f} → 0.0" in page
    # Without it the same file of records, and nothing is left of the other.
    output = evaluate(trained, "both", "--clean-up", "none")
    assert "after the clean-up" not in output
    assert sorted(content(both)) == ["records.csv", "report.html", "summary.json"]
    assert pm.read_records(both / "records.csv") == plain
    assert "cleaned" not in json.loads((both / "summary.json").read_text())
    assert "After the clean-up" not in (both / "report.html").read_text()
    evaluate(trained, "both", "--clean-up", "brats")
    (rules,) = {json.loads((both / "summary.json").read_text())["cleaned"]["rules"]}
    assert rules == "ET: none if under 0.5 ml"


class Killed(BaseException):
    """Stands for a signal."""


@pytest.mark.usefixtures("without_drawing")
def test_an_interrupted_evaluation_ends_with_the_same_bytes(trained: Path) -> None:
    evaluate(trained, "whole")
    evaluate_case = Predictor.evaluate_case
    measured: list[str] = []

    def watched(self: Predictor, case: Case, *, on_prediction: object) -> list[pm.Record]:
        if killed is not None and case.id == killed:
            raise Killed
        measured.append(case.id)
        return evaluate_case(self, case, on_prediction=on_prediction)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Predictor, "evaluate_case", watched)
        killed: str | None = "p2"
        with pytest.raises(Killed):
            evaluate(trained, "out")
        assert measured == ["p0", "p1"] and list(content(trained / "out")) == [UNFINISHED]
        killed = None
        output = evaluate(trained, "out")
        assert "2 of 3 cases were measured before" in output and measured[2:] == ["p2"]
        assert _same(trained)
        # With another clean-up all cases are measured anew.
        killed = "p2"
        with pytest.raises(Killed):
            evaluate(trained, "out", "--clean-up", "brats")
        killed, measured[:] = None, []
        evaluate(trained, "out")
        assert measured == ["p0", "p1", "p2"] and _same(trained)


def _same(folder: Path) -> bool:
    """Whether both reports are the same, but for the folder in the command line."""
    whole, out = content(folder / "whole"), content(folder / "out")
    return whole.keys() == out.keys() and all(
        whole[name] == out[name] for name in whole if name != "report.html"
    )


def test_labels_are_cleaned_and_predicted_anew_with_other_rules(trained: Path) -> None:
    out, before = trained / "labels", 0

    def predicted(*options: object) -> dict[str, np.ndarray]:
        nonlocal before
        times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
        code, output = run("predict", trained / "run", trained / "cases", out, *options)
        assert code == 0, output
        files = sorted(out.glob("*.nii.gz"))
        before = sum(path.stat().st_mtime_ns == times.get(path.name) for path in files)
        return {p.name[:2]: np.asarray(nib.load(p).dataobj) for p in files}  # type: ignore[attr-defined]

    assert not any(labels.any() for labels in predicted().values())
    plain = predicted("--clean-up", "none")
    assert before == 0 and all(labels.any() for labels in plain.values())
    predicted("--clean-up", "none")
    assert before == 3
    rule = Cleanup({"TC": RegionRule(largest=True), "ET": RegionRule(component_ml=0.005)})
    write_cleanup(trained / "run", Chosen(rule, 0.5, 0.5), cases=["p0"])
    cleaned = predicted()
    assert before == 0
    opened = pm.Run.open(trained / "run")
    assert read_cleanup(opened.folder, opened.config) == rule
    for case in pm.load_cases(trained / "cases", ("flair", "t1")):
        classes = pm.BRATS_LABELS.encode(plain[case.id])
        expected = pm.BRATS_LABELS.decode(rule(classes, pm.BRATS_LABELS, voxel=1.0))
        np.testing.assert_array_equal(cleaned[case.id], expected)
        np.testing.assert_array_equal(opened.predictor("cpu").predict(case), expected)


def test_several_runs_do_what_all_of_them_chose(trained: Path) -> None:
    shutil.copytree(trained / "run", trained / "other")
    write_cleanup(trained / "other", Chosen(Cleanup(), 0.5, 0.5), cases=["p0"])
    runs = (trained / "run", trained / "other")
    assert run("predict", *runs, trained / "cases", trained / "labels")[0] == 0
    for path in (trained / "labels").glob("*.nii.gz"):
        assert np.asarray(nib.load(path).dataobj).any()  # type: ignore[attr-defined]


def test_the_rule_of_brats_needs_its_region(tmp_path: Path) -> None:
    root = write_cases(tmp_path / "cases", 2)
    regions = 'data.regions={whole=["necrotic","oedema","enhancing"]}'
    options = settings(MODALITIES, regions, "training.steps=1")
    assert run("train", root, "--out", tmp_path / "run", *options)[0] == 0
    code, output = run("predict", tmp_path / "run", root, tmp_path / "x", "--clean-up", "brats")
    assert code == 2 and errors(output) == [
        f"clean-up: brats is a rule for the region ET, and {tmp_path / 'run'} has whole; use run or none"
    ]
    code, output = run("predict", tmp_path / "run", root, tmp_path / "x", "--clean-up", "largest")
    assert code == 2 and "invalid value for '--clean-up'" in errors(output)[0]
