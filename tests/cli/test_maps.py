"""``predict --probabilities`` and ``--uncertainty``: where maps lie, what they hold, when they are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from commands import errors, run, settings
from niftis import write_case, write_cases

import prism_meta as pm
from prism_meta.evaluation.predictor import Predictor
from prism_meta.training.prediction.ensembles import ensemble_predictor

KINDS = ("probabilities", "uncertainty", "disagreement")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs on the same two modalities, with another seed each."""
    folder = tmp_path_factory.mktemp("runs")
    root = write_cases(folder / "cases", 2)
    for seed in (0, 1):
        options = settings(
            'data.modalities=["flair","t1"]',
            "training.steps=6",
            f"seed={seed}",
            "data.spacing=[1,1,2]",
        )
        assert run("train", root, "--out", folder / str(seed), *options)[0] == 0
    return [folder / "0", folder / "1"]


@pytest.fixture
def new(tmp_path: Path) -> Path:
    """A case of another spacing and orientation, and one that lacks t1."""
    write_case(tmp_path / "cases" / "a", spacing=(1.0, 1.5, 2.0), codes="LPS", seed=5)
    write_case(tmp_path / "cases" / "b", missing=("t1",), seed=6)
    return tmp_path / "cases"


def values(path: Path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj)  # type: ignore[attr-defined]


def header(path: Path) -> dict[str, Any]:
    found: Any = nib.load(path).header  # type: ignore[attr-defined]
    names = [n for n in found if n.startswith(("quatern", "qoffset", "srow", "qform", "sform"))]
    fields = {name: np.asarray(found[name]).tolist() for name in (*names, "xyzt_units", "descrip")}
    return {**fields, "pixdim": found["pixdim"][:4].tolist()}


def test_maps_of_several_runs(runs: list[Path], new: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels"
    code, output = run("predict", *runs, new, out, "--probabilities", "--uncertainty")
    assert code == 0, output
    names = "background, necrotic, oedema, enhancing"
    assert f"channels of *_probabilities.nii.gz: {names}" in output.splitlines()
    opened = [pm.Run.open(folder) for folder in runs]
    single = [each.predictor("cpu") for each in opened]
    both = ensemble_predictor(opened, "cpu")
    for case in pm.load_cases(new, ("flair", "t1"), label=None):
        files = {kind: out / f"{case.id}_{kind}.nii.gz" for kind in KINDS}
        labels = out / f"{case.id}.nii.gz"
        np.testing.assert_array_equal(values(labels), both.predict(case))
        p, entropy, information = (values(files[kind]) for kind in KINDS)
        assert p.dtype == entropy.dtype == information.dtype == np.float32
        assert (
            p.shape == (*values(labels).shape, 4)
            and entropy.shape == information.shape == p.shape[:3]
        )
        assert all(header(path) == header(labels) for path in files.values())
        np.testing.assert_allclose(p.sum(-1), 1, atol=1e-5)
        # The labels are the most probable classes, where that is not a matter of rounding.
        first, second = np.sort(p, -1)[..., :-3:-1].transpose(3, 0, 1, 2)
        most = np.array([0, 1, 2, 4])[p.argmax(-1)]
        clear = first - second > 1e-5
        assert clear.mean() > 0.9
        np.testing.assert_array_equal(most[clear], values(labels)[clear])
        exact = p.astype(float)
        logs = np.log(np.where(exact > 0, exact, 1))
        np.testing.assert_allclose(entropy, -(exact * logs).sum(-1) / np.log(4), atol=1e-5)
        # Disagreement: the mean divergence of each run's probabilities from their mean.
        each = [np.moveaxis(one.predict_maps(case).probabilities.numpy(), 0, -1) for one in single]
        stacked = np.stack(each).astype(float)
        mean = stacked.mean(0)
        ratio = np.log(np.where(stacked > 0, stacked / np.where(mean > 0, mean, 1), 1))
        divergence = (stacked * ratio).sum(-1).mean(0) / np.log(4)
        np.testing.assert_allclose(information, divergence, atol=1e-5)
        assert information.max() > 1e-3 and (information <= entropy + 0.05).all()


def test_maps_are_made_when_they_are_missing_and_labels_are_kept(
    runs: list[Path], new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = tmp_path / "labels", []
    logits = Predictor._logits
    monkeypatch.setattr(
        Predictor,
        "_logits",
        lambda self, case, *more: calls.append(case.id) or logits(self, case, *more),
    )

    def predict(*options: str) -> list[str]:
        """The cases that are predicted."""
        calls.clear()
        code, output = run("predict", runs[0], new, out, *options)
        assert code == 0, output
        assert ("2 of 2 cases were predicted before" in output) == (not calls)
        return list(calls)

    assert predict() == ["a", "b"] and len(list(out.iterdir())) == 3
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    assert predict("--probabilities") == ["a", "b"]
    assert sorted(path.name for path in out.glob("*_*")) == [
        "a_probabilities.nii.gz", "b_probabilities.nii.gz",
    ]  # fmt: skip
    assert all((out / name).read_bytes() == content for name, content in first.items())
    assert predict("--probabilities") == [] and predict() == []
    # One run has no disagreement.
    assert predict("--probabilities", "--uncertainty") == ["a", "b"]
    assert not list(out.glob("*_disagreement.nii.gz"))
    before = (out / "b_uncertainty.nii.gz").read_bytes()
    (out / "a_uncertainty.nii.gz").unlink()
    (out / "b_probabilities.nii.gz").write_bytes(b"damaged")
    assert predict("--uncertainty") == ["a"]
    assert predict("--probabilities", "--uncertainty") == ["b"]
    assert (out / "b_uncertainty.nii.gz").read_bytes() == before
    # Corrected labels stay when maps are made.
    image: Any = nib.load(out / "a.nii.gz")  # type: ignore[attr-defined]
    nib.save(
        nib.Nifti1Image(np.zeros_like(image.dataobj), None, image.header), tmp_path / "0.nii.gz"
    )  # type: ignore[attr-defined, no-untyped-call]
    (tmp_path / "0.nii.gz").replace(out / "a.nii.gz")
    (out / "a_uncertainty.nii.gz").unlink()
    assert predict("--uncertainty") == ["a"]
    assert not values(out / "a.nii.gz").any()
    # Another subset is another prediction.
    assert predict("--uncertainty", "--subset", "flair") == ["a"]


def test_names_that_two_cases_would_share(runs: list[Path], tmp_path: Path) -> None:
    root, out = tmp_path / "cases", tmp_path / "labels"
    write_case(root / "a")
    write_case(root / "a_uncertainty")
    code, output = run("predict", runs[0], root, out, "--uncertainty")
    assert code == 2 and errors(output) == [
        "case a: its file a_uncertainty.nii.gz is that of the labels of case a_uncertainty, too; rename one "
        "of the two cases"
    ]
    assert sorted(path.name for path in out.iterdir()) == [
        "a_uncertainty.nii.gz", "a_uncertainty_uncertainty.nii.gz", "predictions.csv",
    ]  # fmt: skip
    assert run("predict", runs[0], root, tmp_path / "others")[0] == 0


def test_a_map_of_the_user_is_not_replaced(runs: list[Path], new: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels"
    out.mkdir()
    (out / "a_probabilities.nii.gz").write_bytes(b"mine")
    code, output = run("predict", runs[0], new, out, "--probabilities")
    assert code == 2 and errors(output) == [
        f"case a: {out / 'a_probabilities.nii.gz'} exists, and is no output of predict; move it away, or "
        "give another OUT"
    ]
    assert (out / "a_probabilities.nii.gz").read_bytes() == b"mine"
