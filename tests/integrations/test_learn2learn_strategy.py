"""Learn2LearnStrategy: learners of learn2learn with MetaLearner, the numbers of our strategies."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import (
    EXACT,
    LR,
    Problem,
    batch_norm,
    conv,
    copies,
    corners,
    derivative,
    dropout,
    equal,
    every_order,
    every_problem,
    meta_gradient,
    mlp,
    mse,
    norm,
    prism,
    prism_net,
    randn,
    relative_error,
    trainable,
)
from peers import l2l, needs_learn2learn
from torch import nn

from prism_meta.bilevel import inner as ours
from prism_meta.bilevel.learner import MetaLearner
from prism_meta.bilevel.strategies import FirstOrder, SecondOrder, StepBatches
from prism_meta.integrations.learn2learn import Learn2LearnStrategy
from prism_meta.networks.fusion import MeanFusion

pytestmark = needs_learn2learn


def maml(model: nn.Module, **options: Any) -> Any:
    return l2l.algorithms.MAML(model, LR, **options)


def meta_sgd(model: nn.Module, **options: Any) -> Any:
    return l2l.algorithms.MetaSGD(model, LR, **options)


def kronecker(model: nn.Module, **options: Any) -> Any:
    transform = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear)
    return l2l.algorithms.GBML(model, transform, lr=LR, **options).double()


def meta_curvature(model: nn.Module, **options: Any) -> Any:
    transform = l2l.optim.MetaCurvatureTransform
    return l2l.algorithms.GBML(model, transform, lr=LR, **options).double()


def prism_with_means() -> Problem:
    """GBML's transforms know no parameter like that of the region-aware fusion."""
    return replace(prism(), model=prism_net(fusion=MeanFusion))


LEARNERS = [maml, meta_sgd, kronecker, meta_curvature]
every_learner = pytest.mark.parametrize("make_learner", LEARNERS)
every_problem_of_theirs = pytest.mark.parametrize("make_problem", [mlp, conv, prism_with_means])
Make = Callable[..., Any]


@pytest.mark.parametrize("steps", [1, 3])
@every_order
@every_learner
@every_problem_of_theirs
def test_every_learner_starts_with_our_numbers(
    make_problem: Callable[[], Problem], make_learner: Make, first_order: bool, steps: int
) -> None:
    """GBML's transforms start as the identity, and the rates of MetaSGD as one number."""
    problem = make_problem()
    learner = make_learner(problem.model, first_order=first_order)
    result = meta_gradient(Learn2LearnStrategy(learner, steps), problem)
    kind = FirstOrder if first_order else SecondOrder
    expected = meta_gradient(kind(ours.SGD(LR), steps), problem)
    assert relative_error(result.gradient, expected.gradient) <= EXACT
    assert relative_error(result.adapted, expected.adapted) <= EXACT
    for name in ("train_loss", "meta_loss"):
        assert torch.allclose(getattr(result, name), getattr(expected, name), rtol=1e-12)
    assert list(result.terms) == list(expected.terms)


@pytest.mark.parametrize("steps", [1, 3])
@every_order
@every_problem
def test_meta_sgd_is_ours(
    make_problem: Callable[[], Problem], first_order: bool, steps: int
) -> None:
    problem = make_problem()
    theirs, mine = meta_sgd(problem.model, first_order=first_order), ours.MetaSGD(problem.model, LR)
    names = list(trainable(problem.model))
    with torch.no_grad():  # a rate of its own for every entry
        for index, name in enumerate(names):
            rate = mine.rates[name.replace(".", "/")]
            rate.copy_(0.1 + 0.05 * randn(*rate.shape, seed=index))
            theirs.lrs[index].copy_(rate)
    strategy = Learn2LearnStrategy(theirs, steps)
    result = meta_gradient(strategy, problem)
    kind = FirstOrder if first_order else SecondOrder
    expected = meta_gradient(kind(mine, steps), problem)
    assert relative_error(result.gradient, expected.gradient) <= EXACT
    assert list(result.hyper_gradient) == list(strategy.inner.hyper_parameters())
    assert list(result.hyper_gradient) == [f"lrs.{i}" for i in range(len(names))]
    by_name = {n: expected.hyper_gradient[f"rates.{n.replace('.', '/')}"] for n in names}
    renamed = {n: result.hyper_gradient[f"lrs.{i}"] for i, n in enumerate(names)}
    assert relative_error(renamed, by_name) <= EXACT


@pytest.mark.parametrize("make_learner", [kronecker, meta_curvature])
def test_the_gradient_of_a_transform_is_that_of_finite_differences(make_learner: Make) -> None:
    problem = mlp()
    learner = make_learner(problem.model)
    strategy = Learn2LearnStrategy(learner, 2)
    learned = strategy.inner.hyper_parameters()
    result = meta_gradient(strategy, problem)
    direction = {n: randn(*p.shape, seed=i) for i, (n, p) in enumerate(learned.items())}
    start = copies(learned)

    def along(step: float) -> float:
        with torch.no_grad():
            for name, param in learned.items():
                param.copy_(start[name] + step * direction[name])
        return meta_gradient(strategy, problem).meta_loss.item()

    expected = derivative(along)
    actual = sum((result.hyper_gradient[n] * d).sum().item() for n, d in direction.items())
    assert actual == pytest.approx(expected, rel=1e-8)


@every_learner
def test_frozen_unused_and_tied_parameters(make_learner: Make) -> None:
    problem = corners()
    before = copies(problem.model.state_dict())
    for param in problem.model.parameters():
        param.grad = torch.full_like(param, 7)
    result = meta_gradient(Learn2LearnStrategy(make_learner(problem.model), 3), problem)
    expected = meta_gradient(SecondOrder(ours.SGD(LR), 3), problem)
    assert relative_error(result.gradient, expected.gradient) <= EXACT
    assert relative_error(result.adapted, expected.adapted) <= EXACT
    assert equal(result.buffers, expected.buffers)
    assert relative_error(result.inner_buffers, expected.inner_buffers) <= EXACT
    assert equal(problem.model.state_dict(), before)
    assert all(bool((p.grad == 7).all()) for p in problem.model.parameters() if p.grad is not None)


@every_learner
def test_a_models_random_numbers_are_those_of_our_strategies(make_learner: Make) -> None:
    problem = dropout()
    results = []
    for strategy in (
        Learn2LearnStrategy(make_learner(problem.model), 2),
        SecondOrder(ours.SGD(LR), 2),
    ):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            results.append(meta_gradient(strategy, problem))
    assert relative_error(results[0].gradient, results[1].gradient) <= EXACT


@every_learner
def test_nothing_of_the_result_requires_grad(make_learner: Make) -> None:
    problem = batch_norm()
    result = meta_gradient(Learn2LearnStrategy(make_learner(problem.model)), problem)
    values = [v for v in vars(result).values() if isinstance(v, dict)]
    assert not any(t.requires_grad for v in values for t in v.values())
    assert not result.train_loss.requires_grad and not result.meta_loss.requires_grad


def test_a_list_of_batches_goes_over_the_inner_steps() -> None:
    problem = mlp()
    train = StepBatches([problem.train, problem.meta])
    args = problem.model, problem.objective, train, problem.meta
    result = Learn2LearnStrategy(maml(problem.model), 3).meta_gradient(*args)
    expected = SecondOrder(ours.SGD(LR), 3).meta_gradient(*args)
    assert relative_error(result.gradient, expected.gradient) <= EXACT


@every_learner
def test_a_loss_that_depends_on_no_parameter_moves_nothing(make_learner: Make) -> None:
    problem = mlp()
    result = Learn2LearnStrategy(make_learner(problem.model)).meta_gradient(
        problem.model, lambda forward, batch: batch[0].sum(), problem.train, problem.meta
    )
    assert norm(result.gradient) == 0
    assert equal(result.adapted, trainable(problem.model))


@pytest.mark.parametrize("make_learner", [meta_sgd, kronecker, meta_curvature])
@pytest.mark.parametrize("make_problem", [mlp, prism_with_means])
def test_meta_learner_trains_the_model_and_what_the_learner_learns(
    make_problem: Callable[[], Problem], make_learner: Make
) -> None:
    problem = make_problem()
    learner = make_learner(problem.model)
    strategy = Learn2LearnStrategy(learner, 2)
    start = copies(strategy.inner.hyper_parameters())
    trainer = MetaLearner(
        problem.model,
        problem.objective,
        strategy,
        torch.optim.Adam(learner.parameters(), 0.01),
        alpha=0.0,
    )
    losses = [trainer.step(problem.train, problem.meta).meta_loss.item() for _ in range(15)]
    assert losses[-1] < 0.95 * losses[0]
    learned = strategy.inner.hyper_parameters()
    assert list(start) == list(learned)
    moved = {n: p - start[n] for n, p in learned.items()}
    assert norm(moved) > 0.01


def test_learned_transforms_lower_the_loss_with_the_model_held() -> None:
    """What the transform learns is used: the outer optimizer holds only one entry of the model."""
    for make_learner in (meta_sgd, kronecker, meta_curvature):
        problem = mlp()
        learner = make_learner(problem.model)
        strategy = Learn2LearnStrategy(learner)
        held = [next(problem.model.parameters()), *strategy.inner.hyper_parameters().values()]
        optimizer = torch.optim.SGD(
            [{"params": held[:1], "lr": 0.0}, {"params": held[1:], "lr": 0.1}]
        )
        trainer = MetaLearner(problem.model, problem.objective, strategy, optimizer, alpha=0.0)
        losses = [trainer.step(problem.train, problem.meta).meta_loss.item() for _ in range(10)]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0]


def test_a_learned_rate_of_maml_gets_a_gradient() -> None:
    problem = mlp()
    rate = torch.tensor(LR, dtype=torch.float64)
    learner = l2l.algorithms.MAML(problem.model, nn.Parameter(rate.clone()))
    result = meta_gradient(Learn2LearnStrategy(learner, 2), problem)
    mine = ours.SGD(nn.Parameter(rate.clone()))
    expected = meta_gradient(SecondOrder(mine, 2), problem)
    assert relative_error(result.hyper_gradient, expected.hyper_gradient) <= EXACT


def test_what_is_learned_is_in_a_checkpoint() -> None:
    problem = mlp()

    def trainer() -> MetaLearner:
        model = deepcopy(problem.model)
        learner = meta_sgd(model)
        strategy = Learn2LearnStrategy(learner)
        optimizer = torch.optim.SGD(learner.parameters(), 0.1)
        return MetaLearner(model, problem.objective, strategy, optimizer)

    one, two = trainer(), trainer()
    one.step(problem.train, problem.meta)
    two.load_state_dict(deepcopy(one.state_dict()))
    two.model.load_state_dict(one.model.state_dict())
    moved = [t.step(problem.train, problem.meta).hyper_gradient for t in (one, two)]
    assert equal(*moved)
    with pytest.raises(ValueError, match=r"state: got rates, expected lrs\.0, lrs\.1"):
        two.strategy.inner.load_state_dict({"rates": torch.ones(1)})  # type: ignore[attr-defined]


def test_carried_state_is_none() -> None:
    problem = mlp()
    trainer = MetaLearner(
        problem.model,
        problem.objective,
        Learn2LearnStrategy(maml(problem.model)),
        torch.optim.SGD(problem.model.parameters(), 0.1),
        inner_state="carried",
    )
    for _ in range(2):
        trainer.step(problem.train, problem.meta)


def test_what_learn2learn_cannot_do_is_refused() -> None:
    problem = mlp()
    strategy = Learn2LearnStrategy(maml(problem.model))
    state = {"0.weight": {"momentum_buffer": torch.ones(5, 3)}}
    with pytest.raises(ValueError, match="state: learn2learn's learners keep none; expected None"):
        meta_gradient(strategy, problem, state=state)
    for scale in (2.0, torch.tensor(2.0)):
        with pytest.raises(
            ValueError, match="scale: got 2, expected 1: learn2learn cannot unscale"
        ):
            meta_gradient(strategy, problem, scale=scale)
    with pytest.raises(ValueError, match="model: got another Sequential than the learner's"):
        meta_gradient(strategy, mlp())
    with pytest.raises(ValueError, match="steps: got 0, expected at least 1 inner step"):
        Learn2LearnStrategy(maml(problem.model), 0)
    with pytest.raises(
        ValueError, match="learner: got Linear, expected MAML, MetaSGD or GBML of learn2learn"
    ):
        Learn2LearnStrategy(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="has no trainable parameter"):
        model = nn.Linear(3, 2).requires_grad_(False)
        Learn2LearnStrategy(maml(model)).meta_gradient(model, mse, problem.train, problem.meta)
    with pytest.raises(ValueError, match="train: got StepBatches without"):
        strategy.meta_gradient(problem.model, problem.objective, StepBatches(), problem.meta)
