"""What an objective keeps over training: fed, logged, saved, restored, and equal in all processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import equal, prism_batch, prism_net
from lightning_fabric import Fabric
from torch import Tensor
from torch.utils.data import Dataset

from prism_meta.bilevel.inner import SGD
from prism_meta.bilevel.learner import MetaLearner
from prism_meta.bilevel.strategies import (
    ALL_STRATEGIES,
    FirstOrder,
    MetaGradient,
    MetaStrategy,
    SecondOrder,
    SingleLevel,
)
from prism_meta.errors import ConfigError
from prism_meta.modalities import Batch
from prism_meta.objective.prism import PrismObjective
from prism_meta.objective.weighting import LearnedWeights, RelativePreference, Weighting
from prism_meta.training.build import build_objective, build_strategy
from prism_meta.training.config.meta import MetaConfig
from prism_meta.training.config.schema import Config, load_config
from prism_meta.training.processes.communication import mean_meta_gradient
from prism_meta.training.trainer import Trainer

MASK = [[True, True, False], [True, False, True], [False, True, True]]
RATES = (0.2, 0.5, 0.0)


class Drawn(Dataset[tuple[Batch, Batch]]):
    """Episode t is drawn with the seed t."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, t: int) -> tuple[Batch, Batch]:
        train, meta = (prism_batch(MASK[k:] + MASK[:k], 6, 6, seed=70 + 9 * t + k) for k in (0, 1))
        return train, meta


def preference() -> Weighting:
    return RelativePreference(RATES, gamma=0.5)


def learned() -> Weighting:
    return LearnedWeights(3, beta=0.5, delta=0.2)


def trainer(
    folder: Path,
    weighting: Weighting | None,
    *,
    steps: int = 6,
    strategy: Any = None,
    **options: Any,
) -> Trainer:
    model = prism_net()
    objective = PrismObjective(weighting=weighting)
    groups = [{"params": list(model.parameters())}]
    groups += [{"params": [w], "lr": 0.1} for w in objective.hyper_parameters().values()]
    optimizer = torch.optim.SGD(groups, lr=0.02)
    strategy = strategy or (FirstOrder(SGD(0.1)) if weighting is None else SecondOrder(SGD(0.1)))
    count = options.get("episodes_per_step", 1)
    return Trainer(
        MetaLearner(model, objective, strategy, optimizer),
        Drawn(steps * count),
        scheduler=torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=steps),
        fabric=Fabric(accelerator="cpu", devices=1),
        folder=folder,
        **options,
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state_of(trained: Trainer) -> dict[str, Tensor]:
    objective = trained.learner.objective
    assert isinstance(objective, PrismObjective)
    return {**trained.learner.model.state_dict(), **objective.state_dict()}


@pytest.mark.parametrize("episodes", [1, 2])
def test_each_epoch_makes_a_step_of_preference(tmp_path: Path, episodes: int) -> None:
    trained = trainer(tmp_path, preference(), epoch=2, episodes_per_step=episodes)
    trained.fit()
    # The same by hand.
    again = trainer(tmp_path, preference(), epoch=2)
    learner, objective, data = again.learner, again.learner.objective, Drawn(6 * episodes)
    assert isinstance(objective, PrismObjective)
    for step in range(6):
        group = [data[step * episodes + k] for k in range(episodes)]
        found = [learner.meta_gradient(*episode) for episode in group]
        for one in found:
            objective.observe(one.terms)
        learner.apply(type(found[0]).mean(found))
        again.scheduler.step()
        if step % 2 == 1:
            objective.end_epoch()
    assert equal(state_of(trained), state_of(again))
    moved = objective.state_dict()["factor"] - preference().state_dict()["factor"]
    assert moved.abs().max() > 0.01


def test_the_log_has_epochs_and_the_weights_of_each_step(tmp_path: Path) -> None:
    trainer(tmp_path, preference(), epoch=2).fit()
    found = lines(tmp_path)
    assert [line["epoch"] for line in found] == [1, 1, 2, 2, 3, 3]
    factors = torch.tensor([line["terms"]["beta"] for line in found]) / 0.02
    torch.testing.assert_close(factors[0], torch.tensor([1 / (1 - rate) for rate in RATES]))
    # In force are the weights of the epoch's beginning, of the same length in all.
    assert torch.equal(factors[::2], factors[1::2])
    assert not torch.equal(factors[1], factors[2])
    torch.testing.assert_close(factors.norm(dim=1), factors[0].norm().expand(6))
    for line in found:
        assert line["terms"]["shown"] == [2.0, 2.0, 2.0]
        assert len(line["terms"]["preference"]) == len(line["terms"]["delta"]) == 3


def test_learned_weights_are_logged_as_the_step_used_them(tmp_path: Path) -> None:
    trained = trainer(tmp_path, learned())
    trained.fit()
    betas = [line["terms"]["beta"] for line in lines(tmp_path)]
    assert betas[0] == pytest.approx([0.5] * 3)
    assert betas[1] != betas[0]
    objective = trained.learner.objective
    assert isinstance(objective, PrismObjective)
    assert betas[-1] != objective.weights()["beta"].tolist()
    assert "epoch" not in lines(tmp_path)[0]


def stop(step: int, line: dict[str, Any]) -> None:
    """After the checkpoint of step 4 and the log of step 6, before the checkpoint of step 6."""
    if step == 6:
        raise KeyboardInterrupt


@pytest.mark.parametrize("make", [lambda: None, preference, learned])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, make: Callable[[], Weighting | None]
) -> None:
    # The checkpoint of step 4 falls in the middle of the second epoch, with sums that are not 0.
    options: dict[str, Any] = {"epoch": 3, "checkpoint_every": 4}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    first = trainer(whole, make(), **options)
    first.fit()
    with pytest.raises(KeyboardInterrupt):
        trainer(cut, make(), **options).fit(on_step=stop)
    second = trainer(cut, make(), **options)
    second.fit(resume=True)
    assert equal(state_of(second), state_of(first))
    assert lines(cut) == lines(whole)


def test_sums_of_several_processes_are_gathered(tmp_path: Path) -> None:
    here, there, both = (RelativePreference(RATES, gamma=0.5) for _ in range(3))
    terms = [
        {"preference": torch.tensor(p), "shown": torch.tensor(n)}
        for p, n in (([0.5, -1.0, 0.0], [3.0, 1.0, 0.0]), ([-0.3, 0.4, 0.0], [1.0, 2.0, 0.0]))
    ]
    here.observe(terms[0]), there.observe(terms[1])
    both.observe(terms[0]), both.observe(terms[1])
    trained = trainer(tmp_path, here)

    def all_reduce(state: dict[str, Tensor], reduce_op: str) -> dict[str, Tensor]:
        assert reduce_op == "mean"
        return {name: (value + there.state_dict()[name]) / 2 for name, value in state.items()}

    trained.fabric = SimpleNamespace(world_size=2, all_reduce=all_reduce)  # type: ignore[assignment]
    assert trained.objective is not None
    trained._gather(trained.objective)
    here.end_epoch(), both.end_epoch()
    torch.testing.assert_close(here.factor, both.factor)


def test_a_parameter_is_unused_only_if_no_process_used_it() -> None:
    """Here a and b are unused, in the other process b and c: only b is passed by in both."""
    there = torch.tensor([0.0, 1.0, 1.0])

    def all_reduce(sent: Tensor, reduce_op: str) -> Tensor:
        return torch.cat((sent[:-3], (sent[-3:] + there) / 2))  # the flags are sent last

    fabric: Any = SimpleNamespace(world_size=2, all_reduce=all_reduce, device=torch.device("cpu"))
    zero = torch.zeros(())
    gradient = dict.fromkeys("abc", zero)
    result = MetaGradient(gradient, gradient, zero, zero, unused=frozenset("ab"))
    assert mean_meta_gradient(result, fabric).unused == {"b"}


def test_an_objective_without_state_is_left_alone(tmp_path: Path) -> None:
    plain = trainer(tmp_path, None)
    inner = plain.learner.objective
    bare = trainer(tmp_path, None, steps=2, epoch=1, strategy=SingleLevel())
    bare.learner.objective = lambda forward, batch: inner(forward, batch)
    again = Trainer(
        bare.learner,
        Drawn(2),
        scheduler=bare.scheduler,
        fabric=bare.fabric,
        folder=tmp_path,
        epoch=1,
    )
    assert again.objective is None
    again.fit()
    assert set(lines(tmp_path)[0]["terms"]) == {"fuse", "prm", "uni", "pixel", "proto"}


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize("strategy", ["single_level", "reptile"])
def test_learned_weights_need_a_meta_gradient(strategy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=["objective.weighting=learned", f"meta.strategy={strategy}"])
    assert caught.value.faults == (
        "objective.weighting: learned weights follow the gradient of the meta loss through the inner "
        f"steps, and meta.strategy {strategy} has none; use first_order or second_order, or weighting "
        "fixed or preference",
    )


@pytest.mark.parametrize("kind", ALL_STRATEGIES, ids=lambda kind: kind.name)
def test_the_config_refuses_learned_weights_exactly_if_they_would_not_learn(
    kind: type[MetaStrategy],
) -> None:
    objective = PrismObjective(weighting=learned())
    strategy = build_strategy(
        MetaConfig(strategy=kind.name, cg_steps=1), torch.tensor(0.1), weight_decay=0.0
    )
    try:
        result = strategy.meta_gradient(prism_net(), objective, *Drawn(1)[0])
        learns = bool(result.weight_gradient)
    except ValueError:
        learns = False
    try:
        load_config(overrides=["objective.weighting=learned", f"meta.strategy={kind.name}"])
    except ConfigError:
        assert not learns
    else:
        assert learns


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (
            ["objective.weighting=preference", "objective.unimodal=false"],
            "objective: weighting: preference has nothing to weigh without unimodal; use fixed",
        ),
        (
            ["objective.weighting=learned", "objective.beta=[0.1, 0.0, 0.1, 0.1]"],
            "objective: beta, delta: learned weights start at numbers > 0, because softplus is never 0; "
            "use larger ones",
        ),
    ],
)
def test_weightings_that_cannot_be(overrides: list[str], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=overrides)
    assert caught.value.faults == (fault,)


def test_the_config_builds_what_it_says() -> None:
    objective = build_objective(Config().objective, RATES)
    assert objective.weighting is None and (objective.beta, objective.delta) == (0.02, 0.01)
    overrides = ["objective.weighting=preference", "objective.preference_rate=0.3"]
    weighting = build_objective(load_config(overrides=overrides).objective, RATES).weighting
    assert isinstance(weighting, RelativePreference) and weighting.gamma == 0.3
    torch.testing.assert_close(weighting.factor, torch.tensor([1.25, 2.0, 1.0]))
    overrides = [
        "meta.strategy=first_order",
        "objective.weighting=learned",
        "objective.beta=[0.1,0.2,0.3]",
        'data.modalities=["a","b","c"]',
    ]
    objective = build_objective(load_config(overrides=overrides).objective, RATES)
    assert isinstance(objective.weighting, LearnedWeights)
    assert objective.weights()["beta"].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert (objective.meta_objective.beta, objective.meta_objective.weighting) == (
        (0.1, 0.2, 0.3),
        None,
    )
    overrides = ["objective.unimodal=false", "objective.scale_decay=true"]
    objective = build_objective(load_config(overrides=overrides).objective, RATES)
    assert (objective.unimodal, objective.scale_decay) == (False, True)
