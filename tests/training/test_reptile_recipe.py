"""Reptile as a recipe of the configuration: epsilon, the inner rate's schedule, and no clipping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SMALL
from helpers import faults_of, randn, relative_error, trainable
from resuming import assert_resumed_equals
from torch import nn

import prism_meta as pm
from prism_meta.bilevel.strategies import Reptile, StepBatches
from prism_meta.errors import ConfigError
from prism_meta.training.build import build_outer, build_strategy
from prism_meta.training.config import load_config
from prism_meta.training.fit import fit
from prism_meta.training.outer.schedules import factor

RECIPE = (
    *SMALL, "meta.strategy=reptile", "meta.inner=adamw", "meta.inner_state=carried", "meta.inner_steps=15",
    "meta.inner_lr=0.01", "masks.train=one_subset",
)  # fmt: skip


def objective(forward: Any, batch: Any) -> Any:
    x, y = batch
    return (forward(x) - y).square().mean()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def batch(seed: int) -> tuple[Any, Any]:
    return randn(6, 3, seed=seed), 9 * randn(6, 2, seed=seed + 1)


def test_epsilon_1_with_carried_adamw_is_plain_training_at_the_configured_schedule() -> None:
    """The control of Reptile: the same batches, one AdamW, nothing clipped."""
    steps, inner_steps = 4, 3
    config = load_config(overrides=["training.warmup=1", "meta.inner_lr=0.3", "meta.epsilon=1",
        "meta.strategy=reptile", "meta.inner=adamw", f"meta.inner_steps={inner_steps}",
        f"training.steps={steps}"])  # fmt: skip
    episodes = [
        (StepBatches(batch(10 * t + 2 * k) for k in range(inner_steps)), batch(100))
        for t in range(steps)
    ]
    model, twin, rate = net(), net(), torch.tensor(0.3, dtype=torch.float64)
    strategy = build_strategy(config.meta, rate, weight_decay=0.01)
    outer = build_outer(config, model, objective, strategy, steps=steps)
    fit(
        model, objective, strategy, episodes, optimizer=outer.optimizer, scheduler=outer.scheduler,
        alpha=outer.alpha, inner_lr=rate, inner_schedule=outer.inner_schedule, inner_state="carried",
        clip_norm=None,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(twin.parameters(), weight_decay=0.01)
    for t, (batches, _) in enumerate(episodes):
        optimizer.param_groups[0]["lr"] = 0.3 * factor(t, steps, warmup=1)
        for one in batches:
            optimizer.zero_grad()
            objective(twin, one).backward()
            optimizer.step()
    assert relative_error(trainable(model), trainable(twin)) <= 1e-12


def test_the_way_of_reptile_is_not_clipped() -> None:
    """The way of five steps of AdamW at a rate of 3 is longer than the norm of a gradient may be."""
    model, start = net(), trainable(net())
    episodes = [(batch(1), batch(3))]
    fit(model, objective, Reptile(pm.AdamW(3.0), 5, epsilon=1.0), episodes, clip_norm=5.0)
    moved = {n: p - start[n] for n, p in trainable(model).items()}
    size = sum(float(value.square().sum()) for value in moved.values()) ** 0.5
    assert size > 15


@pytest.mark.parametrize("epsilon", ["0.5", "[0.1, 1.0]"])
def test_the_recipe_of_the_configuration_trains_and_resumes(
    cases: Path, tmp_path: Path, epsilon: str
) -> None:
    config = load_config(
        overrides=[*RECIPE, f"meta.epsilon={epsilon}", "meta.step_weights=arithmetic"]
    )
    whole = pm.train(cases, config, out=tmp_path / "whole", progress=False)
    first, last = (0.5, 0.5) if epsilon == "0.5" else (0.1, 1.0)
    rates = [line["lr"] for line in whole.history]
    assert (rates[0], rates[-1]) == pytest.approx((first, last))
    assert_resumed_equals(tmp_path / "whole", cases, config, tmp_path / "cut", calls=4 + 2)


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("meta.epsilon=0.5", "meta: epsilon: single_level has none; leave it out, or use reptile"),
        (
            "meta.step_weights=arithmetic",
            "meta: step_weights: single_level has none; leave it out, or use reptile",
        ),
    ],
)
def test_only_reptile_has_an_epsilon(override: str, fault: str) -> None:
    assert faults_of(lambda: load_config(overrides=[override]), ConfigError) == (fault,)
    load_config(overrides=[override, "meta.strategy=reptile"])
