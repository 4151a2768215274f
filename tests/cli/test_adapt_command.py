"""``prism-meta adapt``: the run that it writes, what other commands do with it, and every bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SMALL, errors, run, settings
from helpers import equal
from niftis import record_reads, write_cases
from safetensors.torch import load_file
from torch import nn

import prism_meta as pm
from prism_meta.training.adaptation import adapt as adapt_module
from prism_meta.training.adaptation.result import adaptation_of
from prism_meta.training.folder.lock import LOCK
from prism_meta.training.folder.weights import save_weights, weights_file
from prism_meta.training.networks import build_model

QUICK = ("--steps", 2, "--lr", 0.01)


def write_run(folder: Path, *overrides: str, **facts: Any) -> Path:
    """A run that has ended with random weights, without an average of them."""
    config = pm.load_config(overrides=[*SMALL, "training.ema=0", *overrides])
    source = pm.Run.create(folder, config, root=None, train=[], test=[], **facts)
    torch.manual_seed(1)
    for kind in source.kinds:
        save_weights(source.weights(kind), build_model(config))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


@pytest.fixture
def few_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two settings are tried."""
    monkeypatch.setattr(adapt_module, "RATES", (0.01,))
    monkeypatch.setattr(adapt_module, "LENGTHS", (1, 2))


def adapt(source: Path, cases: Path, out: Path, *options: object) -> str:
    code, output = run("adapt", source, cases, "--out", out, *options)
    assert code == 0, output
    return output


def weights(folder: Path, kind: str = "last") -> dict[str, torch.Tensor]:
    return load_file(weights_file(folder, kind))  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------- what it writes


def test_the_run_says_how_it_was_adapted(source: Path, cases: Path, tmp_path: Path) -> None:
    out = tmp_path / "site"
    output = adapt(source, cases, out, "--subset", "t1ce,flair", *QUICK, "--seed", 7)
    assert (
        "adapted in 2 steps at a rate of 0.01: chosen by the user; no case was held out" in output
    )
    assert f"run in {out}" in output
    assert sorted(path.name for path in out.iterdir() if path.name != LOCK) == [
        "config.toml", "metrics.jsonl", "run.json", "weights",
    ]  # fmt: skip
    facts = json.loads((out / "run.json").read_text())
    assert facts["adaptation"] == {
        "run": str(source.resolve()),
        "weights": "last",
        "subset": "flair+t1ce",
        "cases": ["p0", "p1", "p2", "p3"],
        "lr": 0.01,
        "steps": 2,
        "by": "user",
        "reason": "chosen by the user; no case was held out",
        "held_out": [],
    }
    assert facts["train"] == {f"p{k}": ["flair", "t1ce"] for k in range(4)}
    assert (facts["seed"], facts["data"]) == (7, str(cases.resolve()))
    made = pm.Run.open(out)
    assert made.kinds == ("ema", "last") and len(made.history()) == 2
    then = pm.Run.open(source).config
    assert made.config.data == then.data and made.config.model == then.model
    assert made.config.training.init == source.resolve()
    assert (made.config.training.lr, made.config.training.steps) == (0.01, 2)
    assert made.config.meta.strategy == "single_level" and not made.config.objective.unimodal
    assert not equal(weights(out), weights(source))
    assert not equal(weights(out, "ema"), weights(out))


def test_it_holds_out_each_case(
    source: Path, cases: Path, tmp_path: Path, few_settings: None
) -> None:
    output = adapt(source, cases, tmp_path / "site", "--subset", "flair")
    found = adaptation_of(pm.Run.open(tmp_path / "site"))
    assert found is not None and found.by == "leave_one_out"
    assert [one.cases for one in found.held_out] == [["p0"], ["p1"], ["p2"], ["p3"]]
    assert all(
        [(t.lr, t.steps) for t in one.tried] == [(0.01, 1), (0.01, 2)] for one in found.held_out
    )
    for one in found.held_out:
        line = next(line for line in output.splitlines() if line.strip().startswith(one.cases[0]))
        assert line.split()[1:3] == [f"{100 * one.before:.1f}", f"{100 * one.after:.1f}"]
    assert "95%" in output and "few make it rough" in output
    assert found.sentence() in output


def test_kept_weights_are_those_of_the_run(source: Path, cases: Path, tmp_path: Path) -> None:
    out = tmp_path / "site"
    output = adapt(source, cases, out, "--lr", 1e-30, "--steps", 1)  # the user's word counts
    assert "adapted in 1 step at" in output
    kept = tmp_path / "kept"
    output = adapt(source, cases, kept, "--lr", 1e-30, "--subset", "flair")
    assert "the weights were kept as they are: adapting changes +0.0 Dice points" in output
    assert equal(weights(kept), weights(source))
    made = pm.Run.open(kept)
    assert made.kinds == ("last",) and made.history() == []
    assert made.config.objective == pm.Run.open(source).config.objective
    found = adaptation_of(made)
    assert found is not None and (found.steps, found.lr) == (0, 0.0)


def test_one_patient_is_not_held_out(source: Path, tmp_path: Path) -> None:
    one = write_cases(tmp_path / "one", 1)
    output = adapt(source, one, tmp_path / "site", "--subset", "flair")
    found = adaptation_of(pm.Run.open(tmp_path / "site"))
    assert found is not None and found.by == "default" and found.held_out == []
    assert (found.lr, found.steps) in ((5e-4, 20), (0.0, 0))
    assert "there is one patient, so that none could be held out" in output
    kept = adapt(source, one, tmp_path / "kept", "--subset", "flair", "--lr", 1e-30)
    assert "even its own cases are not segmented better (Dice " in kept
    assert equal(weights(tmp_path / "kept"), weights(source))


def test_the_subset_defaults_to_what_all_cases_have(
    source: Path, cases: Path, tmp_path: Path
) -> None:
    adapt(source, cases, tmp_path / "site", *QUICK)
    found = adaptation_of(pm.Run.open(tmp_path / "site"))
    assert found is not None and found.subset == "flair+t1ce+t1"  # p0 has no t2


def test_files_of_other_modalities_are_not_read(
    source: Path, cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pm.Run.open(source).config
    found = pm.load_cases(cases, config.data.modalities)
    opened = record_reads(monkeypatch)
    pm.adapt(source, found, subset="t1", steps=1, lr=0.01, progress=False)
    assert opened and {path.name.split("_")[1] for path in opened} == {"t1.nii.gz", "seg.nii.gz"}


def test_the_same_numbers_twice(
    source: Path, cases: Path, tmp_path: Path, few_settings: None
) -> None:
    for name in ("first", "second"):
        adapt(source, cases, tmp_path / name, "--subset", "flair")
    first, second = (
        json.loads((tmp_path / n / "run.json").read_text()) for n in ("first", "second")
    )
    assert first["adaptation"] == second["adaptation"]
    for kind in pm.Run.open(tmp_path / "first").kinds:
        assert equal(weights(tmp_path / "first", kind), weights(tmp_path / "second", kind))


def test_the_weights_that_it_starts_from(cases: Path, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "training.ema=0.5")
    other = build_model(pm.Run.open(folder).config)
    for parameter in other.parameters():
        nn.init.constant_(parameter, 0.25)
    save_weights(weights_file(folder, "last"), other)
    starts = {}
    for kind in ("ema", "last"):
        out = tmp_path / kind
        adapt(folder, cases, out, "--weights", kind, "--lr", 1e-30, "--steps", 1)
        starts[kind] = weights(out)
    for kind, found in starts.items():  # Adam moves biases of 0 by the rate
        expected = weights(folder, kind)
        assert all(torch.allclose(found[n], expected[n], rtol=0, atol=1e-20) for n in expected)


def test_cases_that_the_run_was_trained_on_are_named(cases: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, output = run(
        "train", cases, "--out", folder, *settings("training.steps=1", "data.holdout=2")
    )
    assert code == 0, output
    seen = sorted(pm.Run.open(folder).facts["train"])
    output = adapt(folder, cases, tmp_path / "site", *QUICK)
    assert (
        f"2 of the cases have names of cases that {folder} was trained on ({', '.join(seen)}); if they are "
        "the same, the Dice before is too good" in output
    )


# ------------------------------------------------------------------------------- what takes an adapted run


@pytest.mark.usefixtures("without_drawing")
def test_other_commands_take_the_run(source: Path, cases: Path, tmp_path: Path) -> None:
    out = tmp_path / "site"
    adapt(source, cases, out, "--subset", "flair", *QUICK)
    code, output = run("predict", out, cases, tmp_path / "labels", "--subset", "flair")
    assert code == 0 and "4 label volumes" in output, output
    code, output = run("evaluate", out, cases)
    assert code == 0, output
    page = (out / "evaluation" / "report.html").read_text()
    assert f"{source.resolve()} (weights last), to flair" in page
    assert "adapted in 2 steps at a rate of 0.01: chosen by the user; no case was held out" in page
    assert "all patches show flair" in page
    assert (
        f"prism-meta adapt {source.resolve()} {cases.resolve()} --subset flair --weights last --seed 0 "
        "--steps 2 --lr 0.01 --out repeated" in page
    )
    adapt(out, cases, tmp_path / "again", "--subset", "t1", *QUICK)
    again = adaptation_of(pm.Run.open(tmp_path / "again"))
    assert again is not None and (again.run, again.weights) == (str(out.resolve()), "ema")
    code, output = run(
        "train", cases, "--out", tmp_path / "on", "--init", out, "-s", "training.steps=1"
    )
    assert code == 0 and f"initial weights from {out} (ema)" in output, output


def test_the_clean_up_stays_that_of_the_run(cases: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, output = run(
        "train", cases, "--out", folder, *settings("validation.cases=1", "training.steps=1")
    )
    assert code == 0, output
    file = folder / "postprocessing.json"
    rules = json.loads(file.read_text())
    rules["regions"] = {"ET": {"largest": True, "component_ml": 0.5, "total_ml": 1.5}}
    file.write_text(json.dumps(rules))
    adapt(folder, cases, tmp_path / "site", *QUICK)
    made = pm.Run.open(tmp_path / "site").predictor()
    assert made.cleanup == pm.Run.open(folder).predictor().cleanup and made.cleanup.is_on


def test_it_cannot_be_resumed(source: Path, cases: Path, tmp_path: Path) -> None:
    out = tmp_path / "site"
    adapt(source, cases, out, *QUICK)
    code, output = run("train", "--resume", out)
    assert code == 2
    assert errors(output) == [
        f"{out}: was written by prism-meta adapt, whose training cannot be resumed; adapt again, or train a "
        "new run from it with --init"
    ]


def test_a_damaged_fact_is_named(source: Path, cases: Path, tmp_path: Path) -> None:
    out = tmp_path / "site"
    adapt(source, cases, out, *QUICK)
    facts = json.loads((out / "run.json").read_text())
    facts["adaptation"]["steps"] = "two"
    (out / "run.json").write_text(json.dumps(facts))
    code, output = run("evaluate", out, cases)
    assert code == 2
    assert errors(output) == [
        f"{out / 'run.json'}: is damaged (adaptation.steps: input should be a valid integer); restore it, or "
        "adapt again"
    ]
