"""Training in several processes, started by the command as a user would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from niftis import write_cases
from safetensors.torch import load_file

from prism_meta.data.cache import prepare
from prism_meta.data.layouts.folders import load_cases
from prism_meta.modalities import Batch
from prism_meta.training.build import (
    build_episodes,
    build_fabric,
    build_label_set,
    build_model,
    build_objective,
    build_outer,
    build_preprocessing,
    build_strategy,
    missing_rates,
)
from prism_meta.training.config import load_config
from prism_meta.training.fit import fit
from prism_meta.training.run import Run

pytestmark = pytest.mark.slow

SETTINGS = (
    "data.patch=[8, 8]",
    "data.spacing=[1, 1, 1]",
    "data.batch_size=2",
    "model.width=4",
    "model.depth=2",
    "meta.strategy=second_order",
    "objective.weighting=preference",
    "training.steps=2",
    "training.checkpoint_every=1",
    "training.augment=false",
    "fabric.accelerator=cpu",
)


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """``prism-meta train`` on one thread per process, with a time limit."""
    return subprocess.run(
        [sys.executable, "-m", "prism_meta", "train", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def settings(*more: str) -> list[str]:
    return [part for setting in (*SETTINGS, *more) for part in ("--set", setting)]


def trained_in_one_process(
    run: Run, folder: Path
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Weights and log of the same episodes in one process: those of both ranks at each outer step."""
    config = load_config(overrides=[*SETTINGS, "meta.episodes=2"])
    cases = load_cases(run.facts["data"])
    data = config.data
    cached = prepare(
        cases,
        folder / "cache",
        preprocessing=build_preprocessing(data),
        labels=build_label_set(data),
    )
    ranks = [build_episodes(run.config, cached, rank=rank) for rank in (0, 1)]
    episodes: Sequence[tuple[Batch, Batch]] = [of[step] for step in range(2) for of in ranks]
    assert not torch.equal(episodes[0][0].image, episodes[1][0].image)
    torch.manual_seed(config.seed)
    model, inner_lr = build_model(config), torch.tensor(config.meta.inner_lr)
    objective = build_objective(config.objective, missing_rates(cached))
    strategy = build_strategy(config.meta, inner_lr, weight_decay=config.training.weight_decay)
    outer = build_outer(config, model, objective, strategy, steps=2)
    log = fit(
        model,
        objective,
        strategy,
        episodes,
        optimizer=outer.optimizer,
        scheduler=outer.scheduler,
        alpha=outer.alpha,
        inner_lr=inner_lr,
        clip_norm=config.training.clip_norm,
        episodes_per_step=2,
        epoch=1,
        fabric=build_fabric(config.fabric),
        seed=config.seed,
    )
    return model.state_dict(), log


def test_two_processes_take_the_mean_step_and_resume(tmp_path: Path) -> None:
    write_cases(tmp_path / "cases", 4)
    two = settings("fabric.devices=2")
    done = command(tmp_path / "cases", "--out", tmp_path / "run", *two)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"run in {tmp_path / 'run'}") == 1
    run = Run.open(tmp_path / "run")
    assert [line["step"] for line in run.history()] == [1, 2]
    (tmp_path / "one_process").mkdir()
    weights = load_file(run.weights())
    expected, log = trained_in_one_process(run, tmp_path / "one_process")
    for line, other in zip(run.history(), log, strict=True):
        for name in ("train_loss", "meta_loss"):
            assert line[name] == pytest.approx(other[name], rel=1e-5), "the mean over the processes"
        assert line["terms"].keys() == other["terms"].keys()
        for name, term in line["terms"].items():
            assert term == pytest.approx(other["terms"][name], rel=1e-4), name
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6, msg=name)

    run.weights().unlink()
    again = command("--resume", run.folder)
    assert again.returncode == 0, again.stderr
    assert all(torch.equal(w, weights[n]) for n, w in load_file(run.weights()).items())


def test_bad_input_ends_before_another_process_starts(tmp_path: Path) -> None:
    write_cases(tmp_path / "cases", 2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    done = command(tmp_path / "cases", "--out", tmp_path / "run", *settings("fabric.devices=2"))
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"error: {tmp_path / 'run'}: holds a run already; continue it with --resume, or give "
        "another --out"
    )


FAILING = textwrap.dedent(
    """
    import sys
    import torch
    import prism_meta as pm
    from lightning_fabric import Fabric
    from prism_meta.errors import CaseError

    class Failing(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, step):
            if step == 2 and fabric.global_rank == int(sys.argv[1]):
                raise CaseError("case p7: p7_t1.nii.gz is damaged; restore it")
            batch = pm.Batch(torch.randn(2, 4, 8, 8), torch.ones(2, 4).bool(), torch.ones(2, 8, 8).long())
            return batch, batch

    fabric = Fabric(accelerator="cpu", devices=2)
    config = pm.load_config(overrides=["data.patch=[8, 8]", "model.width=2", "model.depth=2"])
    try:
        pm.train(Failing(), config, fabric=fabric, out=sys.argv[2], progress=False)
    except pm.PrismError as error:
        print(f"rank {fabric.global_rank}: {error}", flush=True)
        sys.exit(2)
    """
)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_process_meets_is_raised_by_all(tmp_path: Path, rank: int) -> None:
    script = tmp_path / "train.py"
    script.write_text(FAILING)
    done = subprocess.run(
        [sys.executable, script, str(rank), tmp_path / "run"],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2, done.stderr
    for each in (0, 1):
        assert f"rank {each}: case p7: p7_t1.nii.gz is damaged; restore it" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_signal_to_one_process_stops_all(tmp_path: Path) -> None:
    write_cases(tmp_path / "cases", 4)
    out = tmp_path / "run"
    options = settings(
        "fabric.devices=2", "training.steps=100000", "training.checkpoint_every=100000"
    )
    arguments = [
        sys.executable,
        "-m",
        "prism_meta",
        "train",
        tmp_path / "cases",
        "--out",
        out,
        *options,
    ]
    with subprocess.Popen(
        arguments, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as process:
        deadline = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, output = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "stopped by SIGTERM after step" in output and "Traceback" not in output
    assert f"prism-meta train --resume {out}" in output
    steps = len(Run.open(out).history())
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == steps >= 10
