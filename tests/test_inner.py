"""The inner SGD against torch.optim.SGD, and its purity and derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import mlp, mse, randn, relative_error, trainable
from torch import Tensor

from prism_meta.inner import SGD, InnerOptimizer

OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"weight_decay": 0.3},
    {"momentum": 0.8, "weight_decay": 0.3},
    {"momentum": 0.8, "weight_decay": 0.3, "nesterov": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_five_steps_equal_torch(options: dict[str, Any]) -> None:
    problem = mlp()
    reference = torch.optim.SGD(problem.model.parameters(), lr=0.1, **options)
    params = {n: p.clone() for n, p in trainable(problem.model).items()}
    sgd = SGD(0.1, **options)
    state = sgd.init(params)
    for _ in range(5):
        before = {n: p.clone() for n, p in trainable(problem.model).items()}
        reference.zero_grad()
        mse(problem.model, problem.train).backward()
        reference.step()
        leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
        loss = mse(
            lambda x, leaves=leaves: torch.func.functional_call(problem.model, leaves, x),
            problem.train,
        )
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        new, state = sgd.update(grads, state, params)
        expected = {n: p - before[n] for n, p in trainable(problem.model).items()}
        assert relative_error({n: new[n] - params[n] for n in params}, expected) <= 1e-12
        params = new


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_arguments_are_not_changed(options: dict[str, Any]) -> None:
    sgd = SGD(0.1, **options)
    params = {"w": randn(3, seed=0), "b": randn(2, seed=1)}
    grads = {"w": randn(3, seed=2), "b": randn(2, seed=3)}
    _, state = sgd.update(grads, sgd.init(params), params)
    arguments = (grads, state, params)
    kept = [{n: t.clone() for n, t in part.items()} for part in arguments]
    first = sgd.update(*arguments)
    second = sgd.update(*arguments)  # nothing on self either
    for part, before in zip(arguments, kept, strict=True):
        assert list(part) == list(before)
        assert all(torch.equal(t, before[n]) for n, t in part.items())
    assert all(torch.equal(first[0][n], second[0][n]) for n in params)
    assert all(first[0][n] is not params[n] for n in params)


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
def test_a_tensor_gets_the_right_gradient(name: str) -> None:
    values = {"lr": 0.1, "momentum": 0.6, "weight_decay": 0.2}
    target = randn(4, seed=9)

    def loss(value: Any) -> Tensor:
        given = {**values, name: value}
        sgd = SGD(given.pop("lr"), **given, nesterov=True)
        params = {"w": randn(4, seed=8)}
        state = sgd.init(params)
        for _ in range(3):
            grads = {"w": torch.cos(params["w"])}
            params, state = sgd.update(grads, state, params)
        return (params["w"] - target).square().sum()

    learned = torch.tensor(values[name], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(learned), learned)
    step = 1e-4
    near = loss(values[name] + step) - loss(values[name] - step)
    far = loss(values[name] + 2 * step) - loss(values[name] - 2 * step)
    expected = ((8 * near - far) / (12 * step)).item()
    assert abs(expected) > 1e-3
    assert gradient.item() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
def test_a_tensor_that_is_zero_still_gets_a_gradient(name: str) -> None:
    """A learned rate may start at 0; that must not switch it off."""
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    given: dict[str, Any] = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.2, name: zero}
    sgd: InnerOptimizer = SGD(given.pop("lr"), **given)
    params = {"w": randn(4, seed=8)}
    state = sgd.init(params)
    for seed in (1, 2):
        params, state = sgd.update({"w": randn(4, seed=seed)}, state, params)
    (gradient,) = torch.autograd.grad(params["w"].sum(), zero)
    assert gradient.item() != 0


def test_a_tensor_rate_may_differ_per_entry() -> None:
    lr = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    params, grads = {"w": randn(3, seed=1)}, {"w": randn(3, seed=2)}
    new, _ = SGD(lr).update(grads, {}, params)
    assert torch.equal(new["w"], params["w"] - lr * grads["w"])


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
def test_a_negative_number_is_refused(name: str) -> None:
    options: dict[str, Any] = {"lr": 0.1, name: -0.5}
    with pytest.raises(ValueError, match=f"{name}: got -0.5, expected a number >= 0"):
        SGD(options.pop("lr"), **options)


def test_nesterov_without_momentum_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"nesterov: needs momentum > 0; give SGD\(lr, momentum=0.9, nesterov=True\)",
    ):
        SGD(0.1, nesterov=True)
