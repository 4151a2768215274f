"""PrismLearner: our inner optimizers in loops that are written for learn2learn, the same numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from helpers import (
    EXACT,
    LR,
    Problem,
    copies,
    corners,
    equal,
    every_order,
    every_problem,
    meta_gradient,
    mlp,
    mse,
    prism_batch,
    prism_net,
    randn,
    randomize,
    relative_error,
    trainable,
)
from peers import l2l, needs_learn2learn
from torch import Tensor, nn

from prism_meta.bilevel import inner as ours
from prism_meta.bilevel.strategies import FirstOrder, SecondOrder
from prism_meta.integrations.learn2learn import PrismLearner
from prism_meta.networks.wrapped import wrap
from prism_meta.objective.prism import PrismObjective

pytestmark = needs_learn2learn


def loss_of(problem: Problem, forward: Callable[..., Any], batch: Any) -> Tensor:
    value = problem.objective(forward, batch)
    return value if isinstance(value, Tensor) else value.loss


def gradients(module: nn.Module) -> dict[str, Tensor]:
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
    if inner.hyper_parameters():
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
