"""Half precision: autocast, the scale of losses; and what graphs keep in memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import (
    LR,
    PROBLEMS,
    STEPS,
    STRATEGIES,
    Problem,
    conv,
    equal,
    meta_gradient,
    mlp,
    mse,
    norm,
    randn,
    relative_error,
)
from torch import Tensor, nn

from prism_meta.bilevel.inner import SGD, Adam
from prism_meta.bilevel.strategies import (
    FiniteDifference,
    FirstOrder,
    ImplicitMAML,
    MetaStrategy,
    SecondOrder,
)

every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
every_graph = pytest.mark.parametrize("graph", ["stored", "recomputed"])


# ---------------------------------------------------------------- autocast


def narrow_conv() -> Problem:
    """The convolutional problem in float32."""
    problem = conv()
    problem.model.float()
    (x, y), (u, v) = problem.train, problem.meta
    return replace(problem, train=(x.float(), y), meta=(u.float(), v))


@every_strategy
def test_autocast_gives_a_float32_gradient_near_the_full_one(strategy: MetaStrategy) -> None:
    problem = narrow_conv()
    full = meta_gradient(strategy, problem)
    with torch.autocast("cpu", torch.bfloat16):
        half = meta_gradient(strategy, problem)
    assert all(g.dtype == torch.float32 for g in half.gradient.values())
    assert all(p.dtype == torch.float32 for p in half.adapted.values())
    error = relative_error(half.gradient, full.gradient)
    if isinstance(strategy, FiniteDifference):
        assert error <= 1e-12  # autocast leaves float64 as it is
    else:
        assert 1e-5 < error < 0.02  # bfloat16 rounds to 4e-3
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("steps", [1, 3])
def test_stored_and_recomputed_are_equal_under_autocast(steps: int) -> None:
    problem = narrow_conv()
    with torch.autocast("cpu", torch.bfloat16):
        one, two = (
            meta_gradient(SecondOrder(SGD(LR), steps, graph=graph), problem)
            for graph in ("stored", "recomputed")
        )
    assert relative_error(two.gradient, one.gradient) <= 1e-6
    assert equal(one.adapted, two.adapted)


class Full(nn.Linear):
    """A layer that asks for full precision."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return torch.tanh(super().forward(x))


@every_strategy
def test_derivatives_are_computed_in_the_types_of_the_forward_pass(strategy: MetaStrategy) -> None:
    model = Full(3, 2)
    with torch.no_grad():
        model.weight.copy_(randn(2, 3, seed=150))
    batch = randn(4, 3, seed=151).float(), randn(4, 2, seed=152).float()
    problem = Problem("full", model, mse, batch, batch)
    expected = meta_gradient(strategy, problem)
    with torch.autocast("cpu", torch.bfloat16):
        result = meta_gradient(strategy, problem)
    assert equal(result.gradient, expected.gradient)


# ---------------------------------------------------------------- graphs


class Saved:
    """A tensor that a graph keeps for its backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved(strategy: MetaStrategy) -> tuple[int, int]:
    """Bytes that graphs keep: the most at any one time, and those that outlive the call."""
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()
    peak = 0

    def size() -> int:
        return sum(s.tensor.numel() * s.tensor.element_size() for s in alive)

    def pack(tensor: Tensor) -> Saved:
        nonlocal peak
        kept = Saved(tensor.detach())
        alive.add(kept)
        peak = max(peak, size())
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        result = meta_gradient(strategy, narrow_conv())
    gc.collect()
    assert norm(result.gradient) > 0
    return peak, size()


@pytest.mark.parametrize("enabled", [False, True], ids=["full", "autocast"])
@pytest.mark.parametrize(
    "make",
    [
        lambda k: FirstOrder(SGD(LR), k),
        lambda k: SecondOrder(SGD(LR), k, graph="recomputed"),
        lambda k: SecondOrder(SGD(LR), k, graph="stored"),
        lambda k: FiniteDifference(SGD(LR), k),
        lambda k: ImplicitMAML(SGD(LR), k),
    ],
    ids=["first", "recomputed", "stored", "differences", "implicit"],
)
def test_only_a_stored_graph_grows_with_the_steps_and_none_outlives_the_call(
    make: Callable[[int], MetaStrategy], enabled: bool
) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        (few, after_few), (many, after_many) = saved(make(2)), saved(make(6))
        assert after_few == after_many == 0
    if getattr(make(2), "graph", "") == "stored":
        assert many > 2 * few
    else:
        assert 0 < many <= 1.01 * few


@pytest.mark.parametrize("strategy", [p for p in STRATEGIES if p.id not in ("single", "stored")])
def test_the_cache_of_autocast_keeps_no_more_than_one_evaluation(strategy: MetaStrategy) -> None:
    """It would keep the parameters of every step until the caller leaves autocast."""
    seen: list[weakref.ref[Tensor]] = []

    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(weakref.ref(self.weight))
            return super().forward(x)

    batch = torch.ones(4, 3), torch.zeros(4, 2)
    problem = Problem("watched", Watched(3, 2), mse, batch, batch)
    with torch.autocast("cpu", torch.bfloat16):
        meta_gradient(strategy, problem)
        gc.collect()
        assert len(seen) > STEPS
        assert len({id(ref()) for ref in seen if ref() is not None}) <= 1


# ---------------------------------------------------------------- scale


@pytest.mark.parametrize("scale", [2.0**16, 2**10, torch.tensor(2.0**12)], ids=str)
@pytest.mark.parametrize("make_problem", PROBLEMS)
@every_strategy
def test_a_power_of_two_as_scale_changes_nothing(
    strategy: MetaStrategy, make_problem: Callable[[], Problem], scale: Any
) -> None:
    one = meta_gradient(strategy, make_problem())
    two = meta_gradient(strategy, make_problem(), scale=scale)
    assert equal(one.gradient, two.gradient)
    assert equal(one.adapted, two.adapted)
    assert torch.equal(one.train_loss, two.train_loss)
    assert torch.equal(one.meta_loss, two.meta_loss)


@every_graph
def test_the_scale_keeps_hyper_gradients_as_they_are(graph: Any) -> None:
    lr = nn.Parameter(torch.tensor(0.05, dtype=torch.float64))
    strategy = SecondOrder(Adam(lr), STEPS, graph=graph)
    one = meta_gradient(strategy, mlp())
    two = meta_gradient(strategy, mlp(), scale=2.0**16)
    assert norm(one.hyper_gradient) > 0
    assert equal(one.hyper_gradient, two.hyper_gradient)
    assert equal(one.gradient, two.gradient)


@pytest.mark.parametrize("strategy", [p for p in STRATEGIES if p.id != "reptile"])
def test_the_scale_keeps_half_precision_from_underflow(strategy: MetaStrategy) -> None:
    """A gradient of 1e-9 is 0 in float16, which ends at 6e-8."""

    def objective(forward: Callable[..., Any], batch: Tensor) -> Tensor:
        return 1e-9 * forward(batch).half().float().sum()

    model = nn.Linear(2, 1, bias=False)
    problem = Problem("tiny", model, objective, torch.ones(1, 2), torch.ones(1, 2))
    assert norm(meta_gradient(strategy, problem).gradient) == 0
    scaled = meta_gradient(strategy, problem, scale=2.0**16).gradient["weight"]
    torch.testing.assert_close(scaled, torch.full((1, 2), 1e-9), rtol=1e-2, atol=0)
