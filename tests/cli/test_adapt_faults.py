"""``prism-meta adapt``: every bad input is one line and code 2, and an interruption leaves no half run."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from commands import errors, run
from niftis import write_case, write_cases
from test_adapt_command import QUICK, write_run

import prism_meta as pm
from prism_meta.errors import CaseError, PrismError
from prism_meta.training.adaptation import adapt as adapt_module


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("source") / "run")


def refused(tmp_path: Path, source: Path, cases: Path, *options: object) -> list[str]:
    """The lines of a call that must fail and leave no run folder."""
    out = tmp_path / "site"
    code, output = run("adapt", source, cases, "--out", out, *options)
    assert code == 2, output
    assert not out.exists()
    found = errors(output)
    assert found and len(found) == output.count("error: ")
    return found


def test_a_subset_with_wrong_names(source: Path, cases: Path, tmp_path: Path) -> None:
    known = "flair, t1ce, t1, t2"
    assert refused(tmp_path, source, cases, "--subset", "t1+pd+t1+dwi") == [
        f"subset: unknown modality pd; use some of {known}",
        f"subset: unknown modality dwi; use some of {known}",
        "subset: t1 occurs twice; give each name once",
    ]
    assert refused(tmp_path, source, cases, "--subset", " + ") == [
        f"subset: got no modality, expected at least one; use some of {known}"
    ]


def test_a_case_that_lacks_a_modality(source: Path, cases: Path, tmp_path: Path) -> None:
    assert refused(tmp_path, source, cases, "--subset", "t2+flair") == [
        "case p0: has no t2; leave it out of the subset, or leave the case out"
    ]


def test_cases_without_a_common_modality(source: Path, tmp_path: Path) -> None:
    root = tmp_path / "cases"
    write_case(root / "p0", missing=("t1", "t2"))
    write_case(root / "p1", missing=("flair", "t1ce"))
    assert refused(tmp_path, source, root) == [
        "cases: have no modality in common; leave cases out, or give a subset that they have"
    ]


def test_cases_without_labels(source: Path, tmp_path: Path) -> None:
    root = write_cases(tmp_path / "some", 3)
    (root / "p1" / "p1_seg.nii.gz").unlink()
    assert refused(tmp_path, source, root) == [
        "case p1: no label file; training and evaluation need one, add it or remove the case"
    ]
    none = write_cases(tmp_path / "none", 2, label=None)
    found = refused(tmp_path, source, none)
    assert found[0].startswith("data.label: only 0 of 2 cases have 'seg', expected files like")
    assert [line.split(":")[0] for line in found[1:]] == ["case p0", "case p1"]


def test_no_cases(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (line,) = refused(tmp_path, source, tmp_path / "empty")
    assert str(tmp_path / "empty") in line and "; " in line
    with pytest.raises(CaseError) as caught:
        pm.adapt(source, [], progress=False)
    assert str(caught.value) == (
        "cases: got none, expected at least one labelled case; give a folder of cases"
    )


def test_cases_with_other_modalities(source: Path, cases: Path) -> None:
    found = pm.load_cases(cases, ("t1", "flair"))[:1]
    with pytest.raises(PrismError) as caught:
        pm.adapt(source, found, progress=False)
    assert str(caught.value) == (
        "case p0: has the modalities t1, flair, but the run was trained on flair, t1ce, t1, t2; load it "
        "with these names in this order"
    )


def test_unknown_label_values(source: Path, tmp_path: Path) -> None:
    root = write_cases(tmp_path / "cases", 1, values=(2, 1, 7))
    (line,) = refused(tmp_path, source, root, *QUICK)
    assert line.startswith("case p0: ") and "7" in line and "data.labels" in line


def test_a_run_that_has_not_ended(cases: Path, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "weights" / "last.safetensors").unlink()
    assert refused(tmp_path, folder, cases) == [
        f"{folder}: the training has not ended (no weights/last.safetensors); continue it with prism-meta "
        f"train --resume {folder}"
    ]


def test_weights_that_the_run_does_not_have(source: Path, cases: Path, tmp_path: Path) -> None:
    assert refused(tmp_path, source, cases, "--weights", "ema") == [
        f"{source}: was trained without training.ema, and has no ema weights; use last"
    ]


def test_no_run(cases: Path, tmp_path: Path) -> None:
    assert refused(tmp_path, tmp_path / "nothing", cases) == [
        f"{tmp_path / 'nothing'}: no run in this folder (run.json: no such file or directory); give the "
        "folder that prism-meta train wrote"
    ]


def test_a_run_with_objects_of_its_own(cases: Path, tmp_path: Path) -> None:
    model = write_run(tmp_path / "model", own={"model": "WrappedNet"})
    assert refused(tmp_path, model, cases) == [
        f"{model}: this run trained a model of its own (WrappedNet), which config.toml cannot build; load "
        "it in Python with Run.open(folder).predictor(model=...)"
    ]
    objective = write_run(tmp_path / "objective", own={"objective": "Mine"})
    assert refused(tmp_path, objective, cases) == [
        f"{objective}: was trained with an objective of its own (Mine); adapt it in Python with "
        "prism_meta.adapt(..., objective=...)"
    ]
    adapted = pm.adapt(
        objective, cases, steps=1, lr=0.01, out=tmp_path / "site", progress=False,
        objective=pm.PrismObjective(),
    )  # fmt: skip
    assert adapted.run is not None and adapted.run.facts["own"] == {"objective": "PrismObjective"}


def test_a_folder_that_is_taken(source: Path, cases: Path, tmp_path: Path) -> None:
    taken = write_run(tmp_path / "taken")
    before = sorted(path.read_bytes() for path in taken.rglob("*") if path.is_file())
    for out, message in (
        (taken, f"{taken}: holds a run already; give another --out, or remove it"),
        (source, f"{source}: is the run to adapt, which is kept; give another --out"),
        (
            source / ".." / source.name,
            f"{source / '..' / source.name}: is the run to adapt, which is kept; give another --out",
        ),
        (cases / "p1" / "p1_t1.nii.gz", f"cannot write {cases / 'p1' / 'p1_t1.nii.gz'}: file exists; "
         "choose a folder that you may write to"),
    ):  # fmt: skip
        code, output = run("adapt", source, cases, "--out", out)
        assert (code, errors(output)) == (2, [message])
    assert sorted(p.read_bytes() for p in taken.rglob("*") if p.is_file()) == before


def test_numbers_out_of_range(source: Path, cases: Path, tmp_path: Path) -> None:
    assert refused(tmp_path, source, cases, "--steps", 0, "--lr", 2) == [
        "steps: got 0, expected 1 to 100000; 20 is usual",
        "lr: got 2, expected more than 0, and at most 1; 0.001 is usual",
    ]
    assert refused(tmp_path, source, cases, "--lr", "nan") == [
        "lr: got nan, expected more than 0, and at most 1; 0.001 is usual"
    ]


def test_missing_arguments(source: Path, cases: Path) -> None:
    code, output = run("adapt", source)
    assert code == 2
    (line,) = errors(output)
    assert line.startswith("missing argument 'CASES'; see ")
    code, output = run("adapt", source, cases)
    assert code == 2
    (line,) = errors(output)
    assert line.startswith("missing option '--out' / '-o'; see ")


def test_the_help_has_examples() -> None:
    code, output = run("adapt", "--help")
    assert code == 0
    for part in ("Fine-tune a run to a site", "--subset flair+t1 --out runs/a_site", "held out"):
        assert part in " ".join(output.split()), output


# --------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("place", ["save_weights", "Run.create"])
def test_an_interrupted_call_leaves_no_run_and_can_be_repeated(
    source: Path, cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Interrupted while it writes: weights that were kept, or after all files but run.json."""
    out = tmp_path / "site"
    options: tuple[object, ...] = QUICK
    if place == "save_weights":
        monkeypatch.setattr(adapt_module, "LENGTHS", (1,))
        options = ("--subset", "flair", "--lr", 1e-30)

    def interrupt(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"prism_meta.training.adaptation.adapt.{place}", interrupt)
        code, output = run("adapt", source, cases, "--out", out, *options)
    assert code == 128 + signal.SIGINT
    assert "interrupted; no file is half-written, run the same command again" in output
    assert not (out / "run.json").exists()
    code, output = run("adapt", source, cases, "--out", out, *options)
    assert code == 0, output
    assert pm.Run.open(out).predictor() is not None
