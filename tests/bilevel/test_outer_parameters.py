"""Which parameters the outer step moves: frozen, unused, and those of another optimizer."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from helpers import (
    copies,
    equal,
    mlp,
    mse,
    prism,
    trainable,
)
from orders import LEVELS, LR
from torch import Tensor, nn

from prism_meta.bilevel.inner import SGD
from prism_meta.bilevel.learner import MetaLearner
from prism_meta.bilevel.strategies import (
    FiniteDifference,
    FirstOrder,
    ImplicitMAML,
    MetaStrategy,
    Reptile,
    SecondOrder,
    SingleLevel,
)

INNER, OUTER = LR, 0.03


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


def test_parameters_that_the_optimizer_does_not_hold_stay() -> None:
    problem = mlp()
    assert isinstance(problem.model, nn.Sequential)
    phi = copies(trainable(problem.model))
    optimizer = torch.optim.Adam(problem.model[2].parameters(), lr=OUTER)
    learner = MetaLearner(problem.model, mse, SecondOrder(SGD(INNER)), optimizer)
    result = learner.step(problem.train, problem.meta)
    assert not torch.equal(result.adapted["0.weight"], phi["0.weight"])
    for name, param in trainable(problem.model).items():
        assert torch.equal(param, phi[name]) is name.startswith("0."), name


#: What moves a parameter that has a gradient of 0.
OUTERS: list[Any] = [
    pytest.param(torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}, id="momentum"),
    pytest.param(torch.optim.Adam, {}, id="adam"),
    pytest.param(torch.optim.AdamW, {"weight_decay": 0.5}, id="adamw"),
    pytest.param(torch.optim.AdamW, {"weight_decay": 0.5, "fused": True}, id="fused"),
]


def moments_of(learner: MetaLearner) -> dict[tuple[str, str], Tensor]:
    """Copies of what the outer optimizer keeps, by parameter and kind."""
    return {
        (name, kind): value.clone()
        for name, param in learner.model.named_parameters()
        for kind, value in learner.optimizer.state[param].items()
        if value is not None
    }


@pytest.mark.parametrize(("outer", "options"), OUTERS)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    "strategy",
    [
        SingleLevel(),
        FirstOrder(SGD(INNER), 2),
        SecondOrder(SGD(INNER), graph="stored"),
        SecondOrder(SGD(INNER), 2),
        Reptile(SGD(INNER), 2),
        FiniteDifference(SGD(INNER)),
        ImplicitMAML(SGD(INNER), 2, proximal=20.0, cg_steps=1),
    ],
    ids=["single", "first", "stored", "recomputed", "reptile", "differences", "implicit"],
)
def test_the_encoder_of_a_modality_that_nobody_was_shown_stays(
    strategy: MetaStrategy, scaled: bool, outer: Any, options: dict[str, Any]
) -> None:
    """As in a loop of torch's: it has no gradient, and moments of earlier steps do not move it."""
    problem = prism()
    model = deepcopy(problem.model)
    optimizer = outer(model.parameters(), lr=OUTER, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
    learner = MetaLearner(model, problem.objective, strategy, optimizer, scaler=scaler)
    learner.step(problem.meta, problem.meta)  # which shows all modalities
    before, moments = copies(trainable(model)), moments_of(learner)
    result = learner.step(problem.train, problem.train)  # and this never the last one
    unseen = {n for n in before if n.startswith("encoders.2.")}
    assert result.unused == unseen != set()
    assert not any(result.gradient[n].any() for n in unseen)
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name]) is (name in unseen), name
    now = moments_of(learner)
    assert moments.keys() == now.keys()
    for moment, value in moments.items():
        assert torch.equal(now[moment], value) is (moment[0] in unseen), moment


@pytest.mark.parametrize("strategy", LEVELS[1:])
def test_what_one_of_the_two_batches_reaches_is_not_unused(strategy: MetaStrategy) -> None:
    problem = prism()
    for train, meta in ((problem.train, problem.meta), (problem.meta, problem.train)):
        result = strategy.meta_gradient(problem.model, problem.objective, train, meta)
        assert result.unused == frozenset()


@pytest.mark.parametrize("strategy", LEVELS)
def test_what_no_episode_reaches_is_what_all_of_them_leave_unused(strategy: MetaStrategy) -> None:
    problem = prism()
    model = deepcopy(problem.model)
    phi = copies(trainable(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=OUTER)
    learner = MetaLearner(model, problem.objective, strategy, optimizer)
    seen, unseen = (problem.meta, problem.meta), (problem.train, problem.train)
    assert learner.step_episodes([unseen, seen]).unused == frozenset()
    moved = trainable(model)
    assert not any(torch.equal(moved[n], phi[n]) for n in phi if n.startswith("encoders.2."))
    assert len(learner.step_episodes([unseen, unseen]).unused) > 0


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_whose_batches_reach_nothing_moves_nothing(scaled: bool) -> None:
    problem = mlp()
    model = deepcopy(problem.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=OUTER)
    scaler = torch.amp.GradScaler("cpu") if scaled else None

    def sometimes_constant(forward: Any, batch: Tensor) -> Tensor:
        return batch.sum() if len(batch) == 1 else forward(batch).sum()

    learner = MetaLearner(
        model, sometimes_constant, SecondOrder(SGD(INNER)), optimizer, scaler=scaler
    )
    assert learner.step(problem.train[0], problem.meta[0]).unused == frozenset()
    before = copies(trainable(model))
    result = learner.step(problem.train[0][:1], problem.meta[0][:1])
    assert result.unused == frozenset(before)
    assert equal(trainable(model), before)


# ---------------------------------------------------------------- what the outer level owns


def is_last(name: str) -> bool:
    return name.startswith("2.")


def is_first(name: str) -> bool:
    return not is_last(name)


@pytest.mark.parametrize("kind", [FirstOrder, SecondOrder])
@pytest.mark.parametrize("alpha", [1.0, 0.4])
def test_the_outer_level_owns_some_parameters_and_the_inner_level_the_rest(
    kind: Any, alpha: float
) -> None:
    """The last layer takes the outer step, and the first one the way of its inner steps."""
    problem = mlp()
    phi = copies(trainable(problem.model))
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=OUTER)
    strategy = kind(SGD(INNER), 2, adapt=is_first)
    learner = MetaLearner(
        problem.model, mse, strategy, optimizer, alpha=alpha, outer_parameters=is_last
    )
    result = learner.step(problem.train, problem.meta)
    for name, param in trainable(problem.model).items():
        step = alpha * (result.adapted[name] - phi[name])
        if is_last(name):
            assert torch.equal(result.adapted[name], phi[name])
            step = -OUTER * result.gradient[name]
        assert step.any()
        torch.testing.assert_close(param - phi[name], step, rtol=1e-12, atol=1e-15)


def test_what_the_inner_level_owns_knows_no_decay_momentum_or_clipping_of_the_outer_one() -> None:
    problem = mlp()
    phi = copies(trainable(problem.model))
    optimizer = torch.optim.AdamW(problem.model.parameters(), lr=OUTER, weight_decay=0.5)
    strategy = FirstOrder(SGD(INNER), adapt=is_first)
    learner = MetaLearner(
        problem.model, mse, strategy, optimizer, alpha=1.0, clip_norm=1e-3, outer_parameters=is_last
    )
    result = learner.meta_gradient(problem.train, problem.meta)
    norm = learner.apply(result)
    owned = [g for n, g in result.gradient.items() if is_last(n)]
    torch.testing.assert_close(norm, torch.nn.utils.get_total_norm(owned))
    for name, param in problem.model.named_parameters():
        assert bool(optimizer.state.get(param)) is is_last(name)
        if is_first(name):
            torch.testing.assert_close(param.detach(), result.adapted[name], rtol=1e-12, atol=1e-15)
            assert not torch.equal(param, phi[name])


@pytest.mark.parametrize(
    ("owns", "alpha", "message"),
    [
        (
            lambda name: False,
            0.5,
            r"^outer_parameters: is True for 0 of 4 parameters, with alpha 0.5; ",
        ),
        (
            is_last,
            0.0,
            r"^outer_parameters: is True for 2 of 4 parameters, with alpha 0.0; .* alpha > 0",
        ),
    ],
)
def test_a_division_that_leaves_parameters_to_nobody_is_refused(
    owns: Any, alpha: float, message: str
) -> None:
    model = mlp().model
    optimizer = torch.optim.SGD(model.parameters(), lr=OUTER)
    with pytest.raises(ValueError, match=message):
        MetaLearner(
            model, mse, FirstOrder(SGD(INNER)), optimizer, alpha=alpha, outer_parameters=owns
        )
