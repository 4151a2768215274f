"""E4 by finite differences: how near it comes, and where it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import oracles
import pytest
import torch
from helpers import (
    F64,
    Problem,
    batch_norm,
    conv,
    corners,
    dropout,
    equal,
    linear,
    meta_gradient,
    mlp,
    mse,
    prism,
    prism_net,
    randn,
    randomize,
    relative_error,
    trainable,
)
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, torch's own convention
from torch.nn.attention import SDPBackend, sdpa_kernel

from prism_meta.fusion import MeanFusion
from prism_meta.inner import SGD, Adam, InnerOptimizer
from prism_meta.objective import PrismObjective
from prism_meta.strategies import FiniteDifference, SecondDerivativeError, SecondOrder

LR = 0.1


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    ("inner", "rule"),
    [
        (lambda: SGD(LR), oracles.sgd(LR)),
        (lambda: SGD(LR, 0.9), oracles.sgd(LR, 0.9)),
        (lambda: Adam(0.05, eps=1e-3), oracles.adam(0.05, eps=1e-3)),
    ],
    ids=["sgd", "momentum", "adam"],
)
@pytest.mark.parametrize(
    # The default radius is 6e-6, its square 4e-11, rounding 2e-16 / 6e-6 = 4e-11: measured are 2e-12
    # to 3e-11 on the MLP. BatchNorm divides by a small deviation and has larger third derivatives.
    ("make_problem", "bound"),
    [(linear, 1e-10), (mlp, 1e-9), (batch_norm, 1e-8), (corners, 1e-7)],
)
def test_finite_differences_are_near_the_oracle(
    make_problem: Callable[[], Problem],
    bound: float,
    inner: Callable[[], InnerOptimizer],
    rule: oracles.Rule,
    steps: int,
) -> None:
    problem = make_problem()
    result = meta_gradient(FiniteDifference(inner(), steps), problem)
    assert relative_error(result.gradient, oracles.second_order(problem, rule, steps)) <= bound


@pytest.mark.parametrize("radius", [1e-3, 0.1, 10.0])
def test_finite_differences_of_a_quadratic_are_exact_at_any_radius(radius: float) -> None:
    problem = linear()
    result = meta_gradient(FiniteDifference(SGD(LR), 3, radius=radius), problem)
    # Rounding only, which grows as the radius shrinks.
    expected = oracles.second_order(problem, LR, 3)
    assert relative_error(result.gradient, expected) <= 1e-14 * max(1, 10 / radius)
    assert result.diagnostics["asymmetry"].item() <= 1e-14 * max(1, 10 / radius)


def test_the_error_is_of_second_order_in_the_radius_and_the_asymmetry_of_first() -> None:
    problem, errors, asymmetries = mlp(), [], []
    for radius in (1e-2, 1e-3):
        result = meta_gradient(FiniteDifference(SGD(LR), radius=radius), problem)
        errors.append(relative_error(result.gradient, oracles.second_order(problem, LR, 1)))
        asymmetries.append(result.diagnostics["asymmetry"].item())
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.05)
    assert asymmetries[0] / asymmetries[1] == pytest.approx(10, rel=0.05)


def test_asymmetry_compares_the_one_sided_differences() -> None:
    problem, radius = mlp(), 0.05
    result = meta_gradient(FiniteDifference(SGD(LR), radius=radius), problem)
    phi = trainable(problem.model)
    # The direction: the gradient of the meta loss at phi~.
    vector = oracles.flat(oracles.first_order(problem, LR, 1))
    moved = radius * oracles.flat(phi).norm() * vector / vector.norm()
    plus, middle, minus = (
        oracles.flat(
            oracles.gradient(
                problem, oracles.shaped(oracles.flat(phi) + s * moved, phi), problem.train
            )
        )
        for s in (1, 0, -1)
    )
    expected = ((plus - middle) - (middle - minus)).norm() / ((plus - minus) / 2).norm()
    assert result.diagnostics["asymmetry"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_asymmetry_is_the_largest_over_the_inner_steps() -> None:
    """A kink that a later step crosses is not hidden by a smooth first step."""
    problem = conv()
    inner = Adam(0.05, eps=1e-3)
    result = meta_gradient(FiniteDifference(inner, 10), problem)
    exact = meta_gradient(SecondOrder(inner, 10), problem)
    assert relative_error(result.gradient, exact.gradient) > 1
    assert result.diagnostics["asymmetry"].item() > 1


def test_asymmetry_at_a_kink_says_that_the_result_cannot_be_trusted() -> None:
    """The gradient jumps from 0 to x where the loss has its kink, and phi lies on it."""

    def hinge(forward: Callable[..., Any], batch: Tensor) -> Tensor:
        return F.relu(forward(batch) - 1).sum()

    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, 0.5]]))
    x = torch.ones(1, 2, dtype=F64)
    problem = Problem("hinge", model, hinge, x, 4 * x)
    result = meta_gradient(FiniteDifference(SGD(LR)), problem)
    assert result.diagnostics["asymmetry"].item() == pytest.approx(2)


def test_without_a_direction_the_product_is_zero() -> None:
    problem = mlp()
    result = meta_gradient(FiniteDifference(SGD(0.0), 2), problem)
    expected = oracles.gradient(problem, trainable(problem.model), problem.meta)
    assert relative_error(result.gradient, expected) <= 1e-14
    assert result.diagnostics["asymmetry"].item() == 0


def test_finite_differences_start_from_parameters_that_are_zero() -> None:
    def moves(name: str) -> bool:
        return name == "2.bias"

    problem = mlp()
    with torch.no_grad():
        problem.model.get_parameter("2.bias").zero_()
    result = meta_gradient(FiniteDifference(SGD(LR), adapt=moves), problem)
    assert relative_error(result.gradient, oracles.second_order(problem, LR, 1, moves)) <= 1e-6


def test_finite_differences_of_fixed_parameters_and_of_the_rate() -> None:
    def moves(name: str) -> bool:
        return name.startswith("2.")

    problem, lr = mlp(), nn.Parameter(torch.tensor(LR, dtype=F64))
    result = meta_gradient(FiniteDifference(SGD(lr), 3, adapt=moves), problem)
    exact = meta_gradient(SecondOrder(SGD(lr), 3, adapt=moves), problem)
    assert relative_error(result.gradient, oracles.second_order(problem, LR, 3, moves)) <= 1e-9
    assert relative_error(result.hyper_gradient, exact.hyper_gradient) <= 1e-9


def test_finite_differences_use_the_same_dropout_on_both_sides() -> None:
    results = []
    for strategy in (FiniteDifference(SGD(LR), 3), SecondOrder(SGD(LR), 3)):
        torch.manual_seed(3)
        results.append(meta_gradient(strategy, dropout()))
    assert relative_error(results[0].gradient, results[1].gradient) <= 1e-9
    assert equal(results[0].adapted, results[1].adapted)


def test_finite_differences_see_through_a_stop_gradient() -> None:
    """A detached teacher is a constant to autograd's second derivative, but moves with phi."""
    problem = replace(
        prism(), model=prism_net(fusion=MeanFusion)
    )  # without the prm maps' own detach
    plain = replace(problem, objective=PrismObjective(beta=0.0, delta=0.0))
    for episode, low, high in ((plain, 0, 1e-7), (problem, 1e-3, 0.1)):
        result = meta_gradient(FiniteDifference(SGD(LR)), episode)
        error = relative_error(result.gradient, oracles.second_order(episode, LR, 1))
        assert low <= error <= high


class Attention(nn.Module):
    """Fused attention, whose backward pass has no derivative of its own on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)
        randomize(self, seed=95)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        out: Tensor = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return out


def test_finite_differences_work_where_second_derivatives_do_not_exist() -> None:
    train, meta = ((randn(2, 5, 8, seed=s), randn(2, 5, 8, seed=s + 1)) for s in (96, 98))
    problem = Problem("attention", Attention(), mse, train, meta)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        with pytest.raises(SecondDerivativeError, match="flash_attention"):
            meta_gradient(SecondOrder(SGD(LR), 2), problem)
        result = meta_gradient(FiniteDifference(SGD(LR), 2), problem)
    with sdpa_kernel(SDPBackend.MATH):
        expected = oracles.second_order(problem, LR, 2)
    assert relative_error(result.gradient, expected) <= 1e-9


@pytest.mark.parametrize("radius", [0.0, -1.0, float("nan")])
def test_a_radius_that_is_not_positive_is_refused(radius: float) -> None:
    with pytest.raises(ValueError, match=f"^radius: got {radius}, expected a number > 0$"):
        FiniteDifference(SGD(LR), radius=radius)
