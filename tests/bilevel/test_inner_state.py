"""The inner optimizer's state between outer steps: fresh, carried, shared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    Problem,
    copies,
    episodes,
    equal,
    mlp,
    mse,
    prism,
    relative_error,
    trainable,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from prism_meta.bilevel.inner import SGD, Adam, AdamW, InnerOptimizer, MetaSGD
from prism_meta.bilevel.learner import MetaLearner
from prism_meta.bilevel.strategies import (
    FirstOrder,
    MetaStrategy,
    Reptile,
    SecondOrder,
    SingleLevel,
)

OUTER = 0.03

#: Optimizers of both levels with the same numbers, as PRISM's published script has one for both.
PAIRS: list[Any] = [
    pytest.param(lambda: Adam(0.05), torch.optim.Adam, {"lr": 0.05}, id="adam"),
    pytest.param(
        lambda: Adam(0.05, (0.5, 0.8), 1e-3, weight_decay=0.1),
        torch.optim.Adam,
        {"lr": 0.05, "betas": (0.5, 0.8), "eps": 1e-3, "weight_decay": 0.1},
        id="adam-l2",
    ),
    pytest.param(
        lambda: SGD(0.05, momentum=0.9),
        torch.optim.SGD,
        {"lr": 0.05, "momentum": 0.9},
        id="momentum",
    ),
    pytest.param(
        lambda: SGD(0.05, 0.9, nesterov=True, weight_decay=0.1),
        torch.optim.SGD,
        {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        id="nesterov",
    ),
    pytest.param(lambda: SGD(0.05), torch.optim.SGD, {"lr": 0.05}, id="sgd"),
    pytest.param(
        lambda: AdamW(0.05, weight_decay=0.4),
        torch.optim.AdamW,
        {"lr": 0.05, "weight_decay": 0.4},
        id="adamw",
    ),
]
every_pair = pytest.mark.parametrize(("inner", "outer", "options"), PAIRS)
Values = dict[str, Tensor]


def torch_step(problem: Problem, optimizer: Optimizer, batch: Any) -> None:
    optimizer.zero_grad()
    value = problem.objective(problem.model, batch)
    (value if isinstance(value, Tensor) else value.loss).backward()
    optimizer.step()


def published(
    problem: Problem, optimizer: Optimizer, train: Any, meta: Any, alpha: float, steps: int
) -> None:
    """One iteration of PRISM's published script: one optimizer steps on both batches, then back."""
    start = copies(trainable(problem.model))
    for _ in range(steps):
        torch_step(problem, optimizer, train)
    adapted = copies(trainable(problem.model))
    torch_step(problem, optimizer, meta)
    with torch.no_grad():
        for name, param in problem.model.named_parameters():
            pull = alpha * (adapted[name] - start[name])
            param.copy_(start[name] + pull + (param - adapted[name]))


def moments(model: nn.Module, optimizer: Optimizer) -> Values:
    return {
        f"{name} {key}": value
        for name, param in model.named_parameters()
        for key, value in sorted(optimizer.state[param].items())
        if value is not None
    }


# ---------------------------------------------------------------- fresh and carried


def test_fresh_is_the_default_and_starts_anew_every_time() -> None:
    problem, strategy = mlp(), FirstOrder(Adam(0.05), 2)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=OUTER)
    learner = MetaLearner(problem.model, mse, strategy, optimizer)
    for train, meta in episodes(3):
        expected = strategy.meta_gradient(problem.model, mse, train, meta)
        result = learner.step(train, meta)
        assert equal(result.adapted, expected.adapted)
        assert {v["step"].item() for v in result.state.values()} == {2}


@pytest.mark.parametrize("kind", [FirstOrder, SecondOrder, Reptile])
@every_pair
def test_carried_is_one_long_inner_optimizer(
    kind: type[Any],
    inner: Callable[[], InnerOptimizer],
    outer: type[Optimizer],
    options: dict[str, Any],
) -> None:
    """Outer rate 0 and alpha 1 leave the inner steps alone, which are torch's own, uninterrupted."""
    problem, twin = mlp(), mlp()
    reference = outer(twin.model.parameters(), **options)
    still = torch.optim.SGD(problem.model.parameters(), lr=0.0)
    learner = MetaLearner(
        problem.model, mse, kind(inner(), 2), still, alpha=1, inner_state="carried"
    )
    for train, meta in episodes(3):
        before = copies(trainable(problem.model))
        for _ in range(2):
            torch_step(twin, reference, train)
        learner.step(train, meta)
        expected = {n: p - before[n] for n, p in trainable(twin.model).items()}
        moved = {n: p - before[n] for n, p in trainable(problem.model).items()}
        assert relative_error(moved, expected) <= 1e-12


@pytest.mark.parametrize("graph", ["stored", "recomputed"])
def test_the_carried_state_is_a_constant_of_the_next_step(graph: Any) -> None:
    problem, strategy = mlp(), SecondOrder(Adam(0.05), 2, graph=graph)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=OUTER)
    learner = MetaLearner(problem.model, mse, strategy, optimizer, inner_state="carried")
    state = None
    for train, meta in episodes(3):
        expected = strategy.meta_gradient(problem.model, mse, train, meta, state=state)
        result = learner.step(train, meta)
        assert equal(result.gradient, expected.gradient)
        state = expected.state
        assert not any(t.requires_grad for values in state.values() for t in values.values())


def test_a_gradient_that_is_not_applied_carries_nothing() -> None:
    problem = mlp()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=OUTER)
    learner = MetaLearner(
        problem.model, mse, FirstOrder(Adam(0.05)), optimizer, inner_state="carried"
    )
    one, two = (learner.meta_gradient(problem.train, problem.meta) for _ in range(2))
    assert equal(one.adapted, two.adapted)


# ---------------------------------------------------------------- shared


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
@every_pair
def test_shared_is_the_published_script(
    inner: Callable[[], InnerOptimizer],
    outer: type[Optimizer],
    options: dict[str, Any],
    alpha: float,
    steps: int,
) -> None:
    problem, twin = mlp(), mlp()
    one = outer(twin.model.parameters(), **options)
    optimizer = outer(problem.model.parameters(), **options)
    strategy = FirstOrder(inner(), steps)
    learner = MetaLearner(
        problem.model, mse, strategy, optimizer, alpha=alpha, inner_state="shared"
    )
    for train, meta in episodes(3):
        before = copies(trainable(twin.model))
        published(twin, one, train, meta, alpha, steps)
        learner.step(train, meta)
        expected = {n: p - before[n] for n, p in trainable(twin.model).items()}
        moved = {n: p - before[n] for n, p in trainable(problem.model).items()}
        assert relative_error(moved, expected) <= 1e-12
        mine, others = moments(problem.model, optimizer), moments(twin.model, one)
        assert list(mine) == list(others)
        for name, value in others.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-12, atol=1e-15)


@every_pair
def test_shared_with_alpha_1_is_one_optimizer_in_turn(
    inner: Callable[[], InnerOptimizer], outer: type[Optimizer], options: dict[str, Any]
) -> None:
    problem, twin = mlp(), mlp()
    one = outer(twin.model.parameters(), **options)
    optimizer = outer(problem.model.parameters(), **options)
    learner = MetaLearner(
        problem.model, mse, FirstOrder(inner()), optimizer, alpha=1, inner_state="shared"
    )
    for train, meta in episodes(3):
        torch_step(twin, one, train)
        torch_step(twin, one, meta)
        learner.step(train, meta)
        assert relative_error(trainable(problem.model), trainable(twin.model)) <= 1e-12


@every_pair
def test_shared_leaves_an_encoder_that_is_not_shown_to_the_meta_batch(
    inner: Callable[[], InnerOptimizer], outer: type[Optimizer], options: dict[str, Any]
) -> None:
    """As in the script: neither moments nor decay move it in the inner step."""
    problem, twin = prism(), prism()
    one = outer(twin.model.parameters(), **options)
    optimizer = outer(problem.model.parameters(), **options)
    learner = MetaLearner(
        problem.model,
        problem.objective,
        FirstOrder(inner()),
        optimizer,
        alpha=0,
        inner_state="shared",
    )
    for _ in range(3):
        before = copies(trainable(problem.model))
        published(twin, one, problem.train, problem.meta, 0.0, 1)
        result = learner.step(problem.train, problem.meta)
        expected = {n: p - before[n] for n, p in trainable(twin.model).items()}
        moved = {n: p - before[n] for n, p in trainable(problem.model).items()}
        assert relative_error(moved, expected) <= 1e-9
        unseen = [n for n in before if n.startswith("encoders.2.")]
        assert all(torch.equal(result.adapted[n], before[n]) for n in unseen)
        assert not any(torch.equal(trainable(problem.model)[n], before[n]) for n in unseen)


def test_shared_passes_the_second_order_gradient_to_the_same_optimizer() -> None:
    problem = mlp()
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=0.05)
    strategy = SecondOrder(Adam(0.05), 2)
    learner = MetaLearner(problem.model, mse, strategy, optimizer, alpha=0, inner_state="shared")
    twin = mlp().model
    reference = torch.optim.Adam(twin.parameters(), lr=0.05)
    for train, meta in episodes(3):
        phi = copies(trainable(problem.model))
        result = learner.step(train, meta)
        for name, param in twin.named_parameters():
            for key, value in result.state[name].items():
                reference.state[param][key] = value.clone()
            param.data.copy_(result.adapted[name])
            param.grad = result.gradient[name].clone()
        reference.step()
        expected = {n: p - result.adapted[n] for n, p in trainable(twin).items()}
        moved = {n: p - phi[n] for n, p in trainable(problem.model).items()}
        assert relative_error(moved, expected) <= 1e-12
        assert equal(moments(problem.model, optimizer), moments(twin, reference))


@pytest.mark.parametrize(
    ("strategy", "optimizer", "message"),
    [
        (
            lambda model: FirstOrder(SGD(0.1)),
            torch.optim.Adam,
            r"got SGD inside and torch.optim.Adam outside, expected torch.optim.SGD outside$",
        ),
        (
            lambda model: FirstOrder(Adam(0.1)),
            torch.optim.AdamW,
            r"got Adam inside and torch.optim.AdamW outside, expected torch.optim.Adam outside$",
        ),
        (
            lambda model: FirstOrder(MetaSGD(model)),
            torch.optim.SGD,
            r"got MetaSGD inside and torch.optim.SGD outside, expected SGD, Adam or AdamW inside$",
        ),
        (
            lambda model: SingleLevel(),
            torch.optim.SGD,
            r"got NoneType inside and torch.optim.SGD outside, expected SGD, Adam or AdamW inside$",
        ),
    ],
)
def test_shared_needs_one_kind_of_optimizer(
    strategy: Callable[[nn.Module], MetaStrategy], optimizer: Any, message: str
) -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(
        ValueError,
        match=r"^inner_state: 'shared' needs the same kind of optimizer for both steps; " + message,
    ):
        MetaLearner(
            model,
            mse,
            strategy(model),
            optimizer(model.parameters(), lr=0.1),
            inner_state="shared",
        )


@pytest.mark.parametrize(
    ("inner", "outer", "options", "names"),
    [
        (Adam(0.1), torch.optim.Adam, {"amsgrad": True}, "amsgrad"),
        (AdamW(0.1), torch.optim.AdamW, {"amsgrad": True, "maximize": True}, "amsgrad, maximize"),
        (SGD(0.1, 0.9), torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}, "dampening"),
    ],
)
def test_shared_refuses_what_inner_optimizers_do_not_have(
    inner: InnerOptimizer, outer: Any, options: dict[str, Any], names: str
) -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(
        ValueError,
        match=rf"^inner_state: 'shared' does not support {names} of the outer optimizer$",
    ):
        MetaLearner(
            model,
            mse,
            FirstOrder(inner),
            outer(model.parameters(), lr=0.1, **options),
            inner_state="shared",
        )
