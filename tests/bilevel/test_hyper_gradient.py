"""Numbers of the inner optimizer that are learned: their gradient in first and second order."""

from __future__ import annotations

import oracles
import pytest
import torch
from helpers import (
    F64,
    derivative,
    meta_gradient,
    mlp,
    randn,
    relative_error,
    trainable,
)
from orders import (
    EXACT,
    LR,
    ROUNDING,
    Kind,
    first,
    recomputed,
    stored,
)
from torch import nn

from prism_meta.bilevel.inner import SGD, AdamW, MetaSGD


def learned(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value, dtype=F64))


@pytest.mark.parametrize(
    ("kind", "steps"), [(first, 1), (stored, 1), (recomputed, 1), (stored, 4), (recomputed, 4)]
)
@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_a_learned_rate_gets_its_gradient(kind: Kind, steps: int, momentum: float) -> None:
    problem, lr = mlp(), learned(LR)
    result = meta_gradient(kind(SGD(lr, momentum), steps), problem)
    assert lr.grad is None
    value = lr.detach().clone().requires_grad_()
    expected = oracles.hyper(problem, oracles.sgd(value, momentum), steps, {"lr": value})
    assert relative_error(result.hyper_gradient, expected) <= EXACT

    def loss(rate: float) -> float:
        phi = oracles.phi_of(problem)
        return oracles.meta_loss(problem, phi, oracles.sgd(rate, momentum), steps).item()

    assert result.hyper_gradient["lr"].item() == pytest.approx(derivative(loss, LR), rel=1e-8)
    plain = meta_gradient(kind(SGD(LR, momentum), steps), problem)
    assert plain.hyper_gradient == {}
    assert relative_error(result.gradient, plain.gradient) <= ROUNDING


@pytest.mark.parametrize(
    ("kind", "steps"), [(first, 1), (stored, 1), (recomputed, 1), (stored, 4), (recomputed, 4)]
)
def test_all_numbers_of_adamw_can_be_learned(kind: Kind, steps: int) -> None:
    values = {"lr": 0.05, "beta1": 0.5, "beta2": 0.8, "eps": 1e-2, "decay": 0.3}
    given = {n: learned(v) for n, v in values.items()}
    inner = AdamW(given["lr"], (given["beta1"], given["beta2"]), given["eps"], given["decay"])
    problem = mlp()
    result = meta_gradient(kind(inner, steps), problem)
    leaves = oracles.leaves(dict(given))
    expected = oracles.hyper(problem, oracles.adam(**leaves), steps, leaves)
    expected["weight_decay"] = expected.pop("decay")
    actual = {n: result.hyper_gradient[n] for n in expected}
    assert set(result.hyper_gradient) == set(expected)
    # At the first step the moments cancel: the betas' gradients are 0 but for rounding.
    assert relative_error(actual, expected) <= EXACT


@pytest.mark.parametrize(
    ("kind", "steps"), [(first, 1), (stored, 1), (recomputed, 1), (stored, 3), (recomputed, 3)]
)
def test_the_rates_of_meta_sgd_get_their_gradient(kind: Kind, steps: int) -> None:
    problem = mlp()
    inner = MetaSGD(problem.model, lr=LR).double()
    phi = trainable(problem.model)
    values = {
        n: (LR * (1 + 0.5 * randn(*p.shape, seed=90 + i))).requires_grad_()
        for i, (n, p) in enumerate(phi.items())
    }
    keys = [f"rates.{n.replace('.', '/')}" for n in phi]
    inner.load_state_dict(dict(zip(keys, values.values(), strict=True)))
    result = meta_gradient(kind(inner, steps), problem)
    rule, inputs = oracles.rates(values), dict(zip(keys, values.values(), strict=True))
    expected = oracles.hyper(problem, rule, steps, inputs)
    actual = {n: result.hyper_gradient[n] for n in keys}
    assert relative_error(actual, expected) <= EXACT
    oracle = oracles.first_order if kind is first else oracles.second_order
    assert relative_error(result.gradient, oracle(problem, rule, steps)) <= EXACT
