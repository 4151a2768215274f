"""Validation during training: its scores, the best weights, the early end, and what follows from them."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import SMALL, errors, run, settings
from lightning_fabric import Fabric
from niftis import write_cases
from safetensors.torch import load_file
from torch import nn

import prism_meta as pm
from prism_meta.data.cache import CachedCase, prepare
from prism_meta.errors import ConfigError
from prism_meta.training.folder.weights import weights_file
from prism_meta.training.processes.agreement import Processes
from prism_meta.training.setup.splitting import split
from prism_meta.training.stopping import TrainingStopped
from prism_meta.training.validation.selection import Best, Selection
from prism_meta.training.validation.validation import Validation

WATCHED = ("validation.cases=1", "validation.every=2", "training.ema=0.9")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five cases; the first two lack t2."""
    folder = write_cases(tmp_path_factory.mktemp("cases"), 5)
    for name in ("p0", "p1"):
        (folder / name / f"{name}_t2.nii.gz").unlink()
    return folder


@pytest.fixture(scope="module")
def prepared(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[CachedCase]:
    return prepare(
        pm.load_cases(root),
        tmp_path_factory.mktemp("cache"),
        preprocessing=pm.Preprocessing((1.0, 1.0, 1.0)),
        labels=pm.BRATS_LABELS,
    )


# --------------------------------------------------------------------------------------------- scores


def test_its_dice_is_that_of_prediction_on_the_models_grid(prepared: list[CachedCase]) -> None:
    torch.manual_seed(0)
    model = pm.PrismNet(spatial_dims=2, width=2, depth=2).train()
    validation = Validation(
        prepared, modalities=pm.BRATS, labels=pm.BRATS_LABELS, patch=(16, 16), overlap=0.0
    )
    before = torch.random.get_rng_state()
    measured = validation.dice(model, prepared)
    assert torch.equal(before, torch.random.get_rng_state()) and model.training
    # An oracle: whole slices, one subset at a time, and the definition of Dice.
    for case, found in zip(prepared, measured, strict=True):
        possible = [s for s in pm.subsets(4) if not (s & ~case.availability).any()]
        assert set(found) == {pm.subset_name(s.tolist(), pm.BRATS) for s in possible}
        image, target = case.patch((0, 0, 0), case.shape, shown=case.availability)
        for shown in possible:
            name = pm.subset_name(shown.tolist(), pm.BRATS)
            inside = (image[shown] != 0).any(0).nonzero()
            box = tuple(
                slice(int(a), int(b) + 1)
                for a, b in zip(inside.amin(0), inside.amax(0), strict=True)
            )
            cut = image[(slice(None), *box)]
            if max(cut.shape[1:3]) > 16:
                continue  # more than one window
            slices = cut.movedim(-1, 0)
            high = [16 - n for n in cut.shape[1:3]]
            pad = (high[1] // 2, high[1] - high[1] // 2, high[0] // 2, high[0] - high[0] // 2)
            padded = nn.functional.pad(slices, pad)
            with torch.no_grad():
                model.eval()
                logits = model.segment(padded, shown.expand(len(slices), -1))
                model.train()
            logits = logits[..., pad[2] : pad[2] + cut.shape[1], pad[0] : pad[0] + cut.shape[2]]
            classes = torch.zeros_like(target)
            classes[box] = logits.argmax(1).movedim(0, -1)
            dices = []
            for region in pm.BRATS_LABELS.regions:
                p, t = (pm.BRATS_LABELS.region(c, region) for c in (classes, target))
                both = int(p.sum() + t.sum())
                dices.append(2 * int((p & t).sum()) / both if both else 1.0)
            assert found[name] == pytest.approx(sum(dices) / len(dices), abs=1e-6)


def test_the_score_is_the_mean_over_cases_and_then_over_subsets() -> None:
    case: Any = SimpleNamespace()
    validation = Validation([case], modalities=("a", "b"), labels=pm.BRATS_LABELS, patch=(4, 4))
    score = validation.score([{"a": 0.2, "b": 0.8, "a+b": 0.9}, {"a": 0.4}])
    assert score["subsets"] == pytest.approx({"a": 0.3, "b": 0.8, "a+b": 0.9})
    assert score["dice"] == pytest.approx(2 / 3)
    assert score["worst_subset"] == "a" and score["worst"] == pytest.approx(0.3)
    only = validation.score([{"b": 0.5}])  # a subset that no case has is left out
    assert only["subsets"] == {"b": 0.5} and only["dice"] == 0.5
    with pytest.raises(ValueError, match=r"^validation: got no cases, expected at least one$"):
        Validation([], modalities=("a",), labels=pm.BRATS_LABELS, patch=(4, 4))


# ------------------------------------------------------------------------------------------ selection


class Scripted(Validation):
    """Has the scores that were written for it."""

    def dice(self, model: nn.Module, cases: Sequence[CachedCase]) -> list[dict[str, float]]:
        return [{"a": model.weight.item(), "b": model.bias.item()}] * len(cases)  # type: ignore[operator, union-attr]


def selection(folder: Path | None, **options: Any) -> tuple[Selection, nn.Linear]:
    case: Any = SimpleNamespace()
    validation = Scripted(
        [case, case], modalities=("a", "b"), labels=pm.BRATS_LABELS, patch=(4, 4), **options
    )
    model = nn.Linear(1, 1)
    fabric = Fabric(accelerator="cpu", devices=1)
    return Selection(validation, {"last": model}, Processes(fabric), folder), model


def scores(selected: Selection, model: nn.Linear, pairs: Sequence[tuple[float, float]]) -> None:
    for step, (a, b) in enumerate(pairs, start=1):
        nn.init.constant_(model.weight, a)
        nn.init.constant_(model.bias, b)
        selected(step)


def test_the_best_weights_are_kept(tmp_path: Path) -> None:
    for select, step in (("mean", 2), ("worst", 3)):
        folder = tmp_path / select
        selected, model = selection(folder, select=select)
        scores(selected, model, [(0.1, 0.2), (0.9, 0.3), (0.4, 0.5), (0.4, 0.5)])
        assert selected.best.step == step and selected.best.weights == "last"
        best = load_file(weights_file(folder, "best"))
        assert float(best["weight"]) == pytest.approx({2: 0.9, 3: 0.4}[step])


def test_patience_counts_validations_without_a_better_one() -> None:
    selected, model = selection(None, patience=2)
    scores(selected, model, [(0.5, 0.5), (0.4, 0.4), (0.6, 0.6), (0.6, 0.6)])
    assert selected.best == Best(
        dice=pytest.approx(0.6), step=3, since=1
    )  # an equal one is no better
    state = selected.state_dict()
    scores(selected, model, [(0.1, 0.1)])
    assert selected.best.ended and selected.best.since == 2
    selected.load_state_dict(selected.state_dict(), longer=False)
    assert selected.best.ended
    selected.load_state_dict(selected.state_dict(), longer=True)
    assert not selected.best.ended and selected.best.since == 0 and selected.best.step == 3
    selected.load_state_dict(state, longer=False)
    assert selected.best.since == 1


# ------------------------------------------------------------------------------------------- training


def test_a_run_validates_on_cases_that_it_does_not_train_on(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, output = run("train", root, "--out", out, *settings(*WATCHED, "data.holdout=1"))
    assert code == 0, output
    facts = json.loads((out / "run.json").read_text())
    sets = [set(facts["train"]), set(facts["validation"]), set(facts["test"])]
    assert [len(names) for names in sets] == [3, 1, 1] and len(set.union(*sets)) == 5
    opened = pm.Run.open(out)
    assert opened.kinds == ("best", "ema", "last")
    assert all(opened.weights(kind).exists() for kind in opened.kinds)
    validated = {
        line["step"]: line["validation"] for line in opened.history() if "validation" in line
    }
    assert list(validated) == [2, 4]
    assert all(set(found) == {"last", "ema", "best"} for found in validated.values())
    best = validated[4]["best"]
    assert best["dice"] == max(v[k]["dice"] for v in validated.values() for k in ("last", "ema"))
    # What is in the file is what was validated.
    config = opened.config
    (case,) = [c for c in pm.load_cases(root) if c.id in facts["validation"]]
    (ready,) = prepare(
        [case],
        tmp_path / "cache",
        preprocessing=pm.Preprocessing(config.data.spacing),
        labels=pm.BRATS_LABELS,
    )
    validation = Validation(
        [ready], modalities=pm.BRATS, labels=pm.BRATS_LABELS, patch=config.data.patch
    )
    for kind, expected in (("best", best["dice"]), ("ema", validated[4]["ema"]["dice"]),
                           ("last", validated[4]["last"]["dice"])):  # fmt: skip
        model = opened.load_model(weights=kind)  # type: ignore[arg-type]
        score = validation.score(validation.dice(model, [ready]))
        assert score["dice"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("cut", [2, 3])
def test_a_resumed_run_with_validation_equals_an_uninterrupted_one(
    cut: int, root: Path, tmp_path: Path
) -> None:
    config = pm.load_config(
        overrides=[*SMALL, *WATCHED, "training.checkpoint_every=1", "training.warmup=2",
                   "training.schedule=cosine"]
    )  # fmt: skip
    whole = pm.train(root, config, out=tmp_path / "whole", progress=False)
    seen = [0]
    with pytest.raises(TrainingStopped):
        pm.train(
            root,
            config,
            out=tmp_path / "cut",
            progress=False,
            on_step=lambda step, line: seen.append(step),
            should_stop=lambda: seen[-1] + 1 == cut,
        )
    again = pm.train(root, out=tmp_path / "cut", resume=True, progress=False)
    for name in (
        "metrics.jsonl",
        *(f"weights/{kind}.safetensors" for kind in ("best", "ema", "last")),
    ):
        first, second = ((tmp_path / run / name).read_bytes() for run in ("whole", "cut"))
        assert first == second, name
    assert whole.run is not None and again.run is not None
    # The predictor has the weights that the commands would use, in both.
    best = load_file(whole.run.weights("best"))
    for trained in (whole, again):
        assert all(torch.equal(best[n], value) for n, value in trained.model.state_dict().items())
    without = pm.train(root, config, progress=False)
    assert without.run is None
    assert all(torch.equal(best[n], value) for n, value in without.model.state_dict().items())


def test_training_ends_early_and_can_be_extended(root: Path, tmp_path: Path) -> None:
    # With a rate of nearly 0 nothing becomes better.
    config = pm.load_config(
        overrides=[*SMALL, "validation.cases=1", "validation.every=1", "validation.patience=2",
                   "training.steps=9", "training.lr=1e-12"]
    )  # fmt: skip
    out = tmp_path / "run"
    trained = pm.train(root, config, out=out, progress=False)
    assert [line["step"] for line in trained.history] == [1, 2, 3]
    assert trained.run is not None and trained.run.weights().exists()
    again = pm.train(root, out=out, resume=True, progress=False)
    assert again.history == []
    more = pm.train(root, out=out, resume=True, extend=1, progress=False)
    assert [line["step"] for line in more.history] == [4, 5]


def test_the_commands_use_the_best_weights_unless_told(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run("train", root, "--out", out, *settings(*WATCHED, "data.holdout=1"))[0] == 0
    weights = weights_file(out, "best")
    kept = weights.read_bytes()
    weights.write_bytes(b"damaged")
    code, output = run("evaluate", out)
    assert code == 2 and "best.safetensors: does not fit config.toml" in errors(output)[0]
    assert run("evaluate", out, "--weights", "last")[0] == 0
    assert run("predict", out, root, tmp_path / "labels", "--weights", "ema")[0] == 0
    weights.unlink()
    code, output = run("predict", out, root, tmp_path / "others")
    assert code == 2 and errors(output) == [
        f"{weights}: is missing; restore the file, use the last weights, or train again"
    ]
    weights.write_bytes(kept)
    weights_file(out, "last").unlink()
    code, output = run("evaluate", out)
    assert code == 2 and errors(output)[0].startswith(f"{out}: the training has not ended")
    plain = tmp_path / "plain"
    assert run("train", root, "--out", plain, *settings("data.holdout=1", "training.ema=0"))[0] == 0
    code, output = run("evaluate", plain, "--weights", "best")
    assert code == 2 and errors(output) == [
        f"{plain}: was trained without validation.cases, and has no best weights; use last"
    ]


def test_a_prediction_says_what_to_expect(root: Path, tmp_path: Path) -> None:
    out, labels = tmp_path / "run", tmp_path / "labels"
    watched = ('validation.cases=["p4"]', "validation.every=2", "training.ema=0.9")
    assert run("train", root, "--out", out, *settings(*watched))[0] == 0
    opened = pm.Run.open(out)
    for weights in ("best", "ema", "last"):
        folder = labels / weights
        assert (
            run("predict", out, root, folder, "--subset", "t1+t1ce", "--weights", weights)[0] == 0
        )
        lines = {line["step"]: line for line in opened.history()}
        found = lines[4]["validation"]
        step, kind = (
            (found["best"]["step"], found["best"]["weights"]) if weights == "best" else (4, weights)
        )
        subsets = lines[step]["validation"][kind]["subsets"]
        rows = list(csv.DictReader((folder / "predictions.csv").read_text().splitlines()))
        assert len(rows) == 5
        gains = {
            m: subsets[n] - subsets["t1ce+t1"]
            for m, n in (("flair", "flair+t1ce+t1"), ("t2", "t1ce+t1+t2"))
        }
        helps = max(gains, key=gains.__getitem__)
        for row in rows:
            assert row["expected_dice"] == f"{subsets['t1ce+t1']:.3f}"
            if gains[helps] > 0:
                assert (row["would_help"], row["gain"]) == (helps, f"{gains[helps]:.3f}")
            else:
                assert (row["would_help"], row["gain"]) == ("", "")
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text(lines[0] + lines[1].replace('"subsets"', '"sets"'))
    code, output = run("predict", out, root, tmp_path / "more")
    assert code == 2 and errors(output) == [
        f"{out / 'metrics.jsonl'}: has a validation of another form; restore the file, or delete it to "
        "predict without the expected Dice"
    ]
    (out / "metrics.jsonl").unlink()
    assert run("predict", out, root, tmp_path / "more")[0] == 0


# ---------------------------------------------------------------------------------------------- split


def test_validation_cases_are_drawn_or_named(root: Path) -> None:
    cases = pm.load_cases(root)
    named = split(pm.load_config(overrides=['validation.cases=["p1", "p3"]']), cases)
    assert [case.id for case in named.validation] == ["p1", "p3"]
    assert [case.id for case in named.training] == ["p0", "p2", "p4"] and not named.test
    rates = "data.missing_rates=[0.5, 0, 0, 0]"
    drawn = split(pm.load_config(overrides=["validation.cases=2", rates]), cases)
    assert len(drawn.validation) == 2
    whole = {case.id: case.files for case in cases}
    assert all(case.files == whole[case.id] for case in drawn.validation)  # nothing is hidden
    plain = split(pm.load_config(), cases)
    assert len(plain.training) == 5 and not plain.validation


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("validation.cases=5",),
            "leaves no patient of 5 cases to train on; hold fewer out (set validation.cases)",
        ),
        (
            ('validation.cases=["p9"]',),
            "validation.cases: no such case: p9; name cases of the folder",
        ),
        (
            ('validation.cases=["p1"]', 'data.test_cases=["p1"]'),
            "validation.cases: p1 is a test case, too; leave it out of one of the two",
        ),
        (
            ('validation.cases=["p0", "p1", "p2", "p3", "p4"]',),
            "validation.cases: leaves none of 5 cases to train on; name fewer",
        ),
    ],
)
def test_what_is_wrong_with_validation_cases_is_said(
    overrides: tuple[str, ...], message: str, root: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        split(pm.load_config(overrides=overrides), pm.load_cases(root))
    assert str(caught.value) == message


def test_prepared_cases_have_no_validation_by_configuration(prepared: list[CachedCase]) -> None:
    with pytest.raises(
        ConfigError, match=r"^validation.cases: draws from cases with files, and got"
    ):
        pm.train(prepared, pm.load_config(overrides=[*SMALL, "validation.cases=1"]), progress=False)
