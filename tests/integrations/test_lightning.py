"""The strategies in PyTorch Lightning: the parameters are those of a loop over MetaLearner.step."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import run_example
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

import prism_meta as pm
from prism_meta.bilevel.inner import SGD, Adam, MetaSGD
from prism_meta.bilevel.learner import MetaLearner
from prism_meta.bilevel.strategies import (
    FirstOrder,
    MetaStrategy,
    Reptile,
    SecondOrder,
    SingleLevel,
)
from prism_meta.errors import ConfigError
from prism_meta.integrations import MissingPackageError
from prism_meta.integrations.lightning import INSTALL, STATE, MetaModule

pl = pytest.importorskip("pytorch_lightning", reason=f"needs pytorch_lightning: {INSTALL}")

# Lightning advises on workers, which tests of tensors in memory do not need; it warns of its own use of torch.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:DeprecationWarning"),
]
STEPS = 6
Make = Callable[[nn.Module], MetaStrategy]
STRATEGIES: dict[str, Make] = {
    "single-level": lambda model: SingleLevel(),
    "first-order": lambda model: FirstOrder(SGD(0.05)),
    "second-order": lambda model: SecondOrder(Adam(0.01), steps=2),
    "learned-rates": lambda model: SecondOrder(MetaSGD(model, 0.02), steps=2),
    "reptile": lambda model: Reptile(SGD(0.05), steps=3),
}


class Net(nn.Module):
    """Two layers with a BatchNorm between, so that buffers count."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.norm(self.first(x))))
        return out


def mse(forward: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (forward(batch[0]) - batch[1]).square().mean()


def episodes(steps: int = STEPS) -> list[Any]:
    generator = torch.Generator().manual_seed(1)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(8, 3, generator=generator)
        return x, x.sum(1, keepdim=True).sin()

    return [(batch(), batch()) for _ in range(steps)]


def learner(make: Make, **options: Any) -> MetaLearner:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net()
    strategy = make(model)
    rates = getattr(strategy, "inner", None)
    learned = {} if rates is None else rates.hyper_parameters()
    optimizer = torch.optim.Adam([*model.parameters(), *learned.values()], lr=0.01)
    return MetaLearner(model, mse, strategy, optimizer, **options)


def trainer(folder: Path, **options: Any) -> Any:
    given: dict[str, Any] = {
        "max_steps": STEPS, "accelerator": "cpu", "logger": False, "default_root_dir": folder,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        **options,
    }  # fmt: skip
    return pl.Trainer(**given)


def loader(every: list[Any] | None = None) -> Any:
    return torch.utils.data.DataLoader(episodes() if every is None else every, batch_size=None)


def looped(own: MetaLearner, every: list[Any] | None = None) -> MetaLearner:
    for train, meta in episodes() if every is None else every:
        own.step(train, meta)
    return own


def assert_same(ours: MetaLearner, theirs: MetaLearner) -> None:
    """Bit for bit: parameters, buffers, states of the outer and of the inner optimizer."""
    states = [
        {"model": l.model.state_dict(), "outer": l.optimizer.state_dict(), "own": l.state_dict()}
        for l in (ours, theirs)
    ]
    torch.testing.assert_close(*states, rtol=0, atol=0)


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


@pytest.mark.parametrize(
    ("make", "inner_state"),
    [
        pytest.param(STRATEGIES["learned-rates"], "fresh", id="learned-rates"),
        pytest.param(lambda model: FirstOrder(Adam(0.02), steps=2), "carried", id="carried"),
        pytest.param(lambda model: FirstOrder(Adam(0.01), steps=2), "shared", id="shared"),
    ],
)
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


def test_checkpoints_losses_and_rates_are_those_of_the_steps(tmp_path: Path) -> None:
    """ModelCheckpoint and a logger count outer steps, and the scheduler is stepped after each."""
    own = learner(STRATEGIES["second-order"])
    scheduler = StepLR(own.optimizer, step_size=2, gamma=0.1)
    saving = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    logger = pl.loggers.CSVLogger(tmp_path, name="log", version="")
    monitor = pl.callbacks.LearningRateMonitor(logging_interval="step")
    fitting = trainer(
        tmp_path, logger=logger, callbacks=[saving, monitor], enable_checkpointing=True,
        log_every_n_steps=1,
    )  # fmt: skip
    fitting.fit(MetaModule(own, scheduler=scheduler), loader())
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == [
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
    rows = list(csv.DictReader((tmp_path / "log" / "metrics.csv").open(encoding="utf-8")))
    losses = [(float(r["train_loss"]), float(r["meta_loss"])) for r in rows if r["meta_loss"]]
    assert losses == [pytest.approx(pair, rel=1e-6) for pair in expected]
    assert all(float(r["grad_norm"]) > 0 for r in rows if r["meta_loss"])
    logged = [float(r["lr-Adam"]) for r in rows if r["lr-Adam"]]
    assert logged == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4])


def test_a_prism_step_is_the_learners(tmp_path: Path) -> None:
    """Episodes of batches that Lightning moves to its device, and a loss with terms."""

    def own() -> MetaLearner:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = pm.wrap(nn.Conv2d(2, 3, 1), modalities=("t1", "t2"))
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        return MetaLearner(net, pm.PrismObjective(), FirstOrder(SGD(0.05), steps=2), optimizer)

    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 2, 8, 8, generator=generator)
    target = (image[:, 0] > 0).long()
    train = pm.Batch(image, torch.tensor([[True, False], [False, True]]), target)
    meta = pm.Batch(image, torch.ones(2, 2).bool(), target, case_ids=("a", "b"))
    every = [(pm.StepBatches([train, meta]), meta)] * 3
    module = MetaModule(own())
    fitting = trainer(tmp_path, max_steps=3)
    fitting.fit(module, loader(every))
    assert_same(module.learner, looped(own(), every))
    assert {"meta_loss", "train_loss", "terms/fuse"} <= fitting.callback_metrics.keys()
    assert torch.equal(module(image, train.mask).fused, module.model(image, train.mask).fused)


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
