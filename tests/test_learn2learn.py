"""Our inner optimizers in learn2learn's loops, and its learners as a strategy: the same numbers."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import (
    PROBLEMS,
    Problem,
    batch_norm,
    conv,
    copies,
    corners,
    dropout,
    equal,
    meta_gradient,
    mlp,
    mse,
    norm,
    prism,
    prism_batch,
    prism_net,
    randn,
    randomize,
    relative_error,
    trainable,
)
from torch import Tensor, nn

from prism_meta import inner as ours
from prism_meta.fusion import MeanFusion
from prism_meta.integrations import MissingPackageError
from prism_meta.integrations import learn2learn as integration
from prism_meta.integrations.learn2learn import INSTALL, Learn2LearnStrategy, PrismLearner
from prism_meta.integrations.learn2learn.upstream import learn2learn
from prism_meta.learner import MetaLearner
from prism_meta.objective import PrismObjective
from prism_meta.strategies import FirstOrder, SecondOrder
from prism_meta.wrap import wrap

try:
    l2l = learn2learn()
except MissingPackageError:
    l2l = None

LR = 0.1
EXACT = 1e-9
Values = dict[str, Tensor]
every_problem = pytest.mark.parametrize("make_problem", PROBLEMS)
every_order = pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])


@pytest.fixture(autouse=True)
def installed(request: pytest.FixtureRequest) -> None:
    if l2l is None and not request.function.__name__.startswith("test_without_learn2learn"):
        pytest.skip(f"needs learn2learn: {INSTALL}")


def loss_of(problem: Problem, forward: Callable[..., Any], batch: Any) -> Tensor:
    value = problem.objective(forward, batch)
    return value if isinstance(value, Tensor) else value.loss


def gradients(module: nn.Module) -> Values:
    """``.grad`` after backward, 0 for what the loss does not depend on."""
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for n, p in module.named_parameters()
        if p.requires_grad
    }


def loop(problem: Problem, maml: Any, steps: int) -> Any:
    """What every learn2learn script does in one episode; the clone after it."""
    maml.zero_grad()
    clone = maml.clone()
    for _ in range(steps):
        clone.adapt(loss_of(problem, clone, problem.train))
    loss_of(problem, clone, problem.meta).backward()
    return clone


# ---------------------------------------------------------------- PrismLearner


INNER: list[Callable[[nn.Module], ours.InnerOptimizer]] = [
    lambda model: ours.SGD(LR),
    lambda model: ours.SGD(LR, momentum=0.9, nesterov=True, weight_decay=0.1),
    lambda model: ours.Adam(0.05),
    lambda model: ours.AdamW(0.05, weight_decay=0.1),
    lambda model: ours.MetaSGD(model, LR),
]


@pytest.mark.parametrize("steps", [1, 3])
@every_order
@pytest.mark.parametrize("make_inner", INNER, ids=["sgd", "momentum", "adam", "adamw", "meta-sgd"])
@every_problem
def test_a_loop_gives_the_numbers_of_our_strategies(
    make_problem: Callable[[], Problem],
    make_inner: Callable[[nn.Module], ours.InnerOptimizer],
    first_order: bool,
    steps: int,
) -> None:
    problem = make_problem()
    inner = make_inner(problem.model)
    kind = FirstOrder if first_order else SecondOrder
    expected = meta_gradient(kind(inner, steps), problem)
    maml = PrismLearner(problem.model, inner, first_order=first_order, allow_unused=True)
    clone = loop(problem, maml, steps)
    assert relative_error(gradients(problem.model), expected.gradient) <= EXACT
    assert relative_error(trainable(clone.module), expected.adapted) <= EXACT
    if inner.learned():
        assert relative_error(gradients(inner), expected.hyper_gradient) <= EXACT


@pytest.mark.parametrize("steps", [1, 3])
@every_order
@every_problem
def test_with_sgd_it_is_maml_of_learn2learn(
    make_problem: Callable[[], Problem], first_order: bool, steps: int
) -> None:
    problem = make_problem()
    theirs = l2l.algorithms.MAML(problem.model, LR, first_order=first_order, allow_unused=True)
    loop(problem, theirs, steps)
    expected = gradients(problem.model)
    mine = PrismLearner(problem.model, ours.SGD(LR), first_order=first_order, allow_unused=True)
    loop(problem, mine, steps)
    assert relative_error(gradients(problem.model), expected) <= EXACT


def fast_adapt(batch: Any, learner: Any, loss: Any, steps: int) -> tuple[Tensor, Tensor]:
    """Adaptation and evaluation halves of one task, as in learn2learn's vision examples."""
    data, labels = batch
    half = torch.zeros(len(data), dtype=torch.bool)
    half[::2] = True
    for _ in range(steps):
        learner.adapt(loss(learner(data[half]), labels[half]))
    predictions = learner(data[~half])
    accuracy = (predictions.argmax(1) == labels[~half]).float().mean()
    return loss(predictions, labels[~half]), accuracy


def few_shot(maml: Any) -> list[float]:
    """The meta-training loop of learn2learn's MAML examples, over random tasks."""
    optimizer = torch.optim.Adam(maml.parameters(), 0.01)
    loss = nn.CrossEntropyLoss(reduction="mean")
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(20):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(4):
            learner = maml.clone()
            x = torch.randn(16, 6, dtype=torch.float64, generator=generator)
            direction = torch.randn(6, dtype=torch.float64, generator=generator)
            error, _ = fast_adapt((x, (x @ direction > 0).long()), learner, loss, 2)
            error.backward()
            total += error.item()
        for p in maml.parameters():
            p.grad.data.mul_(1 / 4)
        optimizer.step()
        errors.append(total / 4)
    return errors


def classifier() -> nn.Module:
    layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)
    return randomize(nn.Sequential(*layers), seed=3)


def test_an_existing_loop_runs_and_learns_the_same() -> None:
    one, two = classifier(), classifier()
    expected = few_shot(l2l.algorithms.MAML(one, lr=0.5, first_order=False))
    actual = few_shot(PrismLearner(two, ours.SGD(0.5)))
    assert actual == pytest.approx(expected, rel=1e-9)
    # The statistics that the clones gathered are the model's, as there.
    assert all(
        torch.allclose(a, b, rtol=1e-9) for a, b in zip(one.buffers(), two.buffers(), strict=True)
    )
    assert int(two[1].num_batches_tracked) == 20 * 4 * 3  # type: ignore[index, arg-type]


@pytest.mark.parametrize("make_inner", INNER, ids=["sgd", "momentum", "adam", "adamw", "meta-sgd"])
def test_an_existing_loop_learns_with_every_inner_optimizer(
    make_inner: Callable[[nn.Module], ours.InnerOptimizer],
) -> None:
    model = classifier()
    errors = few_shot(PrismLearner(model, make_inner(model)))
    assert sum(errors[-5:]) < sum(errors[:5])


def test_it_is_a_learner_of_learn2learn() -> None:
    maml = PrismLearner(mlp().model, ours.SGD(LR))
    assert isinstance(maml, l2l.algorithms.base_learner.BaseLearner)
    assert isinstance(maml.clone(), PrismLearner)
    assert list(maml.state_dict()) == [f"module.{n}" for n in mlp().model.state_dict()]
    assert isinstance(deepcopy(maml), PrismLearner)


def test_a_clone_leaves_the_model_as_it_is() -> None:
    problem = corners()
    before = copies(problem.model.state_dict())
    maml = PrismLearner(problem.model, ours.SGD(LR), allow_nograd=True, isolate_buffers=True)
    clone = maml.clone()
    clone.eval().train()
    assert problem.model.training
    clone.eval()
    assert problem.model.training
    clone.train()
    for _ in range(2):
        clone.adapt(loss_of(problem, clone, problem.train))
    loss_of(problem, clone, problem.meta)
    assert equal(problem.model.state_dict(), before)
    assert int(clone.module.norm.num_batches_tracked) == 3  # type: ignore[union-attr, arg-type]
    assert all(p.grad is None for p in problem.model.parameters())


@every_order
def test_frozen_unused_and_tied_parameters_in_a_loop(first_order: bool) -> None:
    problem = corners()
    kind = FirstOrder if first_order else SecondOrder
    expected = meta_gradient(kind(ours.SGD(LR), 3), problem)
    maml = PrismLearner(
        problem.model,
        ours.SGD(LR),
        first_order=first_order,
        allow_nograd=True,
        isolate_buffers=True,
    )
    clone = loop(problem, maml, 3)
    assert relative_error(gradients(problem.model), expected.gradient) <= EXACT
    assert relative_error(trainable(clone.module), expected.adapted) <= EXACT
    assert clone.module.again.weight is clone.module.square.weight
    assert torch.equal(clone.module.frozen.weight, problem.model.frozen.weight)  # type: ignore[arg-type, union-attr]


def test_frozen_and_unused_parameters_that_are_not_allowed_are_named() -> None:
    problem = corners()
    clone = PrismLearner(problem.model, ours.SGD(LR), allow_unused=True).clone()
    loss = loss_of(problem, clone, problem.train)
    with pytest.raises(
        ValueError,
        match=r"allow_nograd: is False, but frozen are frozen.weight, frozen.bias; give True",
    ):
        clone.adapt(loss)
    clone = PrismLearner(problem.model, ours.SGD(LR)).clone(allow_nograd=True)
    loss = loss_of(problem, clone, problem.train)
    with pytest.raises(
        ValueError,
        match="allow_unused: is False, but the loss does not depend on unused; give True",
    ):
        clone.adapt(loss)
    clone.adapt(loss_of(problem, clone, problem.train), allow_unused=True)


def test_the_learner_itself_is_not_adapted() -> None:
    problem = mlp()
    maml = PrismLearner(problem.model, ours.SGD(LR))
    with pytest.raises(ValueError, match=r"expected a clone: learner = maml.clone\(\)"):
        maml.adapt(loss_of(problem, maml, problem.train))


def test_order_may_be_chosen_for_a_clone_and_for_a_step() -> None:
    problem = mlp()
    maml = PrismLearner(problem.model, ours.SGD(LR))
    expected = meta_gradient(FirstOrder(ours.SGD(LR)), problem).gradient
    for for_clone, for_step in ((True, None), (None, True), (False, True)):
        maml.zero_grad()
        clone = maml.clone(first_order=for_clone)
        clone.adapt(loss_of(problem, clone, problem.train), first_order=for_step)
        loss_of(problem, clone, problem.meta).backward()
        assert relative_error(gradients(problem.model), expected) <= EXACT


def test_a_clone_of_a_clone_goes_on_from_it() -> None:
    problem = mlp()
    inner = ours.Adam(0.05)
    maml = PrismLearner(problem.model, inner)
    clone = maml.clone()
    clone.adapt(loss_of(problem, clone, problem.train))
    again = clone.clone()
    again.adapt(loss_of(problem, again, problem.train))
    loss_of(problem, again, problem.meta).backward()
    expected = meta_gradient(SecondOrder(inner, 2), problem)
    assert relative_error(gradients(problem.model), expected.gradient) <= EXACT
    one_step = meta_gradient(SecondOrder(inner, 1), problem)
    assert relative_error(trainable(clone.module), one_step.adapted) <= EXACT


def test_methods_and_submodules_of_a_clone_see_its_parameters() -> None:
    net = prism_net()
    batch = prism_batch([[True, True, True], [False, True, True]], 7, 6, seed=50)
    objective = PrismObjective()
    clone = PrismLearner(net, ours.SGD(LR)).clone()
    clone.adapt(objective(clone, batch).loss)
    moved = prism_net()
    moved.load_state_dict({n: t.detach() for n, t in clone.module.state_dict().items()})
    for module in (clone, clone.module):
        assert torch.equal(
            module.segment(batch.image, batch.mask), moved.segment(batch.image, batch.mask)
        )
    assert not torch.equal(
        net.segment(batch.image, batch.mask), moved.segment(batch.image, batch.mask)
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # MAML's own
def test_recurrent_layers_are_adapted() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.rnn(x)[0][-1])
            return out

    model = randomize(Net(), seed=1)
    batch = randn(5, 6, 3, seed=2), randn(6, 2, seed=3)
    problem = Problem("lstm", model, mse, batch, batch)
    loop(problem, l2l.algorithms.MAML(model, LR), 2)
    expected = gradients(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(problem, PrismLearner(model, ours.SGD(LR)), 2)
    assert relative_error(gradients(model), expected) <= EXACT


@pytest.mark.parametrize("inner", [ours.SGD(0.05), ours.Adam(0.01)], ids=["sgd", "adam"])
def test_a_wrapped_net_with_prisms_objective_learns(inner: ours.InnerOptimizer) -> None:
    net = randomize(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1)), seed=4
    )
    model, objective = wrap(net, modalities=("a", "b", "c")), PrismObjective()
    train = prism_batch([[True, False, False], [True, True, False]], 7, 6, seed=21)
    meta = prism_batch([[True, True, True], [False, False, True]], 7, 6, seed=31)
    maml = PrismLearner(model, inner)
    optimizer = torch.optim.Adam(maml.parameters(), 0.02)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        learner = maml.clone()
        for _ in range(2):
            learner.adapt(objective(learner, train).loss)
        loss = objective(learner, meta).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


# ---------------------------------------------------------------- Learn2LearnStrategy


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
    assert list(result.hyper_gradient) == list(strategy.inner.learned())
    assert list(result.hyper_gradient) == [f"lrs.{i}" for i in range(len(names))]
    by_name = {n: expected.hyper_gradient[f"rates.{n.replace('.', '/')}"] for n in names}
    renamed = {n: result.hyper_gradient[f"lrs.{i}"] for i, n in enumerate(names)}
    assert relative_error(renamed, by_name) <= EXACT


@pytest.mark.parametrize("make_learner", [kronecker, meta_curvature])
def test_the_gradient_of_a_transform_is_that_of_finite_differences(make_learner: Make) -> None:
    problem = mlp()
    learner = make_learner(problem.model)
    strategy = Learn2LearnStrategy(learner, 2)
    learned = strategy.inner.learned()
    result = meta_gradient(strategy, problem)
    direction = {n: randn(*p.shape, seed=i) for i, (n, p) in enumerate(learned.items())}
    start = copies(learned)

    def along(step: float) -> float:
        with torch.no_grad():
            for name, param in learned.items():
                param.copy_(start[name] + step * direction[name])
        return meta_gradient(strategy, problem).meta_loss.item()

    step = 1e-3
    near, far = along(step) - along(-step), along(2 * step) - along(-2 * step)
    expected = (8 * near - far) / (12 * step)
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
    train = [problem.train, problem.meta]
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
    start = copies(strategy.inner.learned())
    trainer = MetaLearner(
        problem.model,
        problem.objective,
        strategy,
        torch.optim.Adam(learner.parameters(), 0.01),
        alpha=0.0,
    )
    losses = [trainer.step(problem.train, problem.meta).meta_loss.item() for _ in range(15)]
    assert losses[-1] < 0.95 * losses[0]
    learned = strategy.inner.learned()
    assert list(start) == list(learned)
    moved = {n: p - start[n] for n, p in learned.items()}
    assert norm(moved) > 0.01


def test_learned_transforms_lower_the_loss_with_the_model_held() -> None:
    """What the transform learns is of use: the outer optimizer holds one entry of the model alone."""
    for make_learner in (meta_sgd, kronecker, meta_curvature):
        problem = mlp()
        learner = make_learner(problem.model)
        strategy = Learn2LearnStrategy(learner)
        held = [next(problem.model.parameters()), *strategy.inner.learned().values()]
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
    with pytest.raises(ValueError, match="train: got an empty list"):
        strategy.meta_gradient(problem.model, problem.objective, [], problem.meta)


@pytest.mark.parametrize("owner", [PrismLearner, Learn2LearnStrategy])
def test_the_example_runs(owner: type) -> None:
    (example,) = re.findall(r"( *```python\n.*?)```", inspect.getdoc(owner) or "", re.DOTALL)
    with torch.random.fork_rng():
        exec(textwrap.dedent(example).removeprefix("```python\n"), {})  # noqa: S102, our own docstring


# ---------------------------------------------------------------- where it is missing


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The integration, as it is where learn2learn is not installed."""
    name = integration.__name__
    monkeypatch.setitem(sys.modules, "learn2learn", None)
    for part in [part for part in sys.modules if f"{part}.".startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, part)
    yield importlib.import_module(name)
    # ``import a.b`` sets an attribute of a, which monkeypatch knows nothing of.
    sys.modules["prism_meta.integrations"].learn2learn = integration  # type: ignore[attr-defined]


def test_without_learn2learn_the_error_has_the_command(missing: Any) -> None:
    command = (
        "pip install cython setuptools wheel && pip install --no-build-isolation "
        '--config-settings="--global-option=build_ext" learn2learn==0.2.0'
    )
    for make in (
        lambda: missing.PrismLearner(nn.Linear(1, 1), ours.SGD(LR)),
        lambda: missing.Learn2LearnStrategy(nn.Linear(1, 1)),
    ):
        with pytest.raises(MissingPackageError, match="learn2learn: cannot be imported") as caught:
            make()
        assert str(caught.value).endswith(f"; install it with: {command}")
        assert isinstance(caught.value, ImportError)


def test_without_learn2learn_the_package_is_whole() -> None:
    """Nothing but the integration imports it."""
    code = "import sys, prism_meta; assert not {'learn2learn', 'higher', 'gym'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_import_prints_nothing() -> None:
    code = "import prism_meta.integrations.learn2learn"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")
