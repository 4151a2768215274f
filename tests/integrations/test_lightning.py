"""The strategies in PyTorch Lightning: the parameters are those of a loop over MetaLearner.step."""

from __future__ import annotations

import csv
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import run_example
from outer_steps import (
    RESUMED,
    STEPS,
    STRATEGIES,
    Make,
    assert_same,
    episodes,
    learner,
    looped,
    prism_episodes,
    prism_learner,
)
from torch import nn
from torch.optim.lr_scheduler import StepLR

from prism_meta.errors import ConfigError
from prism_meta.integrations import MissingPackageError
from prism_meta.integrations.lightning import INSTALL, STATE, MetaModule

pl = pytest.importorskip("pytorch_lightning", reason=f"needs pytorch_lightning: {INSTALL}")


def trainer(folder: Path, **options: Any) -> Any:
    given: dict[str, Any] = {
        "max_steps": STEPS, "accelerator": "cpu", "logger": False, "default_root_dir": folder,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        **options,
    }  # fmt: skip
    return pl.Trainer(**given)


def loader(every: list[Any] | None = None) -> Any:
    return torch.utils.data.DataLoader(
        episodes() if every is None else every, batch_size=None, collate_fn=tuple
    )


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_steps_are_those_of_the_learner(name: str, tmp_path: Path) -> None:
    module = MetaModule(learner(STRATEGIES[name], clip_norm=0.5))
    start = deepcopy(module.model.state_dict())
    fitted = trainer(tmp_path)
    fitted.fit(module, loader())
    assert fitted.global_step == STEPS
    assert_same(module.learner, looped(learner(STRATEGIES[name], clip_norm=0.5)))
    assert not torch.equal(start["first.weight"], module.model.state_dict()["first.weight"])


def test_the_meta_gradient_is_clipped_by_the_learner(tmp_path: Path) -> None:
    """SGD's step is the clipped gradient, so its length is the rate times the norm."""
    moved = []
    for clip in (None, 1e-3):
        own = learner(STRATEGIES["first-order"], alpha=0, clip_norm=clip)
        own.optimizer = torch.optim.SGD(own.model.parameters(), lr=1.0)
        before = nn.utils.parameters_to_vector(own.model.parameters()).detach().clone()
        trainer(tmp_path, max_steps=1).fit(MetaModule(own), loader())
        moved.append((nn.utils.parameters_to_vector(own.model.parameters()) - before).norm().item())
    assert moved[0] > 0.01
    assert moved[1] == pytest.approx(1e-3, rel=1e-3)


def test_lightning_refuses_to_clip_by_itself(tmp_path: Path) -> None:
    module = MetaModule(learner(STRATEGIES["first-order"]))
    with pytest.raises(Exception, match="gradient clipping is not supported for manual"):
        trainer(tmp_path, gradient_clip_val=1.0).fit(module, loader())


@pytest.mark.parametrize(("make", "inner_state"), RESUMED)
def test_a_resumed_training_is_an_uninterrupted_one(
    make: Make, inner_state: str, tmp_path: Path
) -> None:
    every = episodes(2)
    cut = MetaModule(learner(make, inner_state=inner_state))
    first = trainer(tmp_path, max_steps=-1, max_epochs=2)
    first.fit(cut, loader(every))
    first.save_checkpoint(tmp_path / "two.ckpt")
    saved = torch.load(tmp_path / "two.ckpt", weights_only=True)[STATE]
    assert bool(saved["carried"]) == (inner_state == "carried")

    resumed = MetaModule(learner(make, inner_state=inner_state))
    second = trainer(tmp_path, max_steps=-1, max_epochs=3)
    second.fit(resumed, loader(every), ckpt_path=tmp_path / "two.ckpt")
    assert second.global_step == 6
    assert_same(resumed.learner, looped(learner(make, inner_state=inner_state), every * 3))


# It expects a copy of the state before the step, while every other checkpoint has the state after it.
@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning")
def test_checkpoints_losses_and_rates_are_those_of_the_steps(tmp_path: Path) -> None:
    """ModelCheckpoint and a logger count outer steps, and the scheduler is stepped after each."""
    own = learner(STRATEGIES["second-order"])
    scheduler = StepLR(own.optimizer, step_size=2, gamma=0.1)
    saving = pl.callbacks.ModelCheckpoint(tmp_path / "saved", every_n_train_steps=3, save_top_k=-1)
    logger = pl.loggers.CSVLogger(tmp_path, name="log", version="")
    monitor = pl.callbacks.LearningRateMonitor(logging_interval="step")
    fitting = trainer(
        tmp_path, logger=logger, callbacks=[saving, monitor], enable_checkpointing=True,
        log_every_n_steps=1,
    )  # fmt: skip
    fitting.fit(MetaModule(own, scheduler=scheduler), loader())
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "epoch=0-step=3.ckpt", "epoch=0-step=6.ckpt",
    ]  # fmt: skip

    other = learner(STRATEGIES["second-order"])
    rates = StepLR(other.optimizer, step_size=2, gamma=0.1)
    expected = []
    for train, meta in episodes():
        result = other.step(train, meta)
        expected.append((result.train_loss.item(), result.meta_loss.item()))
        rates.step()
    assert_same(own, other)
    text = (tmp_path / "log" / "metrics.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    losses = [(float(r["train_loss"]), float(r["meta_loss"])) for r in rows if r["meta_loss"]]
    assert losses == [pytest.approx(pair, rel=1e-6) for pair in expected]
    assert all(float(r["grad_norm"]) > 0 for r in rows if r["meta_loss"])
    logged = [float(r["lr-Adam"]) for r in rows if r["lr-Adam"]]
    assert logged == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4])


def test_a_prism_step_is_the_learners(tmp_path: Path) -> None:
    """Episodes of batches that Lightning moves to its device, and a loss with terms."""
    module, every = MetaModule(prism_learner()), prism_episodes()
    fitting = trainer(tmp_path, max_steps=3)
    fitting.fit(module, loader(every))
    assert_same(module.learner, looped(prism_learner(), every))
    assert {"meta_loss", "train_loss", "terms/fuse"} <= fitting.callback_metrics.keys()
    meta = every[0][1]
    assert torch.equal(
        module(meta.image, meta.mask).fused, module.model(meta.image, meta.mask).fused
    )


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            SimpleNamespace(world_size=2),
            "trainer: got 2 processes, whose meta-gradients Lightning does not average; use devices=1, or "
            "prism_meta.train",
        ),
        (
            SimpleNamespace(
                world_size=1,
                precision="16-mixed",
                precision_plugin=SimpleNamespace(scaler=object()),
            ),
            "trainer: got precision 16-mixed, which would unscale the meta-gradient, although it is not "
            "scaled; use bf16-mixed or 32-true",
        ),
    ],
    ids=["processes", "precision"],
)
def test_a_trainer_that_would_change_the_step_is_refused(state: Any, message: str) -> None:
    module = MetaModule(learner(STRATEGIES["first-order"]))
    module._trainer = state
    with pytest.raises(ConfigError) as error:
        module.on_fit_start()
    assert str(error.value) == message


def test_a_checkpoint_of_another_module_is_refused() -> None:
    module = MetaModule(learner(STRATEGIES["first-order"]))
    with pytest.raises(ConfigError) as error:
        module.on_load_checkpoint({"state_dict": {}})
    assert str(error.value) == (
        "checkpoint: has no state of a MetaLearner; give one that a training of MetaModule wrote"
    )


def test_the_learner_keeps_its_own_optimizer(tmp_path: Path) -> None:
    own = learner(STRATEGIES["first-order"])
    optimizer = own.optimizer
    trainer(tmp_path).fit(MetaModule(own), loader())
    assert own.optimizer is optimizer
    own.step(*episodes(1)[0])


def test_the_example_runs() -> None:
    run_example(MetaModule)


def test_without_lightning_the_error_has_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    with pytest.raises(MissingPackageError) as error:
        MetaModule(learner(STRATEGIES["first-order"]))
    assert str(error.value).endswith("install it with: pip install 'prism-meta[loggers]'")
