"""Reptile: the way back from the adapted parameters as a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from helpers import (
    F64,
    PROBLEMS,
    Problem,
    copies,
    meta_gradient,
    mlp,
    mse,
    relative_error,
    trainable,
)
from torch import nn

from prism_meta.bilevel.inner import SGD, Adam, MetaSGD
from prism_meta.bilevel.learner import MetaLearner
from prism_meta.bilevel.strategies import ImplicitMAML, Reptile

LR = 0.1


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("make_problem", PROBLEMS)
def test_reptile_is_the_way_back_from_the_adapted_parameters(
    make_problem: Callable[[], Problem], steps: int
) -> None:
    problem = make_problem()
    result = meta_gradient(Reptile(SGD(LR, 0.9), steps), problem)
    phi = trainable(problem.model)
    adapted = oracles.adapted_parameters(problem, oracles.sgd(LR, 0.9), steps)
    expected = {n: p - adapted[n] for n, p in phi.items()}
    assert relative_error(result.gradient, expected) <= 1e-12


def test_reptile_gives_parameters_that_are_not_adapted_nothing() -> None:
    result = meta_gradient(Reptile(SGD(LR), 2, adapt=lambda n: n.startswith("2.")), mlp())
    for name, value in result.gradient.items():
        assert bool((value == 0).all()) is name.startswith("0."), name


@pytest.mark.parametrize("total", [1, 2, 10])
def test_the_schedule_of_reptile_runs_from_a_tenth_to_one(total: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.8)
    scheduler = Reptile.schedule(optimizer, total)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected = torch.linspace(0.08, 0.8, total, dtype=F64).tolist()
    assert rates == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", [Reptile, ImplicitMAML])
def test_learned_hyper_parameters_are_refused_where_they_get_no_gradient(kind: Any) -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(
        ValueError,
        match=rf"^inner: {kind.__name__} gives the hyper-parameters rates.bias, rates.weight no "
        r"gradient; use FirstOrder or SecondOrder, or requires_grad_\(False\) on the inner optimizer$",
    ):
        kind(MetaSGD(model), 2)
    kind(MetaSGD(model).requires_grad_(False), 2)


@pytest.mark.parametrize("steps", [1, 4])
def test_outside_sgd_of_rate_epsilon_is_reptile(steps: int) -> None:
    """phi + epsilon (phi~ - phi), three times over, with inner steps by torch's own Adam."""
    problem, twin, epsilon = mlp(), mlp().model, 0.3
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=epsilon)
    strategy = Reptile(Adam(0.05), steps)
    learner = MetaLearner(problem.model, problem.objective, strategy, optimizer, alpha=0)
    for _ in range(3):
        phi = copies(trainable(twin))
        inner = torch.optim.Adam(twin.parameters(), lr=0.05)
        for _ in range(steps):
            inner.zero_grad()
            mse(twin, problem.train).backward()
            inner.step()
        moved = {n: p + epsilon * (trainable(twin)[n] - p) for n, p in phi.items()}
        twin.load_state_dict(moved)
        learner.step(problem.train, problem.meta)
        assert relative_error(trainable(problem.model), moved) <= 1e-12
