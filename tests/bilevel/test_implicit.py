"""The implicit gradient of a solved inner problem, and its linear solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import oracles
import pytest
import torch
from helpers import (
    F64,
    copies,
    derivative,
    linear,
    meta_gradient,
    mlp,
    mse,
    randn,
    relative_error,
    trainable,
)
from torch import Tensor

from prism_meta.bilevel.inner import SGD
from prism_meta.bilevel.strategies import ImplicitMAML, StepBatches
from prism_meta.bilevel.strategies.implicit import conjugate_gradients

LR = 0.1


@pytest.mark.parametrize("proximal", [0.5, 4.0])
def test_the_implicit_gradient_of_a_quadratic_is_its_closed_form(proximal: float) -> None:
    problem = linear()
    strategy = ImplicitMAML(SGD(LR), steps=500, proximal=proximal, cg_steps=12)
    result = meta_gradient(strategy, problem)
    phi = trainable(problem.model)
    minimum = oracles.proximal_minimum(problem, phi, proximal)
    assert relative_error(result.adapted, minimum) <= 1e-12
    expected = oracles.implicit(problem, minimum, proximal)
    assert relative_error(result.gradient, expected) <= 1e-9
    # At the minimum of the quadratic, too: H does not depend on where it is taken.
    system = oracles.hessian(problem, phi) / proximal
    g = oracles.flat(oracles.gradient(problem, minimum, problem.meta))
    back = oracles.flat(result.gradient)
    assert ((back + system @ back - g).norm() / g.norm()).item() <= 1e-9
    assert max(v.item() for v in result.diagnostics.values()) <= 1e-9


@pytest.mark.parametrize("prefix", ["", "2."])
def test_it_is_the_derivative_of_the_solved_inner_problem(prefix: str) -> None:
    """With respect to all parameters, those that are not adapted too."""

    def moves(name: str) -> bool:
        return name.startswith(prefix)

    problem, proximal = mlp(), 2.0
    strategy = ImplicitMAML(SGD(LR), 400, proximal=proximal, cg_steps=40, adapt=moves)
    result = meta_gradient(strategy, problem)
    phi = copies(trainable(problem.model))
    assert result.diagnostics["stationarity"].item() <= 1e-12
    for name, param in phi.items():
        direction = randn(*param.shape, seed=120)

        def along(
            step: float, name: str = name, param: Tensor = param, direction: Tensor = direction
        ) -> float:
            start = {**phi, name: param + step * direction}
            minimum = oracles.proximal_minimum(problem, start, proximal, moves)
            return oracles.loss(problem, minimum, problem.meta).item()

        actual = (result.gradient[name] * direction).sum().item()
        assert actual == pytest.approx(derivative(along, 0.0, 1e-4), rel=1e-8, abs=1e-10), name


def test_the_proximal_term_is_in_every_inner_step() -> None:
    problem, proximal = mlp(), 3.0
    result = meta_gradient(ImplicitMAML(SGD(LR, 0.5), 4, proximal=proximal), problem)
    phi = trainable(problem.model)
    params, move = dict(phi), oracles.sgd(LR, 0.5)()
    for _ in range(4):
        g = oracles.gradient(problem, params, problem.train)
        pulled = {n: g[n] + proximal * (params[n] - phi[n]) for n in phi}
        params = move(params, pulled)
    assert relative_error(result.adapted, params) <= 1e-12


def test_several_train_batches_are_one_loss() -> None:
    problem = mlp()

    def mean(forward: Callable[..., Any], batch: Any) -> Tensor:
        parts = batch if isinstance(batch, StepBatches) else [batch]
        return torch.stack([mse(forward, part) for part in parts]).mean()

    listed = replace(
        problem, train=StepBatches([problem.train, (randn(4, 3, seed=7), randn(4, 2, seed=8))])
    )
    strategy = ImplicitMAML(SGD(LR), 4, proximal=2.0, cg_steps=40)
    result = meta_gradient(strategy, listed)
    whole = replace(listed, objective=mean)
    assert relative_error(result.gradient, oracles.implicit(whole, result.adapted, 2.0)) <= 1e-9


@pytest.mark.parametrize("cg_steps", [1, 2, 4])
def test_diagnostics_are_the_residuals_of_both_problems(cg_steps: int) -> None:
    problem, proximal = mlp(), 2.0
    result = meta_gradient(ImplicitMAML(SGD(LR), 3, proximal=proximal, cg_steps=cg_steps), problem)
    phi, adapted = trainable(problem.model), result.adapted
    g = oracles.flat(oracles.gradient(problem, adapted, problem.meta))
    x = oracles.flat(result.gradient)
    residual = g - x - oracles.hessian(problem, adapted) @ x / proximal
    expected = (residual.norm() / g.norm()).item()
    assert expected > 1e-6
    assert result.diagnostics["cg_residual"].item() == pytest.approx(expected, rel=1e-9)
    h = oracles.flat(oracles.gradient(problem, adapted, problem.train))
    pull = proximal * (oracles.flat(adapted) - oracles.flat(phi))
    expected = ((h + pull).norm() / h.norm()).item()
    assert expected > 1e-2
    assert result.diagnostics["stationarity"].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proximal": 0.0}, r"^proximal: got 0.0, expected a number > 0$"),
        ({"proximal": float("nan")}, r"^proximal: got nan, expected a number > 0$"),
        ({"cg_steps": 0}, r"^cg_steps: got 0, expected at least 1$"),
    ],
)
def test_numbers_of_implicit_maml_out_of_range_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ImplicitMAML(SGD(LR), **options)


# ---------------------------------------------------------------- conjugate gradients


def _solve(matrix: Tensor, right: Tensor, steps: int) -> tuple[Tensor, float]:
    """By conjugate gradients, with the vector in two parts."""

    def parts(vector: Tensor) -> oracles.Values:
        return {"a": vector[:2], "b": vector[2:].reshape(-1, 1)}

    def system(vector: oracles.Values) -> oracles.Values:
        return parts(matrix @ oracles.flat(vector))

    solution, residual = conjugate_gradients(system, parts(right), steps)
    return oracles.flat(solution), residual.item()


def test_conjugate_gradients_solve_as_many_steps_as_there_are_unknowns() -> None:
    root, right = randn(6, 6, seed=1), randn(6, seed=2)
    matrix = root @ root.T + torch.eye(6, dtype=F64)
    for steps in range(1, 10):
        solution, residual = _solve(matrix, right, steps)
        actual = ((right - matrix @ solution).norm() / right.norm()).item()
        assert residual == pytest.approx(actual, rel=1e-6, abs=1e-12)
        assert (residual <= 1e-9) is (steps >= 6)
    torch.testing.assert_close(solution, torch.linalg.solve(matrix, right), rtol=1e-9, atol=0)


def test_conjugate_gradients_stop_where_the_curvature_is_not_positive() -> None:
    matrix = torch.diag(torch.tensor([3.0, 1.0, -1.0], dtype=F64))
    right = torch.tensor([2.0, 1.0, 1.0], dtype=F64)
    after = [_solve(matrix, right, steps) for steps in (1, 2, 3, 20)]
    assert after[0][0].norm() > 0
    assert all(bool(x.isfinite().all()) for x, _ in after)
    assert torch.equal(after[2][0], after[3][0])
    assert after[2][1] == after[3][1] > 0.1  # and the residual says that it is no solution
    for bad in (-matrix, torch.zeros(3, 3, dtype=F64)):
        solution, residual = _solve(bad, right, 5)
        assert torch.equal(solution, torch.zeros(3, dtype=F64))
        assert residual == 1
    solution, residual = _solve(matrix, 0 * right, 5)
    assert torch.equal(solution, 0 * right)
    assert residual == 0
