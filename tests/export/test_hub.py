"""The folder for the Hugging Face hub, and runs that are downloaded from there."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import nibabel as nib
import numpy as np
import pytest
import yaml
from commands import errors, run
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from shaken import NETS, shaken_run

from prism_meta.records import Record, write_records
from prism_meta.training.run import Run

#: Words that must not leave the hospital.
SECRETS = ("Mustermann", "secret")
SETTINGS = (
    *NETS["unet"], "data.patch=[16, 16]", "data.spacing=[2, 2, 2]", "data.cache=/secret/cache",
    'data.test_cases=["Mustermann_3"]', 'validation.cases=["Mustermann_2"]',
)  # fmt: skip


@pytest.fixture
def trained(tmp_path: Path) -> Run:
    """A run as a training leaves it, with names and paths in all its files."""
    made = shaken_run(tmp_path / "runs" / "tumour", *SETTINGS)
    shutil.copy(made.weights(), made.weights("best"))
    (made.folder / "checkpoint.pt").write_bytes(b"pickled")
    facts = {
        **made.facts,
        "command": ["prism-meta", "train", "/secret/cases"],
        "data": "/secret/cases",
        "train": {"Mustermann_1": ["flair", "t1"], "Mustermann_4": ["flair", "t1", "t1ce", "t2"]},
        "test": ["Mustermann_3"],
        "validation": {"Mustermann_2": ["flair"]},
    }
    (made.folder / "run.json").write_text(json.dumps(facts))
    cleanup = {"regions": {}, "cases": ["Mustermann_2"], "dice": 0.5, "cleaned_dice": 0.5}
    (made.folder / "postprocessing.json").write_text(json.dumps(cleanup))
    return Run.open(made.folder)


def exported(made: Run, out: Path, *options: str) -> Path:
    code, output = run("export", made.folder, "--out", out, "--format", "hub", *options)
    assert (code, output.strip()) == (0, f"exported to {out}")
    return out


def test_the_folder_opens_and_tells_no_names(trained: Run, tmp_path: Path) -> None:
    out = exported(trained, tmp_path / "upload")
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()) == [
        "README.md", "config.toml", "postprocessing.json", "run.json", "weights/best.safetensors",
        "weights/last.safetensors",
    ]  # fmt: skip
    for file in out.rglob("*.*"):
        assert not any(secret.encode() in file.read_bytes() for secret in SECRETS), file
    opened = Run.open(out)
    assert opened.facts["train"] == {
        "case 1": ["flair", "t1"],
        "case 2": ["flair", "t1", "t1ce", "t2"],
    }
    assert opened.kinds == ("best", "last")
    ours, theirs = opened.load_model().state_dict(), trained.load_model().state_dict()
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)


def test_the_card(trained: Run, tmp_path: Path) -> None:
    records = [
        Record(f"Mustermann_{case}", subset, region, dice, 4.0)
        for case, dice in enumerate((0.5, 0.9))
        for subset in ("flair", "flair+t1")
        for region in ("WT", "TC", "ET")
    ]
    trained.evaluation.mkdir()
    write_records(trained.evaluation / "records.csv", records)
    card = (
        exported(trained, tmp_path / "upload", "--license", "cc-by-4.0") / "README.md"
    ).read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "cc-by-4.0"
    assert yaml.safe_load(front)["library_name"] == "prism-meta"
    assert text.startswith("\n# tumour\n") and "Not a medical device" in text
    assert "- Cases: 2, missing t1ce in 1, t2 in 1" in text
    assert "- Labels: 0 background, 1 necrotic, 2 oedema, 4 enhancing" in text
    assert "Means over 2 cases" in text and "prism-meta predict hf://OWNER/NAME" in text
    scores = next(line for line in text.splitlines() if line.startswith("| flair |"))
    assert scores.count("70.0 (50.0 to 90.0)") == 4 and "4.0 (4.0 to 4.0)" in scores


def test_a_run_that_was_not_evaluated_and_its_licence(trained: Run, tmp_path: Path) -> None:
    card = (exported(trained, tmp_path / "upload") / "README.md").read_text()
    assert "This run was not evaluated." in card and 'license: "other"' in card


def test_the_folder_has_all_weights(trained: Run, tmp_path: Path) -> None:
    call = (
        "export",
        trained.folder,
        "--out",
        tmp_path / "out",
        "--format",
        "hub",
        "--weights",
        "last",
    )
    code, output = run(*call)
    assert code == 2 and "of which predict uses best first; leave --weights out" in output
    assert not (tmp_path / "out").exists()


@pytest.fixture
def hub(trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub has one repository, owner/tumour, with further files that are not to be downloaded."""
    upload = exported(trained, tmp_path / "upload")
    (upload / "model.pkl").write_bytes(b"pickled")

    def download(repository: str, *, revision: str | None, allow_patterns: Sequence[str]) -> str:
        response = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))
        if repository != "owner/tumour":
            raise RepositoryNotFoundError("404", response=response)
        if revision not in (None, "main"):
            raise RevisionNotFoundError("404", response=response)
        cache = tmp_path / "cache"
        for file in (path for path in upload.rglob("*") if path.is_file()):
            name = file.relative_to(upload).as_posix()
            if any(fnmatchcase(name, pattern) for pattern in allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return tmp_path / "cache"


def test_predict_takes_a_run_from_the_hub(
    hub: Path, trained: Run, cases: Path, tmp_path: Path
) -> None:
    for folder, address in (("a", trained.folder), ("b", "hf://owner/tumour")):
        assert run("predict", address, cases, tmp_path / folder)[0] == 0
    found, wanted = (
        np.asarray(nib.load(tmp_path / folder / "p1.nii.gz").dataobj)  # type: ignore[attr-defined]
        for folder in ("a", "b")
    )
    assert np.array_equal(found, wanted) and len(np.unique(found)) > 1
    assert not list(hub.rglob("*.pkl")) and not (hub / "README.md").exists()


def test_other_commands_take_it_too(hub: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    assert run("export", "hf://owner/tumour@main", "--out", out, "--format", "hub")[0] == 0
    assert Run.open(out).facts["test"] == ["case 1"]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://owner", "hf://owner: expected hf://owner/name, or hf://owner/name@revision"),
        ("hf://owner/brain", "hf://owner/brain: there is no such repository, or you may not read it"),
        ("hf://owner/tumour@old", "hf://owner/tumour@old: has no revision old; give a branch, tag or commit"),
    ],
)  # fmt: skip
def test_what_cannot_be_downloaded_is_one_line(
    hub: Path, tmp_path: Path, address: str, message: str
) -> None:
    code, output = run("evaluate", address, tmp_path)
    (line,) = errors(output)
    assert code == 2 and message in line


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    code, output = run("predict", "hf://owner/tumour", tmp_path, tmp_path / "out")
    (line,) = errors(output)
    assert code == 2 and "run pip install 'prism-meta[hub]'" in line


def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise httpx.ConnectError("connection refused")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    code, output = run("profile", "hf://owner/tumour")
    (line,) = errors(output)
    assert code == 2 and "cannot be downloaded (connection refused); check the network" in line


def test_a_repository_of_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **options: str(tmp_path))
    code, output = run("predict", "hf://owner/bert", tmp_path, tmp_path / "out")
    (line,) = errors(output)
    assert code == 2 and "holds no run of prism-meta (no run.json)" in line
