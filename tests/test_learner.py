"""The outer update E2, and its corners that have a name of their own."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import oracles
import pytest
import torch
from helpers import PROBLEMS, Problem, conv, mlp, mse, randn, relative_error, trainable
from torch import Tensor, nn

from prism_meta.inner import SGD
from prism_meta.learner import MetaLearner
from prism_meta.strategies import (
    FirstOrder,
    MetaGradient,
    MetaStrategy,
    SecondOrder,
    SingleLevel,
)

INNER, OUTER = 0.1, 0.03
EXACT = 1e-9
Values = dict[str, Tensor]

STRATEGIES = [
    pytest.param(SingleLevel(), id="single-level"),
    pytest.param(FirstOrder(SGD(INNER), 2), id="first-order"),
    pytest.param(SecondOrder(SGD(INNER), 2), id="second-order"),
]


def update(
    problem: Problem, strategy: MetaStrategy, *, alpha: float, outer: float = OUTER
) -> tuple[Values, MetaGradient]:
    """How one step with torch.optim.SGD moves the parameters."""
    model = deepcopy(problem.model)
    before = {n: p.clone() for n, p in trainable(model).items()}
    learner = MetaLearner(
        model, problem.objective, strategy, torch.optim.SGD(model.parameters(), lr=outer), alpha
    )
    result = learner.step(problem.train, problem.meta)
    return {n: p - before[n] for n, p in trainable(model).items()}, result


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("make_problem", PROBLEMS)
def test_sgd_outside_is_exactly_e2(
    make_problem: Callable[[], Problem], strategy: MetaStrategy, alpha: float
) -> None:
    problem = make_problem()
    moved, result = update(problem, strategy, alpha=alpha)
    phi = trainable(problem.model)
    expected = {
        n: alpha * (result.adapted[n] - p) - OUTER * result.gradient[n] for n, p in phi.items()
    }
    assert relative_error(moved, expected) <= 1e-12


@pytest.mark.parametrize("make_problem", PROBLEMS)
def test_alpha_0_and_first_order_is_fomaml(make_problem: Callable[[], Problem]) -> None:
    problem = make_problem()
    moved, _ = update(problem, FirstOrder(SGD(INNER), 3), alpha=0)
    g = oracles.first_order(problem, INNER, 3)
    assert relative_error(moved, {n: -OUTER * v for n, v in g.items()}) <= EXACT


@pytest.mark.parametrize("make_problem", PROBLEMS)
def test_alpha_0_and_second_order_is_maml(make_problem: Callable[[], Problem]) -> None:
    problem = make_problem()
    moved, _ = update(problem, SecondOrder(SGD(INNER), 3), alpha=0)
    g = oracles.second_order(problem, INNER, 3)
    assert relative_error(moved, {n: -OUTER * v for n, v in g.items()}) <= EXACT


@pytest.mark.parametrize("make_problem", PROBLEMS)
def test_alpha_1_and_first_order_is_alternating_sgd(make_problem: Callable[[], Problem]) -> None:
    problem = make_problem()
    moved, _ = update(problem, FirstOrder(SGD(INNER)), alpha=1)
    # Two plain SGD steps, one on each batch.
    phi = trainable(problem.model)
    g = oracles.gradient(problem, phi, problem.train)
    middle = {n: phi[n] - INNER * g[n] for n in phi}
    h = oracles.gradient(problem, middle, problem.meta)
    assert relative_error(moved, {n: middle[n] - OUTER * h[n] - phi[n] for n in phi}) <= EXACT


@pytest.mark.parametrize("make_problem", PROBLEMS)
def test_outer_rate_0_is_reptile(make_problem: Callable[[], Problem]) -> None:
    problem = make_problem()
    moved, _ = update(problem, FirstOrder(SGD(INNER), 3), alpha=0.4, outer=0.0)
    phi, adapted = trainable(problem.model), oracles.adapted_parameters(problem, INNER, 3)
    assert relative_error(moved, {n: 0.4 * (adapted[n] - phi[n]) for n in phi}) <= EXACT


@pytest.mark.parametrize("make_problem", PROBLEMS)
def test_the_alpha_term_of_one_step_is_the_train_gradient(
    make_problem: Callable[[], Problem],
) -> None:
    """E2 is first-order MLDG with weight alpha."""
    problem = make_problem()
    moved, _ = update(problem, FirstOrder(SGD(INNER)), alpha=0.7)
    phi = trainable(problem.model)
    g = oracles.gradient(problem, phi, problem.train)
    h = oracles.first_order(problem, INNER, 1)
    expected = {n: -0.7 * INNER * g[n] - OUTER * h[n] for n in phi}
    assert relative_error(moved, expected) <= EXACT


def test_single_level_ignores_alpha_for_nothing_was_adapted() -> None:
    one, _ = update(mlp(), SingleLevel(), alpha=0)
    two, _ = update(mlp(), SingleLevel(), alpha=1)
    assert relative_error(one, two) == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_adam_sees_the_meta_gradient_and_nothing_else(strategy: MetaStrategy) -> None:
    problem = mlp()
    model, twin = deepcopy(problem.model), deepcopy(problem.model)
    optimizer = torch.optim.Adam(model.parameters(), lr=OUTER)
    reference = torch.optim.Adam(twin.parameters(), lr=OUTER)
    learner = MetaLearner(model, problem.objective, strategy, optimizer, alpha=0.5)
    for _ in range(3):
        before = {n: p.clone() for n, p in trainable(model).items()}
        twin.load_state_dict(model.state_dict())
        result = learner.step(problem.train, problem.meta)
        for name, param in twin.named_parameters():
            param.grad = result.gradient[name].clone()
        reference.step()
        expected = {
            n: p + 0.5 * (result.adapted[n] - before[n]) for n, p in trainable(twin).items()
        }
        moved = {n: p - before[n] for n, p in trainable(model).items()}
        assert relative_error(moved, {n: e - before[n] for n, e in expected.items()}) <= 1e-12
        for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
            for moment in ("exp_avg", "exp_avg_sq", "step"):
                assert torch.equal(optimizer.state[mine][moment], reference.state[other][moment])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("make_problem", [mlp, conv])
def test_meta_gradient_then_apply_is_step(
    make_problem: Callable[[], Problem], strategy: MetaStrategy
) -> None:
    problem = make_problem()
    moved, _ = update(problem, strategy, alpha=0.5)
    model = deepcopy(problem.model)
    learner = MetaLearner(
        model, problem.objective, strategy, torch.optim.SGD(model.parameters(), lr=OUTER)
    )
    phi = {n: p.clone() for n, p in trainable(model).items()}
    result = learner.meta_gradient(problem.train, problem.meta)
    assert all(torch.equal(p, phi[n]) for n, p in trainable(model).items())
    assert all(p.grad is None for p in model.parameters())
    learner.apply(result)
    assert relative_error({n: p - phi[n] for n, p in trainable(model).items()}, moved) == 0
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_leaves_its_result_as_it_was(strategy: MetaStrategy) -> None:
    problem = mlp()
    model = deepcopy(problem.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=OUTER, momentum=0.9, weight_decay=0.1)
    learner = MetaLearner(model, problem.objective, strategy, optimizer)
    result = learner.meta_gradient(problem.train, problem.meta)
    parts = (result.gradient, result.adapted)
    kept = [{n: t.clone() for n, t in part.items()} for part in parts]
    learner.apply(result)
    for part, before in zip(parts, kept, strict=True):
        assert all(torch.equal(t, before[n]) for n, t in part.items())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_batch_norm_statistics_are_committed_once(strategy: MetaStrategy) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    train, meta = ((randn(5, 3, seed=s), randn(5, 2, seed=s + 1)) for s in (50, 60))
    learner = MetaLearner(
        model, mse, strategy, torch.optim.SGD(model.parameters(), lr=OUTER), alpha=0.5
    )
    initial = {n: b.clone() for n, b in model.named_buffers()}
    result = learner.meta_gradient(train, meta)
    assert all(torch.equal(b, initial[n]) for n, b in model.named_buffers())
    learner.apply(result)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, result.buffers[name])
        assert not torch.equal(buffer, initial[name]), name
    assert model[1].num_batches_tracked.item() == 1


def test_frozen_parameters_stay() -> None:
    problem = mlp()
    model = deepcopy(problem.model)
    assert isinstance(model, nn.Sequential)
    model[0].requires_grad_(False)
    frozen = model[0].weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=OUTER, weight_decay=0.1)
    learner = MetaLearner(model, mse, SecondOrder(SGD(INNER)), optimizer)
    before = model[2].weight.clone()
    learner.step(problem.train, problem.meta)
    assert torch.equal(model[0].weight, frozen)
    assert not torch.equal(model[2].weight, before)


def test_steps_lower_the_meta_loss() -> None:
    problem = mlp()
    model = deepcopy(problem.model)
    learner = MetaLearner(
        model, mse, SecondOrder(SGD(INNER)), torch.optim.Adam(model.parameters(), lr=0.02), alpha=0
    )
    values = [learner.step(problem.train, problem.meta).meta_loss.item() for _ in range(40)]
    assert values[-1] < 0.5 * values[0]


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_out_of_range_is_refused(alpha: float) -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=rf"alpha: got {alpha}, expected a number in \[0, 1\]"):
        MetaLearner(model, mse, SingleLevel(), torch.optim.SGD(model.parameters(), lr=1), alpha)


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    with pytest.raises(
        ValueError,
        match=r"optimizer: holds no parameter of the model; make it from model.parameters\(\) "
        "after the model is on its device",
    ):
        MetaLearner(model, mse, SingleLevel(), torch.optim.SGD(other.parameters(), lr=1))
