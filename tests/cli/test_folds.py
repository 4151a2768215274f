"""``train --fold``: one fold, and ranges that skip what is done and go on where they were stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import errors, run, settings

import prism_meta as pm
from prism_meta.cli import plan_command, train_command
from prism_meta.training.cleanup.file import CLEANUP
from prism_meta.training.config import Config

TWO = settings("training.steps=2")


def folds_of(folder: Path) -> tuple[object, object]:
    data = pm.Run.open(folder).config.data
    return data.folds, data.fold


def test_one_fold_is_held_out(cases: Path, tmp_path: Path) -> None:
    out, plain = tmp_path / "a", tmp_path / "b"
    assert run("train", cases, "--out", out, "--fold", "1", "--folds", "2", *TWO)[0] == 0
    keys = settings("training.steps=2", "data.folds=2", "data.fold=1")
    assert run("train", cases, "--out", plain, *keys)[0] == 0
    assert folds_of(out) == (2, 1)
    for name in ("folds.json", "metrics.jsonl", "weights/last.safetensors", "config.toml"):
        assert (out / name).read_bytes() == (plain / name).read_bytes()


def test_a_range_trains_each_in_its_folder(cases: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    command = ["train", cases, "--out", out, "--fold", "0..1", "--folds", "2", *TWO]
    code, output = run(*command)
    assert code == 0, output
    assert sorted(p.name for p in out.iterdir() if p.name.startswith("fold")) == [
        f"fold{k}" for k in range(2)
    ]
    tested = [json.loads((out / f"fold{k}" / "run.json").read_text())["test"] for k in range(2)]
    assert sorted(name for names in tested for name in names) == ["p0", "p1", "p2", "p3"]
    # Again: all of them are skipped, and nothing is written.
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    code, output = run(*command)
    assert code == 0
    assert [f"{out / f'fold{k}'} is trained already" in output.splitlines() for k in range(2)] == [
        True
    ] * 2
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    # A fold that is lost is trained again; one with other settings is refused before that.
    whole = (out / "fold1" / "weights" / "last.safetensors").read_bytes()
    shutil.rmtree(out / "fold1")
    code, output = run(*command, "-s", "training.lr=0.1")
    assert code == 2 and errors(output) == [
        f"{out / 'fold0'}: was started with other settings (training.lr is 0.01, not 0.1); give the same "
        "ones, or another --out"
    ]
    assert not (out / "fold1").exists()
    assert run(*command)[0] == 0
    assert (out / "fold1" / "weights" / "last.safetensors").read_bytes() == whole


def test_a_stopped_range_goes_on(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = settings("training.steps=4", "validation.cases=1", "training.checkpoint_every=1")

    def command(out: str) -> list[object]:
        return ["train", cases, "--out", tmp_path / out, "--fold", "0..1", "--folds", "4", *keys]

    assert run(*command("whole"))[0] == 0
    train = train_command.train

    def stopped(root: Path, config: Config | None, *, out: Path, **more: Any) -> None:
        seen = [0]
        if out.name == "fold1":
            more["on_step"] = lambda step, line: seen.append(step)
            more["should_stop"] = lambda: seen[-1] + 1 == 2
        train(root, config, out=out, **more)

    with monkeypatch.context() as patch:
        patch.setattr(train_command, "train", stopped)
        code, output = run(*command("cut"))
    assert code == 143, output
    assert output.splitlines()[-1] == "the same command goes on with this fold and those after it"
    assert not (tmp_path / "cut" / "fold1" / CLEANUP).exists()
    code, output = run(*command("cut"))
    assert code == 0 and f"{tmp_path / 'cut' / 'fold0'} is trained already" in output
    for fold in ("fold0", "fold1"):
        for name in (
            "metrics.jsonl",
            "weights/best.safetensors",
            "weights/last.safetensors",
            CLEANUP,
        ):
            first, second = ((tmp_path / o / fold / name).read_bytes() for o in ("whole", "cut"))
            assert first == second, (fold, name)
    # Without its clean-up a run has not ended.
    (tmp_path / "cut" / "fold0" / CLEANUP).unlink()
    assert run(*command("cut"))[0] == 0
    assert (tmp_path / "cut" / "fold0" / CLEANUP).exists()


def test_the_number_of_folds_is_that_of_the_configuration_or_five(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Config] = []
    monkeypatch.setattr(
        train_command, "train_and_tell", lambda root, config, out, **more: trained.append(config)
    )
    assert run("train", cases, "--out", tmp_path / "a", "--fold", "4", *TWO)[0] == 0
    assert (
        run("train", cases, "--out", tmp_path / "a", "--fold", "2", *TWO, "-s", "data.folds=3")[0]
        == 0
    )
    (tmp_path / "folds.toml").write_text("[data]\nfolds = 7\npatch = [16, 16]\n")
    assert run("train", cases, "-c", tmp_path / "folds.toml", "--fold", "5..6")[0] == 0
    assert [(c.data.folds, c.data.fold) for c in trained] == [(5, 4), (3, 2), (7, 5), (7, 6)]


def test_a_plan_is_made_once_for_all_folds(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Config] = []

    def planned(config: Config, root: Path) -> Config:
        made.append(config)
        return pm.load_config(overrides=[*(v for v in TWO[1::2] if not v.startswith("training"))])

    monkeypatch.setattr(plan_command, "planned_by_train", planned)
    command = ["train", cases, "--out", tmp_path / "a", "--folds", "2", "-s", "training.steps=1"]
    assert run(*command, "--fold", "0..0")[0] == 0
    assert run(*command, "--fold", "0..1")[0] == 0
    assert len(made) == 1
    configs = [pm.Run.open(tmp_path / "a" / f"fold{k}").config for k in (0, 1)]
    assert configs[0].model == configs[1].model and configs[0].model.width == 2
    assert [c.data.fold for c in configs] == [0, 1] and configs[1].data.patch == (16, 16)
    assert [c.training.steps for c in configs] == [1, 1]


NO_FOLD = "expected a number such as 0, or a range such as 0..4; correct it"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fold", "x"), f"fold: got 'x', {NO_FOLD}"),
        (("--fold", "3..1"), f"fold: got '3..1', {NO_FOLD}"),
        (("--fold", "0...4"), f"fold: got '0...4', {NO_FOLD}"),
        (("--folds", "3"), "train --folds: needs the fold to hold out; give --fold, e.g. 0..4"),
        (("--fold", "0..1", "-s", "fabric.devices=2"),
         "train --fold: trains several folds in one process, and got fabric.devices=2 on 1 nodes; give each "
         "fold a call of its own"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(
    options: tuple[str, ...], message: str, cases: Path, tmp_path: Path
) -> None:
    code, output = run("train", cases, "--out", tmp_path / "out", *TWO, *options)
    assert code == 2 and errors(output) == [message]
    assert not (tmp_path / "out").exists()


def test_a_fold_that_there_is_not(cases: Path, tmp_path: Path) -> None:
    for fold in ("5", "4..5"):
        code, output = run("train", cases, "--out", tmp_path / "out", "--fold", fold, *TWO)
        assert code == 2 and "fold: got 5, expected at most 4" in errors(output)[0]
    assert not (tmp_path / "out").exists()
