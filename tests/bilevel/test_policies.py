"""What strategies do with types, buffers, modes, modalities that are not shown, and random numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import oracles
import pytest
import torch
from helpers import (
    LR,
    STEPS,
    STRATEGIES,
    Problem,
    batch_norm,
    copies,
    dropout,
    equal,
    meta_gradient,
    mlp,
    mse,
    prism,
    randn,
    relative_error,
    trainable,
)
from torch import Tensor, nn

from prism_meta.bilevel.inner import SGD, Adam, AdamW, InnerOptimizer
from prism_meta.bilevel.strategies import (
    FiniteDifference,
    FirstOrder,
    ImplicitMAML,
    MetaStrategy,
    Reptile,
    SecondOrder,
    SingleLevel,
)

every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
every_adapting = pytest.mark.parametrize("strategy", STRATEGIES[1:])
every_graph = pytest.mark.parametrize("graph", ["stored", "recomputed"])


def expected(strategy: MetaStrategy, problem: Problem) -> oracles.Values:
    """The oracle of ``strategy``."""
    phi = trainable(problem.model)
    if isinstance(strategy, SingleLevel):
        return oracles.gradient(problem, phi, problem.train)
    if isinstance(strategy, FirstOrder):
        return oracles.first_order(problem, LR, STEPS)
    if isinstance(strategy, Reptile):
        adapted = oracles.adapted_parameters(problem, LR, STEPS)
        return {n: p - adapted[n] for n, p in phi.items()}
    if isinstance(strategy, ImplicitMAML):
        adapted = meta_gradient(strategy, problem).adapted
        return oracles.implicit(problem, adapted, strategy.proximal)
    return oracles.second_order(problem, LR, STEPS)


# ---------------------------------------------------------------- types


class Mixed(nn.Module):
    """A float32 layer before a float64 one, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 2).double()
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.gain * self.first(x.float())).double())
        return out


def narrow_difference(inner: InnerOptimizer, steps: int) -> MetaStrategy:
    """``Mixed`` casts to float32 itself, so that it cannot be evaluated in float64."""
    return FiniteDifference(inner, steps, dtype=torch.float32)


@pytest.mark.parametrize("inner", [SGD(LR, 0.5), Adam(0.01, eps=1e-3)], ids=["sgd", "adam"])
@pytest.mark.parametrize(
    "kind", [FirstOrder, SecondOrder, Reptile, narrow_difference, ImplicitMAML]
)
def test_parameters_of_several_types_keep_theirs(kind: Any, inner: Any) -> None:
    result = meta_gradient(kind(inner, STEPS), replace(mlp(), model=Mixed()))
    for values in (result.gradient, result.adapted):
        for name, param in trainable(Mixed()).items():
            assert (values[name].dtype, values[name].shape) == (param.dtype, param.shape), name
            assert bool(values[name].isfinite().all())


@every_strategy
def test_gradients_of_several_types_are_right(strategy: MetaStrategy) -> None:
    problem = replace(mlp(), model=Mixed())
    # The same in float64 throughout: the MLP with the gain, whose parameters have the same values.
    wide = replace(problem, model=Mixed().double())
    wide.model.forward = lambda x, m=wide.model: m.last(torch.tanh(m.gain * m.first(x)))
    narrow = (
        narrow_difference(SGD(LR), STEPS) if isinstance(strategy, FiniteDifference) else strategy
    )
    result = meta_gradient(narrow, problem)
    # float32 rounds to 6e-8. A difference has the radius 5e-3 there, and its square is 2e-5.
    bound = 1e-4 if isinstance(strategy, FiniteDifference) else 1e-5
    wider = {n: g.double() for n, g in result.gradient.items()}
    assert relative_error(wider, expected(strategy, wide)) <= bound


@every_strategy
def test_float32_is_near_float64(strategy: MetaStrategy) -> None:
    problem = mlp()
    narrow = replace(
        mlp(),
        model=mlp().model.float(),
        train=tuple(t.float() for t in problem.train),
        meta=tuple(t.float() for t in problem.meta),
    )
    result = meta_gradient(strategy, narrow)
    assert all(g.dtype == torch.float32 for g in result.gradient.values())
    wider = {n: g.double() for n, g in result.gradient.items()}
    bound = 1e-4 if isinstance(strategy, FiniteDifference) else 1e-5
    assert relative_error(wider, meta_gradient(strategy, problem).gradient) <= bound


# ---------------------------------------------------------------- buffers and modes


@every_adapting
def test_inner_buffers_see_every_step_and_outer_ones_the_meta_batch(strategy: MetaStrategy) -> None:
    problem = batch_norm()
    before = copies(dict(problem.model.named_buffers()))
    result = meta_gradient(strategy, problem)
    assert equal(dict(problem.model.named_buffers()), before)  # isolated
    assert result.inner_buffers["1.num_batches_tracked"].item() == STEPS
    assert result.buffers["1.num_batches_tracked"].item() == 1

    def follow(batch: Any, params: oracles.Values) -> None:
        with torch.no_grad():
            torch.func.functional_call(twin, params, batch[0])

    # The inner steps by hand, in a model that keeps its statistics.
    twin = batch_norm().model
    for k in range(STEPS):
        params = trainable(twin)
        if k and isinstance(strategy, ImplicitMAML):
            shorter = ImplicitMAML(SGD(LR), k, proximal=strategy.proximal)
            params = meta_gradient(shorter, problem).adapted
        elif k:
            params = oracles.adapted_parameters(problem, LR, k)
        follow(problem.train, params)
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(result.inner_buffers[name], buffer, rtol=1e-12, atol=1e-16)
    twin = batch_norm().model
    follow(problem.meta, result.adapted)
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(result.buffers[name], buffer, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("make_problem", [batch_norm, dropout])
@every_strategy
def test_a_model_in_eval_mode_is_as_it_is_deployed(
    strategy: MetaStrategy, make_problem: Callable[[], Problem]
) -> None:
    """BatchNorm uses its statistics and leaves them; Dropout draws nothing."""
    problem = make_problem()
    meta_gradient(FirstOrder(SGD(LR)), problem)
    with torch.no_grad():
        for buffer in problem.model.buffers():
            buffer.add_(1)
    problem.model.eval()
    before = copies(dict(problem.model.named_buffers()))
    state = torch.get_rng_state()
    result = meta_gradient(strategy, problem)
    assert torch.equal(torch.get_rng_state(), state)
    assert not problem.model.training
    assert equal(result.buffers, before)
    assert equal(result.inner_buffers, before)
    bound = 1e-8 if isinstance(strategy, FiniteDifference) else 1e-9
    assert relative_error(result.gradient, expected(strategy, problem)) <= bound


@every_strategy
def test_the_encoder_of_a_modality_that_was_never_shown_gets_no_gradient(
    strategy: MetaStrategy,
) -> None:
    problem = prism()
    result = meta_gradient(strategy, replace(problem, meta=problem.train))
    unused = [n for n in result.gradient if n.startswith("encoders.2.")]
    assert len(unused) > 0
    for name in unused:
        assert not result.gradient[name].any(), name
        assert torch.equal(result.adapted[name], trainable(problem.model)[name]), name
    assert result.gradient["encoders.0.blocks.0.0.weight"].any()


@pytest.mark.parametrize(
    "make",
    [
        FirstOrder,
        lambda inner, k: SecondOrder(inner, k, graph="stored"),
        lambda inner, k: SecondOrder(inner, k, graph="recomputed"),
        FiniteDifference,
        Reptile,
        ImplicitMAML,
    ],
)
@pytest.mark.parametrize("inner", [AdamW(LR, weight_decay=0.5), SGD(LR, 0.9, weight_decay=0.5)])
def test_neither_decay_nor_old_moments_move_what_has_no_train_gradient(
    make: Any, inner: InnerOptimizer
) -> None:
    problem = prism()
    seen = meta_gradient(make(inner, 2), replace(problem, train=problem.meta))
    result = meta_gradient(make(inner, 2), problem, state=seen.state)
    for name, param in trainable(problem.model).items():
        still = name.startswith("encoders.2.")
        assert torch.equal(result.adapted[name], param) is still, name
        if still:
            assert equal(result.state[name], seen.state[name])


@pytest.mark.parametrize(
    "make",
    [
        FirstOrder,
        lambda inner, k: SecondOrder(inner, k, graph="stored"),
        lambda inner, k: SecondOrder(inner, k, graph="recomputed"),
        FiniteDifference,
        ImplicitMAML,
    ],
)
def test_a_train_batch_that_reaches_no_adapted_parameter_leaves_the_meta_gradient(
    make: Any,
) -> None:
    problem = prism()
    strategy = make(SGD(LR), 2)
    strategy.adapt = lambda name: name.startswith("encoders.2.")
    result = meta_gradient(strategy, problem)
    phi = trainable(problem.model)
    assert equal(result.adapted, phi)
    plain = oracles.gradient(problem, phi, problem.meta)
    assert relative_error(result.gradient, plain) <= 1e-14


@every_adapting
def test_a_modality_of_the_meta_batch_alone_is_learned_but_not_adapted(
    strategy: MetaStrategy,
) -> None:
    problem = prism()
    result = meta_gradient(strategy, problem)
    name = "encoders.2.blocks.0.0.weight"
    assert torch.equal(result.adapted[name], trainable(problem.model)[name])
    assert bool(result.gradient[name].any()) is not isinstance(strategy, Reptile)


# ---------------------------------------------------------------- random numbers


@pytest.mark.parametrize("strategy", [p for p in STRATEGIES[1:] if p.id != "implicit"])
def test_random_numbers_are_drawn_once_per_step(strategy: MetaStrategy) -> None:
    """What comes after a call does not depend on how the gradient was computed."""
    problem = dropout()
    torch.manual_seed(5)
    for _ in range(STEPS):
        problem.model(problem.train[0])
    problem.model(problem.meta[0])
    state = torch.get_rng_state()
    torch.manual_seed(5)
    meta_gradient(strategy, problem)
    assert torch.equal(torch.get_rng_state(), state)


@every_strategy
def test_a_seed_gives_the_same_dropout(strategy: MetaStrategy) -> None:
    def drawn(seed: int) -> oracles.Values:
        torch.manual_seed(seed)
        return meta_gradient(strategy, dropout()).gradient

    assert equal(drawn(5), drawn(5))
    assert relative_error(drawn(6), drawn(5)) > 1e-3


@every_graph
def test_batches_of_random_numbers_of_the_objective_are_replayed(graph: Any) -> None:
    """An objective may draw, too, e.g. noise on the input."""

    def noisy(forward: Callable[..., Any], batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return mse(forward, (x + torch.randn_like(x), y + 0 * randn(1, seed=0)))

    problem = replace(mlp(), objective=noisy)
    torch.manual_seed(5)
    expected = oracles.second_order(problem, LR, STEPS)
    torch.manual_seed(5)
    result = meta_gradient(SecondOrder(SGD(LR), STEPS, graph=graph), problem)
    assert relative_error(result.gradient, expected) <= 1e-9
