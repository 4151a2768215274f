"""The outer update E2, and its corners that have a name of their own."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import oracles
import pytest
import torch
from helpers import (
    PROBLEMS,
    Problem,
    batch_norm,
    conv,
    copies,
    equal,
    mlp,
    mse,
    randn,
    relative_error,
    trainable,
)
from orders import LEVELS, LR
from torch import Tensor, nn

from prism_meta.bilevel.inner import SGD
from prism_meta.bilevel.learner import MetaLearner
from prism_meta.bilevel.strategies import (
    FirstOrder,
    MetaGradient,
    MetaStrategy,
    SecondOrder,
    SingleLevel,
)

INNER, OUTER = LR, 0.03
EXACT = 1e-9
Values = dict[str, Tensor]


def update(
    problem: Problem, strategy: MetaStrategy, *, alpha: float, outer: float = OUTER
) -> tuple[Values, MetaGradient]:
    """How one step with torch.optim.SGD moves the parameters."""
    model = deepcopy(problem.model)
    before = copies(trainable(model))
    learner = MetaLearner(
        model,
        problem.objective,
        strategy,
        torch.optim.SGD(model.parameters(), lr=outer),
        alpha=alpha,
    )
    result = learner.step(problem.train, problem.meta)
    return {n: p - before[n] for n, p in trainable(model).items()}, result


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("strategy", LEVELS)
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


@pytest.mark.parametrize("strategy", LEVELS)
def test_adam_sees_the_meta_gradient_and_nothing_else(strategy: MetaStrategy) -> None:
    problem = mlp()
    model, twin = deepcopy(problem.model), deepcopy(problem.model)
    optimizer = torch.optim.Adam(model.parameters(), lr=OUTER)
    reference = torch.optim.Adam(twin.parameters(), lr=OUTER)
    learner = MetaLearner(model, problem.objective, strategy, optimizer, alpha=0.5)
    for _ in range(3):
        before = copies(trainable(model))
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


@pytest.mark.parametrize("strategy", LEVELS)
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
    phi = copies(trainable(model))
    result = learner.meta_gradient(problem.train, problem.meta)
    assert all(torch.equal(p, phi[n]) for n, p in trainable(model).items())
    assert all(p.grad is None for p in model.parameters())
    learner.apply(result)
    assert relative_error({n: p - phi[n] for n, p in trainable(model).items()}, moved) == 0
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("strategy", LEVELS)
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


# ---------------------------------------------------------------- buffers


@pytest.mark.parametrize(("buffers", "updates"), [("inner", 2), ("outer", 1)])
@pytest.mark.parametrize("strategy", LEVELS[1:])
def test_batch_norm_statistics_are_those_of_the_chosen_level(
    strategy: MetaStrategy, buffers: Any, updates: int
) -> None:
    problem = batch_norm()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=OUTER)
    learner = MetaLearner(problem.model, mse, strategy, optimizer, buffers=buffers)
    initial = copies(dict(problem.model.named_buffers()))
    result = learner.meta_gradient(problem.train, problem.meta)
    assert equal(dict(problem.model.named_buffers()), initial)
    learner.apply(result)
    expected = result.inner_buffers if buffers == "inner" else result.buffers
    assert equal(dict(problem.model.named_buffers()), expected)
    assert expected["1.num_batches_tracked"].item() == updates
    assert not torch.equal(expected["1.running_mean"], initial["1.running_mean"])


def test_single_level_takes_the_statistics_of_the_train_batch() -> None:
    problem = batch_norm()
    twin = deepcopy(problem.model)
    twin(problem.train[0])
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=OUTER)
    learner = MetaLearner(problem.model, mse, SingleLevel(), optimizer, buffers="outer")
    learner.step(problem.train, problem.meta)
    assert equal(dict(problem.model.named_buffers()), dict(twin.named_buffers()))


def test_isolated_statistics_stay() -> None:
    problem = batch_norm()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=OUTER)
    learner = MetaLearner(problem.model, mse, FirstOrder(SGD(INNER)), optimizer, buffers="isolated")
    initial = copies(dict(problem.model.named_buffers()))
    learner.step(problem.train, problem.meta)
    assert equal(dict(problem.model.named_buffers()), initial)


@pytest.mark.parametrize(
    "layer", [nn.InstanceNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False)]
)
def test_a_model_without_batch_norm_statistics_gives_no_warning(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 3), layer)
    MetaLearner(model, mse, SingleLevel(), torch.optim.SGD(model.parameters(), lr=1))


def test_a_step_over_episodes_is_made_from_their_mean() -> None:
    problem = mlp()
    others = [((randn(4, 3, seed=s), randn(4, 2, seed=s + 1)), problem.meta) for s in (130, 132)]
    episodes = [(problem.train, problem.meta), *others]
    phi, model = copies(trainable(problem.model)), deepcopy(problem.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=OUTER)
    learner = MetaLearner(model, mse, SecondOrder(SGD(INNER), 2), optimizer, alpha=0.4)
    results = [learner.meta_gradient(*episode) for episode in episodes]
    mean = learner.step_episodes(episodes)
    moved = {n: p - phi[n] for n, p in trainable(model).items()}
    expected = {
        n: torch.stack([0.4 * (r.adapted[n] - p) - OUTER * r.gradient[n] for r in results]).mean(0)
        for n, p in phi.items()
    }
    assert relative_error(moved, expected) <= 1e-12
    assert mean.meta_loss.item() == pytest.approx(
        sum(r.meta_loss.item() for r in results) / 3, rel=1e-12
    )


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
    with pytest.raises(ValueError, match=rf"^alpha: got {alpha}, expected a number in \[0, 1\]$"):
        MetaLearner(
            model, mse, SingleLevel(), torch.optim.SGD(model.parameters(), lr=1), alpha=alpha
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"inner_state": "kept"},
            r"^inner_state: got 'kept', expected 'fresh', 'carried' or 'shared'$",
        ),
        ({"buffers": "both"}, r"^buffers: got 'both', expected 'isolated', 'inner' or 'outer'$"),
    ],
)
def test_an_unknown_word_is_refused(options: Any, message: str) -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=message):
        MetaLearner(model, mse, SingleLevel(), torch.optim.SGD(model.parameters(), lr=1), **options)


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    with pytest.raises(
        ValueError,
        match=r"^optimizer: holds no parameter of the model; make it from model.parameters\(\) "
        r"after the model is on its device$",
    ):
        MetaLearner(model, mse, SingleLevel(), torch.optim.SGD(other.parameters(), lr=1))
