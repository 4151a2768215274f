"""Learned hyper-parameters in the outer step, and resuming from a checkpoint."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from helpers import (
    F64,
    copies,
    episodes,
    equal,
    mlp,
    mse,
    randn,
    relative_error,
    trainable,
)
from torch import Tensor, nn

from prism_meta.bilevel.inner import SGD, Adam, MetaSGD
from prism_meta.bilevel.learner import MetaLearner
from prism_meta.bilevel.strategies import SecondOrder

OUTER = 0.03


@pytest.mark.parametrize("steps", [1, 3])
def test_a_learned_rate_moves_by_its_gradient_and_without_a_pull(steps: int) -> None:
    problem = mlp()
    lr = nn.Parameter(torch.tensor(0.1, dtype=F64))
    optimizer = torch.optim.SGD([*problem.model.parameters(), lr], lr=OUTER)
    learner = MetaLearner(problem.model, mse, SecondOrder(SGD(lr), steps), optimizer, alpha=0.5)
    phi = copies(trainable(problem.model))
    value = torch.tensor(0.1, dtype=F64, requires_grad=True)
    expected = oracles.hyper(mlp(), oracles.sgd(value), steps, {"lr": value})["lr"].item()
    result = learner.step(problem.train, problem.meta)
    assert lr.item() - 0.1 == pytest.approx(-OUTER * expected, rel=1e-9)
    assert lr.grad is None
    moved = {n: p - phi[n] for n, p in trainable(problem.model).items()}
    e2 = {n: 0.5 * (result.adapted[n] - p) - OUTER * result.gradient[n] for n, p in phi.items()}
    assert relative_error(moved, e2) <= 1e-12


def test_a_learned_rate_that_the_optimizer_does_not_hold_stays() -> None:
    problem = mlp()
    lr = nn.Parameter(torch.tensor(0.1, dtype=F64))
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=OUTER)
    with pytest.warns(
        UserWarning,
        match=r"^optimizer: does not hold lr, which should be learned but will keep their values; use "
        r"optimizer.add_param_group, or requires_grad_\(False\)$",
    ) as caught:
        learner = MetaLearner(problem.model, mse, SecondOrder(SGD(lr)), optimizer)
    assert caught[0].filename == __file__
    assert learner.step(problem.train, problem.meta).hyper_gradient["lr"].item() != 0
    assert lr.item() == 0.1
    assert lr.grad is None


class Named(nn.Module):
    """A parameter that is called as a hyper-parameter is."""

    def __init__(self) -> None:
        super().__init__()
        self.lr = nn.Parameter(randn(3, 2, seed=140))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.tanh(x @ self.lr)
        return out


@pytest.mark.parametrize("held", [True, False])
def test_a_parameter_may_have_the_name_of_a_hyper_parameter(held: bool) -> None:
    problem = replace(mlp(), model=Named())
    phi, lr = copies(trainable(problem.model)), nn.Parameter(torch.tensor(0.1, dtype=F64))
    params = [*problem.model.parameters(), *([lr] if held else [])]
    optimizer = torch.optim.SGD(params, lr=OUTER)
    with nullcontext() if held else pytest.warns(UserWarning, match="does not hold lr"):
        learner = MetaLearner(problem.model, mse, SecondOrder(SGD(lr)), optimizer, alpha=0)
    result = learner.step(problem.train, problem.meta)
    moved = {n: p - phi[n] for n, p in trainable(problem.model).items()}
    assert relative_error(moved, {n: -OUTER * g for n, g in result.gradient.items()}) <= 1e-12
    assert (lr.item() != 0.1) is held


def test_the_rates_of_meta_sgd_are_learned() -> None:
    problem = mlp()
    inner = MetaSGD(problem.model, lr=0.05)
    optimizer = torch.optim.SGD([*problem.model.parameters(), *inner.parameters()], lr=OUTER)
    learner = MetaLearner(problem.model, mse, SecondOrder(inner), optimizer, alpha=0)
    before = copies(inner.hyper_parameters())
    values = []
    for _ in range(30):
        result = learner.step(problem.train, problem.meta)
        values.append(result.meta_loss.item())
        expected = {n: before[n] - OUTER * g for n, g in result.hyper_gradient.items()}
        assert relative_error(copies(inner.hyper_parameters()), expected) <= 1e-12
        before = copies(inner.hyper_parameters())
    assert values[-1] < 0.7 * values[0]


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("inner_state", ["fresh", "carried", "shared"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, inner_state: Any, scaled: bool
) -> None:
    def learner() -> MetaLearner:
        model, lr = mlp().model, nn.Parameter(torch.tensor(0.05, dtype=F64))
        optimizer = torch.optim.Adam([*model.parameters(), lr], lr=OUTER)
        scaler = torch.amp.GradScaler("cpu", growth_interval=2) if scaled else None
        return MetaLearner(
            model,
            mse,
            SecondOrder(Adam(lr), 2),
            optimizer,
            inner_state=inner_state,
            scaler=scaler,
        )

    def save(one: MetaLearner) -> dict[str, Any]:
        return {
            "model": one.model.state_dict(),
            "optimizer": one.optimizer.state_dict(),
            "learner": one.state_dict(),
        }

    whole, part = learner(), learner()
    for train, meta in episodes(6):
        whole.step(train, meta)
    for train, meta in episodes(6)[:3]:
        part.step(train, meta)
    torch.save(save(part), tmp_path / "state.pt")
    state, resumed = torch.load(tmp_path / "state.pt"), learner()
    resumed.model.load_state_dict(state["model"])
    resumed.optimizer.load_state_dict(state["optimizer"])
    resumed.load_state_dict(state["learner"])
    for train, meta in episodes(6)[3:]:
        resumed.step(train, meta)
    assert equal(flattened(save(resumed)), flattened(save(whole)))


def flattened(state: Any, name: str = "") -> dict[str, Tensor]:
    """Every tensor and number of nested dictionaries and lists."""
    if isinstance(state, dict | list):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {n: t for key, value in items for n, t in flattened(value, f"{name}/{key}").items()}
    return {name: torch.as_tensor(state)} if isinstance(state, Tensor | float | int) else {}
