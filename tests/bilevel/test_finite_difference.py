"""E4 by finite differences: how near it comes, and where it does not."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import oracles
import pytest
import torch
from helpers import (
    F64,
    SMOOTH,
    Problem,
    batch_norm,
    conv,
    copies,
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

from prism_meta.bilevel.inner import SGD, Adam, InnerOptimizer
from prism_meta.bilevel.strategies import FiniteDifference, SecondDerivativeError, SecondOrder
from prism_meta.networks.fusion import MeanFusion
from prism_meta.objective.prism import PrismObjective

LR = 0.1
#: Rounding at the default radius, 2e-12, is 2e-16 / 2e-12 = 1e-4 of H v; measured are up to 4e-5.
DEFAULT = 2e-4


def narrow(problem: Problem) -> Problem:
    """The same in float32; labels are as they are."""
    (x, y), (u, v) = (
        tuple(t.float() if t.is_floating_point() else t for t in batch)
        for batch in (problem.train, problem.meta)
    )
    return replace(problem, model=deepcopy(problem.model).float(), train=(x, y), meta=(u, v))


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
    # The radius is 6e-6, its square 4e-11, rounding 2e-16 / 6e-6 = 4e-11: measured are 2e-12
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
    expected = oracles.second_order(problem, rule, steps)
    result = meta_gradient(FiniteDifference(inner(), steps, radius=SMOOTH), problem)
    assert relative_error(result.gradient, expected) <= bound
    default = meta_gradient(FiniteDifference(inner(), steps), problem)
    assert relative_error(default.gradient, expected) <= DEFAULT


def kinked() -> Problem:
    """Three layers of 40 LeakyReLU each, of which some unit is always near its kink."""
    layers: list[nn.Module] = [nn.Linear(6, 40), nn.LeakyReLU(0.01)]
    for _ in range(2):
        layers += [nn.Linear(40, 40), nn.LeakyReLU(0.01)]
    model = nn.Sequential(*layers, nn.Linear(40, 3))
    batches = [(randn(200, 6, seed=s), randn(200, 3, seed=s + 1)) for s in (150, 152)]
    return Problem("kinked", randomize(model, seed=154, scale=0.3), mse, *batches)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("make_problem", [kinked, conv, batch_norm, corners, mlp])
def test_float32_nets_are_near_the_oracle_at_their_kinks_too(
    make_problem: Callable[[], Problem], steps: int
) -> None:
    problem = narrow(make_problem())
    before = copies(problem.model.state_dict())
    result = meta_gradient(FiniteDifference(SGD(0.01), steps), problem)
    assert equal(problem.model.state_dict(), before)
    wide = replace(
        problem,
        model=deepcopy(problem.model).double(),
        train=tuple(t.double() if t.is_floating_point() else t for t in problem.train),
        meta=tuple(t.double() if t.is_floating_point() else t for t in problem.meta),
    )
    expected = oracles.second_order(wide, 0.01, steps)
    assert relative_error({n: g.double() for n, g in result.gradient.items()}, expected) <= DEFAULT
    assert result.diagnostics["asymmetry"].item() <= 1e-3
    buffers = dict(problem.model.named_buffers())
    for values, own in (
        (result.gradient, trainable(problem.model)),
        (result.adapted, trainable(problem.model)),
        (result.buffers, buffers),
        (result.inner_buffers, buffers),
    ):
        assert {n: v.dtype for n, v in values.items()} == {n: v.dtype for n, v in own.items()}


def test_at_kinks_a_larger_radius_is_wrong_and_the_asymmetry_says_so() -> None:
    """In float32 no radius is good: kinks, and below them rounding."""
    problem = kinked()
    expected = oracles.second_order(problem, 0.01, 1)
    first = relative_error(oracles.first_order(problem, 0.01, 1), expected)
    for radius in (5e-3, 5e-4):
        for dtype, episode in ((torch.float64, problem), (torch.float32, narrow(problem))):
            strategy = FiniteDifference(SGD(0.01), radius=radius, dtype=dtype)
            result = meta_gradient(strategy, episode)
            wide = {n: g.double() for n, g in result.gradient.items()}
            assert relative_error(wide, expected) > 0.1 * first
            assert result.diagnostics["asymmetry"].item() > 0.1


@pytest.mark.parametrize(
    "inner", [SGD(LR, momentum=0.9), Adam(0.05, eps=1e-3)], ids=["momentum", "adam"]
)
def test_the_state_of_a_float32_net_is_carried_in_its_types(inner: InnerOptimizer) -> None:
    problem = narrow(mlp())
    results = []
    for strategy in (FiniteDifference(inner, 2), SecondOrder(inner, 2)):
        before = meta_gradient(strategy, problem)
        results.append(meta_gradient(strategy, problem, state=before.state))
    differences, exact = results
    assert relative_error(differences.gradient, exact.gradient) <= 1e-5
    for name, values in exact.state.items():
        for key, value in values.items():
            assert differences.state[name][key].dtype == value.dtype
            torch.testing.assert_close(differences.state[name][key], value)


class Weighted:
    """L_train is (1 + w) times the mean squared error, L_meta that error; w is float32."""

    def __init__(self) -> None:
        self.free = torch.full((), 0.3, requires_grad=True)

    def hyper_parameters(self) -> dict[str, Tensor]:
        return {"w": self.free}

    def __call__(self, forward: Any, batch: Any) -> Tensor:
        return (1 + self.free) * mse(forward, batch)

    def meta_objective(self, forward: Any, batch: Any) -> Tensor:
        return mse(forward, batch)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("make_problem", [mlp, kinked])
def test_learned_weights_in_float32_get_their_gradient(
    make_problem: Callable[[], Problem], steps: int
) -> None:
    """Their gradients are rounded to float32: at the radius of float64 nothing of them were left."""
    exact = meta_gradient(
        SecondOrder(SGD(0.01), steps), replace(make_problem(), objective=Weighted())
    )
    for problem in (make_problem(), narrow(make_problem())):
        weighted = replace(problem, objective=Weighted())
        result = meta_gradient(FiniteDifference(SGD(0.01), steps), weighted)
        assert result.weight_gradient["w"].dtype == torch.float32
        assert relative_error(result.weight_gradient, exact.weight_gradient) <= 1e-3


class Casting(nn.Module):
    """Casts what it is given to its own idea of a type."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x.float())
        return out


def test_a_model_that_cannot_be_evaluated_in_float64_is_refused() -> None:
    problem = narrow(replace(mlp(), model=Casting()))
    message = (
        "dtype: the model cannot be evaluated in torch.float64 (mat1 and mat2 must have the same dtype, "
        "but got Float and Double); give FiniteDifference(dtype=torch.float32), which is near E4 "
        "only for smooth models"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        meta_gradient(FiniteDifference(SGD(LR)), problem)
    result = meta_gradient(FiniteDifference(SGD(LR), dtype=torch.float32), problem)
    exact = meta_gradient(SecondOrder(SGD(LR)), problem)
    assert relative_error(result.gradient, exact.gradient) <= 1e-4


def test_a_type_without_a_point_is_refused() -> None:
    message = r"^dtype: got torch.int64, expected a floating-point type$"
    with pytest.raises(ValueError, match=message):
        FiniteDifference(SGD(LR), dtype=torch.int64)


def test_other_errors_of_the_model_are_left_as_they_are() -> None:
    def broken(forward: Callable[..., Any], batch: Any) -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        meta_gradient(FiniteDifference(SGD(LR)), replace(narrow(mlp()), objective=broken))


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
    result = meta_gradient(FiniteDifference(inner, 10, radius=SMOOTH), problem)
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
    result = meta_gradient(FiniteDifference(SGD(LR), adapt=moves, radius=SMOOTH), problem)
    assert relative_error(result.gradient, oracles.second_order(problem, LR, 1, moves)) <= 1e-6


def test_finite_differences_of_fixed_parameters_and_of_the_rate() -> None:
    def moves(name: str) -> bool:
        return name.startswith("2.")

    problem, lr = mlp(), nn.Parameter(torch.tensor(LR, dtype=F64))
    strategy = FiniteDifference(SGD(lr), 3, adapt=moves, radius=SMOOTH)
    result = meta_gradient(strategy, problem)
    exact = meta_gradient(SecondOrder(SGD(lr), 3, adapt=moves), problem)
    assert relative_error(result.gradient, oracles.second_order(problem, LR, 3, moves)) <= 1e-9
    assert relative_error(result.hyper_gradient, exact.hyper_gradient) <= 1e-9


def test_finite_differences_use_the_same_dropout_on_both_sides() -> None:
    results = []
    for strategy in (FiniteDifference(SGD(LR), 3, radius=SMOOTH), SecondOrder(SGD(LR), 3)):
        torch.manual_seed(3)
        results.append(meta_gradient(strategy, dropout()))
    assert relative_error(results[0].gradient, results[1].gradient) <= 1e-9
    assert equal(results[0].adapted, results[1].adapted)


def test_finite_differences_see_through_a_stop_gradient() -> None:
    """A detached teacher is a constant to autograd's second derivative, but moves with phi."""
    # Without the prm maps' own detach.
    problem = replace(prism(), model=prism_net(fusion=MeanFusion))
    plain = replace(problem, objective=PrismObjective(beta=0.0, delta=0.0))
    for episode, low, high in ((plain, 0, 1e-7), (problem, 1e-3, 0.1)):
        result = meta_gradient(FiniteDifference(SGD(LR), radius=SMOOTH), episode)
        error = relative_error(result.gradient, oracles.second_order(episode, LR, 1))
        assert low <= error <= high


class Attention(nn.Module):
    """Attention with a backend of its own choice; the fused one's backward pass has no derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.backend = SDPBackend.FLASH_ATTENTION
        self.project = nn.Linear(8, 24)
        randomize(self, seed=95)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        with sdpa_kernel(self.backend):
            out: Tensor = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return out


def test_finite_differences_work_where_second_derivatives_do_not_exist() -> None:
    train, meta = ((randn(2, 5, 8, seed=s), randn(2, 5, 8, seed=s + 1)) for s in (96, 98))
    model = Attention()
    problem = Problem("attention", model, mse, train, meta)
    with pytest.raises(SecondDerivativeError, match="flash_attention"):
        meta_gradient(SecondOrder(SGD(LR), 2), problem)
    result = meta_gradient(FiniteDifference(SGD(LR), 2, radius=SMOOTH), problem)
    model.backend = SDPBackend.MATH
    expected = oracles.second_order(problem, LR, 2)
    assert relative_error(result.gradient, expected) <= 1e-9


@pytest.mark.parametrize("radius", [0.0, -1.0, float("nan")])
def test_a_radius_that_is_not_positive_is_refused(radius: float) -> None:
    with pytest.raises(ValueError, match=f"^radius: got {radius}, expected a number > 0$"):
        FiniteDifference(SGD(LR), radius=radius)
