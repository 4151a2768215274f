"""E3 and E4 against unrolled oracles and finite differences, both ways of the second order."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import oracles
import pytest
import torch
from helpers import (
    F64,
    PROBLEMS,
    Problem,
    average,
    batch_norm,
    conv,
    copies,
    corners,
    derivative,
    dropout,
    equal,
    linear,
    meta_gradient,
    mlp,
    prism,
    randn,
    relative_error,
    trainable,
)
from orders import (
    EXACT,
    INNERS,
    LR,
    ROUNDING,
    Kind,
    Oracle,
    every_graph,
    every_order,
    every_problem,
    first,
    recomputed,
    stored,
)
from torch import nn
from torch.nn import functional as F  # noqa: N812, torch's own convention
from torch.nn.attention import SDPBackend, sdpa_kernel

from prism_meta.bilevel.inner import SGD, Adam, InnerOptimizer
from prism_meta.bilevel.strategies import (
    ImplicitMAML,
    MetaStrategy,
    SecondDerivativeError,
    SecondOrder,
    StepBatches,
)


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@every_order
@pytest.mark.parametrize("make_problem", [*PROBLEMS, linear, corners, batch_norm])
def test_equals_the_unrolled_oracle(
    make_problem: Callable[[], Problem], kind: Kind, oracle: Oracle, steps: int
) -> None:
    problem = make_problem()
    result = meta_gradient(kind(SGD(LR), steps), problem)
    assert relative_error(result.gradient, oracle(problem, LR, steps)) <= EXACT
    phi = trainable(problem.model)
    expected = oracles.adapted_parameters(problem, LR, steps)
    moved = {n: expected[n] - phi[n] for n in phi}
    assert relative_error({n: result.adapted[n] - phi[n] for n in phi}, moved) <= EXACT


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize(("inner", "rule"), INNERS, ids=["momentum", "adam", "adam-l2", "adamw"])
@every_order
@pytest.mark.parametrize("make_problem", [mlp, conv, prism])
def test_goes_through_other_inner_optimizers(
    make_problem: Callable[[], Problem],
    kind: Kind,
    oracle: Oracle,
    inner: Callable[[], InnerOptimizer],
    rule: oracles.Rule,
    steps: int,
) -> None:
    problem = make_problem()
    result = meta_gradient(kind(inner(), steps), problem)
    assert relative_error(result.gradient, oracle(problem, rule, steps)) <= EXACT


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("prefix", ["0.", "2."])
@every_order
def test_parameters_that_are_not_adapted_get_their_gradient(
    kind: Kind, oracle: Oracle, prefix: str, steps: int
) -> None:
    def moves(name: str) -> bool:
        return name.startswith(prefix)

    problem, rule = mlp(), oracles.sgd(LR, 0.9)
    result = meta_gradient(kind(SGD(LR, 0.9), steps, adapt=moves), problem)
    assert relative_error(result.gradient, oracle(problem, rule, steps, moves)) <= EXACT
    expected = oracles.adapted_parameters(problem, rule, steps, moves)
    assert relative_error(result.adapted, expected) <= ROUNDING


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@every_order
def test_step_k_takes_batch_k_modulo_their_number(kind: Kind, oracle: Oracle, steps: int) -> None:
    batches = [(randn(4, 3, seed=s), randn(4, 2, seed=s + 1)) for s in (80, 82, 84)]
    problem = replace(mlp(), train=StepBatches(batches))
    result = meta_gradient(kind(SGD(LR), steps), problem)
    assert relative_error(result.gradient, oracle(problem, LR, steps)) <= EXACT
    before = oracles.loss(problem, trainable(problem.model), batches[0])
    assert result.train_loss.item() == pytest.approx(before.item(), rel=1e-12)


@pytest.mark.parametrize("steps", [1, 3])
@every_order
def test_starts_from_the_state_that_it_is_given(kind: Kind, oracle: Oracle, steps: int) -> None:
    """Three steps, then ``steps`` more, are one unrolling from phi_3 with Adam's moments of then."""
    problem, inner = mlp(), Adam(0.05, eps=1e-3)
    before = meta_gradient(kind(inner, 3), problem)
    problem.model.load_state_dict(before.adapted)
    result = meta_gradient(kind(inner, steps), problem, state=before.state)
    move = oracles.adam(0.05, eps=1e-3)()
    oracles.adapt(mlp(), oracles.phi_of(mlp()), lambda: move, 3)  # the same moments by hand
    assert relative_error(result.gradient, oracle(problem, lambda: move, steps)) <= EXACT
    assert {v["step"].item() for v in result.state.values()} == {3 + steps}


# ---------------------------------------------------------------- stored and recomputed


# Where a gradient is near 0, Adam divides its rounding by eps: the default would magnify it 1e8 times.
@pytest.mark.parametrize("inner", [lambda: SGD(LR, 0.9), lambda: Adam(0.05, eps=1e-3)])
@pytest.mark.parametrize("make_problem", [mlp, prism, dropout, batch_norm, average])
def test_stored_and_recomputed_are_equal(
    make_problem: Callable[[], Problem], inner: Callable[[], InnerOptimizer]
) -> None:
    problem = make_problem()
    results = []
    for kind in (stored, recomputed):
        torch.manual_seed(3)
        results.append(meta_gradient(kind(inner(), 4), problem))
    one, two = results
    assert relative_error(one.gradient, two.gradient) <= ROUNDING
    assert relative_error(one.adapted, two.adapted) <= ROUNDING
    assert torch.allclose(one.meta_loss, two.meta_loss, rtol=ROUNDING, atol=0)
    assert torch.equal(one.train_loss, two.train_loss)
    for name, values in one.state.items():
        for key, value in values.items():
            torch.testing.assert_close(two.state[name][key], value, rtol=1e-9, atol=1e-15)
    for mine, other in ((one.buffers, two.buffers), (one.inner_buffers, two.inner_buffers)):
        assert list(mine) == list(other)
        for name, buffer in mine.items():
            torch.testing.assert_close(other[name], buffer, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("steps", [1, 3])
@every_order
def test_dropout_is_drawn_once_per_step(kind: Kind, oracle: Oracle, steps: int) -> None:
    problem = dropout()
    torch.manual_seed(3)
    expected = oracle(problem, LR, steps)
    torch.manual_seed(3)
    assert relative_error(meta_gradient(kind(SGD(LR), steps), problem).gradient, expected) <= EXACT
    torch.manual_seed(4)
    other = meta_gradient(kind(SGD(LR), steps), problem).gradient
    assert relative_error(other, expected) > 1e-2


@pytest.mark.parametrize(
    ("graph", "steps", "stores"),
    [("auto", 1, True), ("auto", 2, False), ("stored", 5, True), ("recomputed", 1, False)],
)
def test_auto_stores_the_graph_of_a_single_step(graph: Any, steps: int, stores: bool) -> None:
    assert SecondOrder(SGD(LR), steps, graph=graph).stores is stores


def test_an_unknown_graph_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^graph: got 'both', expected 'auto', 'stored' or 'recomputed'$"
    ):
        SecondOrder(SGD(LR), graph="both")  # type: ignore[arg-type]


# ---------------------------------------------------------------- independent of the oracles' unrolling


def test_second_order_equals_a_gradient_written_by_hand() -> None:
    problem = mlp()
    result = meta_gradient(stored(SGD(LR)), problem)
    assert isinstance(problem.model, nn.Sequential)
    by_hand = oracles.mlp_second_order(problem.model, problem.train, problem.meta, LR)
    expected = dict(zip(result.gradient, by_hand, strict=True))
    assert relative_error(result.gradient, expected) <= EXACT


@every_graph
@every_problem
def test_one_step_is_the_hessian_formula(make_problem: Callable[[], Problem], kind: Kind) -> None:
    problem = make_problem()
    result = meta_gradient(kind(SGD(LR)), problem)
    g = oracles.first_order(problem, LR, 1)
    product = oracles.hessian_vector(problem, trainable(problem.model), g)
    expected = {n: g[n] - LR * h for n, h in product.items()}
    assert relative_error(result.gradient, expected) <= EXACT


@every_graph
def test_one_step_is_the_hessian_formula_with_the_whole_hessian(kind: Kind) -> None:
    problem = mlp()
    result = meta_gradient(kind(SGD(LR)), problem)
    g = oracles.flat(oracles.first_order(problem, LR, 1))
    expected = g - LR * oracles.hessian(problem, trainable(problem.model)) @ g
    error = (oracles.flat(result.gradient) - expected).norm() / expected.norm()
    assert error.item() <= EXACT


@pytest.mark.parametrize("steps", [1, 3])
@every_graph
@pytest.mark.parametrize("make_problem", [mlp, conv, batch_norm])
def test_second_order_equals_finite_differences(
    make_problem: Callable[[], Problem], kind: Kind, steps: int
) -> None:
    problem = make_problem()
    result = meta_gradient(kind(SGD(LR), steps), problem)
    phi = trainable(problem.model)
    for seed in range(3):
        direction = {
            n: randn(*p.shape, seed=100 + 10 * seed + i) for i, (n, p) in enumerate(phi.items())
        }

        def along(step: float, direction: oracles.Values = direction) -> float:
            moved = oracles.leaves({n: p + step * direction[n] for n, p in phi.items()})
            return oracles.meta_loss(problem, moved, LR, steps).item()

        # LeakyReLU has kinks to stay away from.
        expected = derivative(along, 0.0, 1e-5 if problem.name == "conv" else 1e-4)
        actual = sum((result.gradient[n] * d).sum().item() for n, d in direction.items())
        assert actual == pytest.approx(expected, rel=1e-7, abs=1e-9)


# ---------------------------------------------------------------- what has no second derivative


def attention() -> Problem:
    """Attention that insists on the fused kernel, whose backward pass has no derivative."""

    def objective(forward: Callable[..., Any], batch: Any) -> Any:
        q, k, v = forward(batch).unflatten(-1, (3, 1, 4)).permute(2, 0, 3, 1, 4)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v).square().mean()

    model = nn.Linear(6, 12, dtype=F64)
    return Problem("attention", model, objective, randn(2, 5, 6, seed=1), randn(2, 5, 6, seed=2))


@pytest.mark.parametrize(
    "strategy",
    [stored(SGD(LR)), recomputed(SGD(LR)), stored(SGD(LR), 2), ImplicitMAML(SGD(LR))],
    ids=["stored", "recomputed", "two-steps", "implicit"],
)
def test_an_operation_without_second_derivative_is_named_with_what_to_do(
    strategy: MetaStrategy,
) -> None:
    problem = attention()
    message = (
        "scaled_dot_product_flash_attention_for_cpu has no second derivative; call it through "
        "torch.nn.functional.scaled_dot_product_attention without choosing a backend, or use "
        "FiniteDifference or FirstOrder, which need none; preflight(model, objective, batch) names the "
        "module"
    )
    with pytest.raises(SecondDerivativeError, match=f"^{re.escape(message)}$") as caught:
        meta_gradient(strategy, problem)
    assert isinstance(caught.value, RuntimeError)
    assert re.search(r"flash_attention.*not implemented", str(caught.value.__cause__))


def test_other_errors_of_torch_are_left_as_they_are() -> None:
    """igammac has no first derivative with respect to its first argument: no advice of ours helps."""

    def objective(forward: Callable[..., Any], batch: Any) -> Any:
        return torch.special.gammaincc(forward(batch).exp(), batch[:, :2].exp()).sum()

    problem = replace(linear(), objective=objective, train=linear().train[0], meta=linear().meta[0])
    with pytest.raises(NotImplementedError, match=r"derivative for .*igammac.* is not implemented"):
        meta_gradient(stored(SGD(LR)), problem)


# ---------------------------------------------------------------- first against second order


@every_graph
@every_problem
def test_first_and_second_order_differ_on_a_curved_problem(
    make_problem: Callable[[], Problem], kind: Kind
) -> None:
    problem = make_problem()
    one, two = (meta_gradient(k(SGD(LR)), problem) for k in (first, kind))
    assert relative_error(one.gradient, two.gradient) > 1e-2
    assert relative_error(one.adapted, two.adapted) <= 1e-15  # a graph may change the last digit
    assert torch.allclose(one.meta_loss, two.meta_loss, rtol=1e-14, atol=0)


@every_graph
@every_problem
def test_second_order_tends_to_first_at_the_rate_of_the_inner_step(
    make_problem: Callable[[], Problem], kind: Kind
) -> None:
    problem = make_problem()
    gaps = []
    for lr in (1e-4, 5e-5):
        one, two = (meta_gradient(k(SGD(lr)), problem) for k in (first, kind))
        gaps.append(relative_error(one.gradient, two.gradient))
    assert 0 < gaps[0] < 1e-2
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.02)


@every_graph
def test_without_curvature_first_and_second_order_are_equal(kind: Kind) -> None:
    """A train loss that is linear in the parameters."""
    problem = replace(
        linear(),
        objective=lambda forward, batch: (
            forward(batch[0]).sum() if len(batch) == 1 else (forward(batch[0]) - batch[1]).norm()
        ),
        train=(randn(5, 3, seed=91),),
    )
    one, two = (meta_gradient(k(SGD(LR), 3), problem) for k in (first, kind))
    assert relative_error(one.gradient, two.gradient) <= ROUNDING


@every_graph
def test_a_rate_of_zero_is_the_gradient_of_the_meta_loss(kind: Kind) -> None:
    problem = mlp()
    phi = copies(trainable(problem.model))
    result = meta_gradient(kind(SGD(0.0), 2), problem)
    assert equal(result.adapted, phi)
    expected = oracles.gradient(problem, phi, problem.meta)
    assert relative_error(result.gradient, expected) <= ROUNDING
