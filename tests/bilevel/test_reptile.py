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
from prism_meta.bilevel.strategies import ImplicitMAML, Reptile, StepBatches
from prism_meta.bilevel.strategies.reptile import arithmetic_weights

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


@pytest.mark.parametrize(
    ("epsilon", "expected"),
    [(0.5, [0.5] * 4), ((0.1, 1.0), [0.1, 0.4, 0.7, 1.0]), ((1.0, 0.4), [1.0, 0.8, 0.6, 0.4])],
    ids=str,
)
def test_epsilon_is_constant_or_linear(epsilon: Any, expected: list[float]) -> None:
    params = [nn.Parameter(torch.ones(1))]
    optimizer, scheduler = Reptile(SGD(LR), epsilon=epsilon).outer_optimizer(params, 4)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0.0}, r"^epsilon: got 0.0, expected numbers in \(0, 1\]$"),
        ({"epsilon": (0.1, 1.5)}, r"^epsilon: got \(0.1, 1.5\), expected numbers in \(0, 1\]$"),
        ({"step_weights": "falling"}, "^step_weights: got 'falling', expected 'equal' or 'arithm"),
    ],
)
def test_reptile_refuses_bad_options(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reptile(SGD(LR), **options)


def test_arithmetic_weights_have_a_mean_of_1() -> None:
    for steps in (1, 2, 15):
        weights = arithmetic_weights(steps)
        assert weights == [2 * (steps - i + 1) / (steps + 1) for i in range(1, steps + 1)]
        assert sum(weights) / steps == pytest.approx(1, rel=1e-14)


@pytest.mark.parametrize("inner", ["sgd", "adam"])
def test_arithmetic_weights_multiply_the_inner_gradients(inner: str) -> None:
    """Against torch's own optimizers, whose gradients are multiplied by hand."""
    problem, twin, steps = mlp(), mlp().model, 4
    made: Any = {"sgd": (SGD(0.1), torch.optim.SGD), "adam": (Adam(0.1), torch.optim.Adam)}[inner]
    result = meta_gradient(Reptile(made[0], steps, step_weights="arithmetic"), problem)
    optimizer = made[1](twin.parameters(), lr=0.1)
    for weight in (8 / 5, 6 / 5, 4 / 5, 2 / 5):
        optimizer.zero_grad()
        (weight * mse(twin, problem.train)).backward()
        optimizer.step()
    expected = {n: p - trainable(twin)[n] for n, p in trainable(problem.model).items()}
    assert relative_error(result.gradient, expected) <= 1e-12


def test_on_a_linear_loss_arithmetic_weights_give_the_mean_of_all_iterates() -> None:
    """The mean of phi_1, ..., phi_n is 1 / 2 (n + 1) / n of the way that the weighted steps go."""
    model, steps = nn.Linear(2, 1, bias=False).double(), 5
    batches = StepBatches(torch.randn(3, 2, dtype=F64) for _ in range(steps))

    def objective(forward: Any, batch: Any) -> Any:
        return forward(batch).mean()

    strategy = Reptile(SGD(LR), steps, step_weights="arithmetic")
    way = strategy.meta_gradient(model, objective, batches, batches[0]).gradient["weight"]
    slopes = torch.stack([batch.mean(0, keepdim=True) for batch in batches])
    mean_iterate = (-LR * slopes.cumsum(0)).mean(0)
    torch.testing.assert_close(-way * (steps + 1) / (2 * steps), mean_iterate, rtol=1e-12, atol=0)
