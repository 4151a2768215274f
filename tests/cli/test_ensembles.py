"""Predictions of several runs, and of mirrored images, on the command line."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from commands import errors, run, settings

import prism_meta as pm
from prism_meta.networks.ensemble import Ensemble
from prism_meta.training.build import build_predictor


@pytest.fixture(scope="module")
def folds(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of one data set."""
    folder = tmp_path_factory.mktemp("runs")
    for fold in (0, 1):
        options = settings("data.folds=2", f"data.fold={fold}", "training.steps=8")
        assert run("train", cases, "--out", folder / str(fold), *options)[0] == 0
    return [folder / "0", folder / "1"]


@pytest.mark.parametrize("flips", [False, True])
def test_the_probabilities_of_runs_are_averaged(
    flips: bool, folds: list[Path], cases: Path, tmp_path: Path
) -> None:
    options = ["--flips"] if flips else []
    code, output = run("predict", *folds, cases, tmp_path / "labels", *options)
    assert code == 0 and "4 label volumes" in output
    opened = [pm.Run.open(folder) for folder in folds]
    mean = Ensemble([each.load_model() for each in opened], flips=flips)
    predictor = build_predictor(opened[0].config, mean.eval())
    single = opened[0].predictor("cpu")
    different = False
    for case in pm.load_cases(cases, label=None):
        written = np.asanyarray(nib.load(tmp_path / "labels" / f"{case.id}.nii.gz").dataobj)  # type: ignore[attr-defined]
        np.testing.assert_array_equal(written, predictor.predict(case))
        different |= bool((written != single.predict(case)).any())
    assert different
    header = (tmp_path / "labels" / "predictions.csv").read_text().splitlines()[0]
    assert header == "case,file,subset,WT_ml,TC_ml,ET_ml"


@pytest.mark.usefixtures("without_drawing")
def test_an_evaluation_may_mirror(folds: list[Path], tmp_path: Path) -> None:
    assert run("evaluate", folds[0], "--out", tmp_path / "plain")[0] == 0
    assert run("evaluate", folds[0], "--out", tmp_path / "mirrored", "--flips")[0] == 0
    plain, mirrored = (
        (tmp_path / name / "records.csv").read_text() for name in ("plain", "mirrored")
    )
    assert plain != mirrored


def test_runs_that_differ_are_refused(folds: list[Path], cases: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    options = settings("data.spacing=[2, 2, 2]", 'data.modalities=["t1", "t2"]')
    assert run("train", cases, "--out", other, *options)[0] == 0
    code, output = run("predict", folds[0], other, cases, tmp_path / "labels")
    assert code == 2 and errors(output) == [
        f"{other}: data.modalities is ['t1', 't2'], but {folds[0]} has ['flair', 't1ce', 't1', 't2']; "
        "average runs that have the same",
        f"{other}: data.spacing is [2.0, 2.0, 2.0], but {folds[0]} has [1.0, 1.0, 1.0]; average runs that "
        "have the same",
    ]
    assert not (tmp_path / "labels").exists()
