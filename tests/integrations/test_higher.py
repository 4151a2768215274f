"""higher's optimizers as a strategy: our numbers where the two optimizers are the same."""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from helpers import (
    EXACT,
    LR,
    PROBLEMS,
    Problem,
    batch_norm,
    conv,
    copies,
    corners,
    dropout,
    equal,
    every_order,
    every_problem,
    meta_gradient,
    mlp,
    mse,
    norm,
    relative_error,
    run_example,
    trainable,
)
from torch import Tensor, nn, optim

from prism_meta.bilevel.inner import SGD, Adam
from prism_meta.bilevel.learner import MetaLearner
from prism_meta.bilevel.strategies import FirstOrder, SecondOrder
from prism_meta.integrations import MissingPackageError
from prism_meta.integrations.higher import INSTALL, HigherStrategy

Make = Callable[[list[Tensor]], optim.Optimizer]


@pytest.fixture(autouse=True)
def installed(request: pytest.FixtureRequest) -> None:
    if not request.function.__name__.startswith("test_without_higher"):
        pytest.importorskip("higher", reason=f"needs higher: {INSTALL}")


def sgd(params: list[Tensor]) -> optim.Optimizer:
    return optim.SGD(params, LR)


def momentum(params: list[Tensor]) -> optim.Optimizer:
    return optim.SGD(params, LR, momentum=0.9, nesterov=True, weight_decay=0.1)


def small_eps(params: list[Tensor]) -> optim.Optimizer:
    """With so small an eps it does not matter where Adam adds it; see the second test."""
    return optim.Adam(params, 0.05, eps=1e-26)


SAME = {
    "sgd": (sgd, SGD(LR)),
    "momentum": (
        lambda params: optim.SGD(params, LR, momentum=0.9, nesterov=True),
        SGD(LR, momentum=0.9, nesterov=True),
    ),
    "adam": (small_eps, Adam(0.05, eps=1e-26)),
}


@pytest.mark.parametrize("steps", [1, 3])
@every_order
@pytest.mark.parametrize(
    ("make_problem", "make_optimizer", "inner"),
    [
        pytest.param(problem, *SAME[name], id=f"{problem.__name__}-{name}")
        for problem in PROBLEMS
        for name in SAME
        # The bias in front of conv's normalisation has a gradient that is only rounding errors.
        if (problem, name) != (conv, "adam")
    ],
)
def test_the_numbers_are_ours(
    make_problem: Callable[[], Problem],
    make_optimizer: Make,
    inner: Any,
    first_order: bool,
    steps: int,
) -> None:
    problem = make_problem()
    result = meta_gradient(HigherStrategy(make_optimizer, steps, first_order=first_order), problem)
    expected = meta_gradient((FirstOrder if first_order else SecondOrder)(inner, steps), problem)
    assert relative_error(result.gradient, expected.gradient) <= EXACT
    assert relative_error(result.adapted, expected.adapted) <= EXACT
    for name in ("train_loss", "meta_loss"):
        assert torch.allclose(getattr(result, name), getattr(expected, name), rtol=1e-12)
    assert list(result.terms) == list(expected.terms)
    assert result.hyper_gradient == {}


@every_order
@every_problem
def test_its_adam_adds_eps_before_the_bias_is_corrected(
    make_problem: Callable[[], Problem], first_order: bool
) -> None:
    problem, kind = make_problem(), FirstOrder if first_order else SecondOrder
    strategy = HigherStrategy(
        lambda params: optim.Adam(params, 0.01, eps=1e-5), first_order=first_order
    )
    result = meta_gradient(strategy, problem)
    other = meta_gradient(kind(Adam(0.01, eps=1e-5)), problem)
    same = meta_gradient(kind(Adam(0.01, eps=1e-5 / (1 - 0.999) ** 0.5)), problem)
    assert relative_error(result.gradient, same.gradient) <= EXACT
    assert relative_error(result.adapted, same.adapted) <= EXACT
    assert relative_error(result.gradient, other.gradient) > 1e-5


@pytest.mark.parametrize(
    "make_optimizer",
    [
        momentum,
        lambda params: optim.Adam(params, 0.05, eps=1e-15, amsgrad=True),
        lambda params: optim.Adamax(params, 0.05),
        lambda params: optim.Adagrad(params, 0.05),
        lambda params: optim.Adadelta(params, 0.5),
        lambda params: optim.ASGD(params, 0.1),
    ],
    ids=["momentum", "amsgrad", "adamax", "adagrad", "adadelta", "asgd"],
)
def test_the_adapted_parameters_are_torchs(make_optimizer: Make) -> None:
    problem = mlp()
    result = meta_gradient(HigherStrategy(make_optimizer, 4), problem)
    model = deepcopy(problem.model)
    optimizer = make_optimizer(list(model.parameters()))
    for _ in range(4):
        optimizer.zero_grad()
        problem.objective(model, problem.train).backward()
        optimizer.step()
    phi = trainable(problem.model)
    moved = {n: p - phi[n] for n, p in trainable(model).items()}
    actual = {n: result.adapted[n] - p for n, p in phi.items()}
    assert relative_error(actual, moved) <= 1e-8  # torch keeps ASGD's rate in float32
    assert all(bool(g.isfinite().all()) for g in result.gradient.values())


@every_order
def test_frozen_unused_tied_parameters_and_buffers(first_order: bool) -> None:
    problem = corners()
    before = copies(problem.model.state_dict())
    for param in problem.model.parameters():
        param.grad = torch.full_like(param, 7)
    result = meta_gradient(HigherStrategy(sgd, 3, first_order=first_order), problem)
    expected = meta_gradient((FirstOrder if first_order else SecondOrder)(SGD(LR), 3), problem)
    assert relative_error(result.gradient, expected.gradient) <= EXACT
    assert relative_error(result.adapted, expected.adapted) <= EXACT
    assert equal(result.buffers, expected.buffers)
    assert relative_error(result.inner_buffers, expected.inner_buffers) <= EXACT
    assert equal(problem.model.state_dict(), before)
    assert all(bool((p.grad == 7).all()) for p in problem.model.parameters() if p.grad is not None)


def test_an_unused_parameter_does_not_decay() -> None:
    problem = corners()
    result = meta_gradient(HigherStrategy(momentum, 2), problem)
    assert torch.equal(result.adapted["unused"], trainable(problem.model)["unused"])


@every_order
def test_parameters_that_the_optimizer_does_not_hold_stay(first_order: bool) -> None:
    problem = mlp()
    strategy = HigherStrategy(lambda p: optim.SGD(p[2:], LR), 2, first_order=first_order)
    result = meta_gradient(strategy, problem)
    kind = FirstOrder if first_order else SecondOrder
    expected = meta_gradient(kind(SGD(LR), 2, adapt=lambda n: n.startswith("2.")), problem)
    assert relative_error(result.gradient, expected.gradient) <= EXACT
    assert relative_error(result.adapted, expected.adapted) <= EXACT


def test_groups_have_their_own_rates() -> None:
    problem = mlp()
    strategy = HigherStrategy(
        lambda p: optim.SGD([{"params": p[:2], "lr": 0.1}, {"params": p[2:], "lr": 0.3}], 1.0)
    )
    phi = trainable(problem.model)
    moved = meta_gradient(strategy, problem).adapted
    for name, rate in (("0.weight", 0.1), ("2.weight", 0.3)):
        plain = meta_gradient(SecondOrder(SGD(rate)), problem).adapted
        assert torch.allclose(moved[name] - phi[name], plain[name] - phi[name], rtol=1e-12)


@every_order
@pytest.mark.parametrize(
    ("make_optimizer", "inner"),
    [
        pytest.param(momentum, SGD(LR, momentum=0.9, nesterov=True, weight_decay=0.1), id="sgd"),
        pytest.param(small_eps, Adam(0.05, eps=1e-26), id="adam"),
    ],
)
def test_the_state_is_carried_on(make_optimizer: Make, inner: Any, first_order: bool) -> None:
    problem = mlp()
    theirs = HigherStrategy(make_optimizer, 2, first_order=first_order)
    mine = (FirstOrder if first_order else SecondOrder)(inner, 2)
    expected = meta_gradient(mine, problem)
    result = meta_gradient(theirs, problem)
    for name, values in expected.state.items():
        assert relative_error(result.state[name], values) <= EXACT
    again = meta_gradient(theirs, problem, state=result.state)
    expected = meta_gradient(mine, problem, state=expected.state)
    assert relative_error(again.gradient, expected.gradient) <= EXACT
    assert not any(t.requires_grad for values in again.state.values() for t in values.values())


@every_order
def test_the_scale_of_the_losses_cancels(first_order: bool) -> None:
    problem = mlp()
    strategy = HigherStrategy(momentum, 2, first_order=first_order)
    plain = meta_gradient(strategy, problem)
    for scale in (1024.0, torch.tensor(1024.0)):
        scaled = meta_gradient(strategy, problem, scale=scale)
        assert relative_error(scaled.gradient, plain.gradient) <= 1e-12
        assert relative_error(scaled.adapted, plain.adapted) <= 1e-12


def test_a_models_random_numbers_are_those_of_our_strategies() -> None:
    problem = dropout()
    results = []
    for strategy in (HigherStrategy(sgd, 2), SecondOrder(SGD(LR), 2)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            results.append(meta_gradient(strategy, problem))
    assert relative_error(results[0].gradient, results[1].gradient) <= EXACT


def test_nothing_of_the_result_requires_grad() -> None:
    result = meta_gradient(HigherStrategy(momentum, 2), batch_norm())
    values = [result.gradient, result.adapted, result.buffers, result.inner_buffers]
    values += result.state.values()
    assert not any(t.requires_grad for v in values for t in v.values())


def test_a_loss_that_depends_on_no_parameter_moves_nothing() -> None:
    problem = mlp()
    result = HigherStrategy(sgd).meta_gradient(
        problem.model, lambda forward, batch: batch[0].sum(), problem.train, problem.meta
    )
    assert norm(result.gradient) == 0
    assert equal(result.adapted, trainable(problem.model))


@pytest.mark.parametrize("inner_state", ["fresh", "carried"])
@every_problem
def test_meta_learner_trains_with_it(make_problem: Callable[[], Problem], inner_state: Any) -> None:
    problem = make_problem()
    trainer = MetaLearner(
        problem.model,
        problem.objective,
        HigherStrategy(lambda params: optim.Adam(params, 0.01), 2),
        optim.Adam(problem.model.parameters(), 0.03),
        inner_state=inner_state,
    )
    losses = [trainer.step(problem.train, problem.meta).meta_loss.item() for _ in range(15)]
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize(
    ("make_optimizer", "message"),
    [
        (lambda p: optim.AdamW(p, LR), "higher cannot take steps of AdamW .*; use SGD, Adam,"),
        (lambda p: optim.SGD(p, LR, maximize=True), "higher does not support maximize of SGD"),
        (
            lambda p: optim.Adam(p, LR, maximize=True),
            "make_optimizer: higher does not support maximize of Adam; leave it out",
        ),
    ],
)
def test_optimizers_that_higher_would_get_wrong_are_refused(
    make_optimizer: Make, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        meta_gradient(HigherStrategy(make_optimizer), mlp())


def test_no_inner_step_and_no_parameter_are_refused() -> None:
    with pytest.raises(ValueError, match="steps: got 0, expected at least 1 inner step"):
        HigherStrategy(sgd, 0)
    model = nn.Linear(3, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="has no trainable parameter"):
        HigherStrategy(sgd).meta_gradient(model, mse, mlp().train, mlp().meta)


def test_the_example_runs() -> None:
    run_example(HigherStrategy)


def test_without_higher_the_error_has_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "higher", None)
    with pytest.raises(
        MissingPackageError,
        match=r"higher: cannot be imported .*; install it with: pip install higher$",
    ):
        HigherStrategy(sgd)
