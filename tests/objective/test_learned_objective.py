"""E12: d L_meta / d the objective's learned weights, through every strategy that adapts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import oracles
import pytest
import torch
from helpers import (
    F64,
    SMOOTH,
    Problem,
    derivative,
    meta_gradient,
    mlp,
    mse,
    prism,
    prism_net,
    relative_error,
)
from torch import Tensor

from prism_meta.bilevel.inner import SGD, Adam, InnerOptimizer
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
from prism_meta.integrations.higher import HigherStrategy
from prism_meta.networks.fusion import MeanFusion
from prism_meta.objective.prism import PrismObjective
from prism_meta.objective.weighting import LearnedWeights

LR = 0.1
BETA, DELTA = (0.7, 0.4, 1.1), (0.3, 0.9, 0.5)
INNERS: dict[str, Callable[[], tuple[InnerOptimizer, oracles.Rule]]] = {
    "sgd": lambda: (SGD(LR), oracles.sgd(LR)),
    "momentum": lambda: (SGD(LR, momentum=0.8), oracles.sgd(LR, 0.8)),
    "adam": lambda: (Adam(0.05, eps=1e-3), oracles.adam(0.05, eps=1e-3)),
}
every_inner = pytest.mark.parametrize("inner", INNERS.values(), ids=INNERS)


class Weighted:
    """L_train is (1 + w) times the mean squared error, L_meta that error; nothing is detached."""

    def __init__(self) -> None:
        self.free = torch.full((), 0.3, dtype=F64, requires_grad=True)

    def hyper_parameters(self) -> dict[str, Tensor]:
        return {"w": self.free}

    def __call__(self, forward: Any, batch: Any) -> Tensor:
        return (1 + self.free) * mse(forward, batch)

    def meta_objective(self, forward: Any, batch: Any) -> Tensor:
        return mse(forward, batch)


@dataclass(frozen=True)
class Outer:
    """What the oracle is given as L_meta's objective."""

    learned_objective: Any

    def __call__(self, forward: Any, batch: Any) -> Any:
        return self.learned_objective.meta_objective(forward, batch)


def learning(**changes: Any) -> Problem:
    """PRISM with learned weights in float64; the train batch never shows the last modality."""
    weighting = LearnedWeights(3, beta=BETA, delta=DELTA).double()
    return replace(prism(), objective=PrismObjective(weighting=weighting, **changes))


def weights_of(problem: Problem) -> dict[str, Tensor]:
    return dict(problem.objective.hyper_parameters())


def expected(
    problem: Problem, rule: oracles.Rule, steps: int, *, first_order: bool = False
) -> Mapping[str, Tensor]:
    """Autograd through the unrolled steps; in first order without what an inner gradient owes to phi."""
    weights, phi = weights_of(problem), oracles.phi_of(problem)
    if first_order:
        adapted = adapt_first_order(problem, phi, rule, steps)
    else:
        adapted = oracles.adapt(problem, phi, rule, steps)
    outer = replace(problem, objective=Outer(problem.objective))
    return oracles.derivatives(oracles.loss(outer, adapted, problem.meta), weights)


def adapt_first_order(
    problem: Problem, phi: oracles.Values, rule: oracles.Rule, steps: int
) -> oracles.Values:
    move, params = rule(), dict(phi)
    for _ in range(steps):
        # Leaves with the same values: the gradient depends only on the weights.
        here = oracles.leaves(params)
        grads = torch.autograd.grad(
            oracles.loss(problem, here, problem.train),
            list(here.values()),
            create_graph=True,
            allow_unused=True,
        )
        given = {n: g for n, g in zip(params, grads, strict=True) if g is not None}
        params |= move({n: params[n] for n in given}, given)
    return params


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("graph", ["stored", "recomputed"])
@every_inner
def test_second_order_equals_autograd_through_the_inner_steps(
    inner: Callable[[], tuple[InnerOptimizer, oracles.Rule]], graph: Any, steps: int
) -> None:
    problem, (optimizer, rule) = learning(), inner()
    result = meta_gradient(SecondOrder(optimizer, steps, graph=graph), problem)
    assert relative_error(result.weight_gradient, expected(problem, rule, steps)) <= 1e-9


@pytest.mark.parametrize("steps", [1, 3])
@every_inner
def test_first_order_in_forward_mode_equals_autograd(
    inner: Callable[[], tuple[InnerOptimizer, oracles.Rule]], steps: int
) -> None:
    problem, (optimizer, rule) = learning(), inner()
    result = meta_gradient(FirstOrder(optimizer, steps), problem)
    assert (
        relative_error(result.weight_gradient, expected(problem, rule, steps, first_order=True))
        <= 1e-9
    )
    # The rest of the result is that of fixed weights; those learned start there to float32.
    fixed = replace(problem, objective=problem.objective.meta_objective)
    plain = meta_gradient(FirstOrder(optimizer, steps), fixed)
    assert relative_error(result.gradient, plain.gradient) <= 1e-7


def test_e12_is_minus_eta_times_a_directional_derivative() -> None:
    """d L_meta / d beta_m = -eta <grad L_pixel^m(phi), v>, with both gradients taken by hand."""
    problem = learning()
    result = meta_gradient(FirstOrder(SGD(LR)), problem)
    outer = replace(problem, objective=problem.objective.meta_objective)
    phi = oracles.phi_of(problem)
    adapted = oracles.leaves(oracles.adapt(problem, phi, LR, 1))
    v = oracles.derivatives(oracles.loss(outer, adapted, problem.meta), adapted)
    free = next(p for n, p in problem.objective.hyper_parameters().items() if "beta" in n)
    for m in range(3):
        # L_pixel^m is what one more unit of beta_m adds to the loss.
        more = [[b + (i == m) for i, b in enumerate(BETA)], list(BETA)]
        losses = [
            oracles.loss(
                replace(problem, objective=PrismObjective(beta=beta, delta=DELTA)),
                phi,
                problem.train,
            )
            for beta in more
        ]
        slope = oracles.derivatives(losses[0] - losses[1], phi)
        product = sum((slope[n] * v[n]).sum() for n in v)
        softplus = torch.sigmoid(free[m]).item()
        got = next(g for n, g in result.weight_gradient.items() if "beta" in n)[m].item()
        assert got == pytest.approx(-LR * float(product) * softplus, rel=1e-9, abs=1e-14)


def test_a_modality_that_is_never_shown_gets_no_gradient() -> None:
    for strategy in (FirstOrder(SGD(LR)), SecondOrder(SGD(LR))):
        result = meta_gradient(strategy, learning())
        for gradient in result.weight_gradient.values():
            assert gradient[2] == 0 and bool(gradient[:2].all())


def test_finite_differences_of_the_meta_loss() -> None:
    """At K = 1 the gradient of L_train depends only on the weights, whatever it detaches."""
    problem = learning(beta=0.0, delta=0.0)  # of L_meta, which then detaches nothing
    problem = replace(problem, model=prism_net(fusion=MeanFusion))
    result = meta_gradient(SecondOrder(SGD(LR)), problem)
    for name, weight in weights_of(problem).items():

        def loss(change: float, weight: Tensor = weight) -> float:
            with torch.no_grad():
                weight[0] += change
            value = float(meta_gradient(FirstOrder(SGD(LR)), problem).meta_loss)
            with torch.no_grad():
                weight[0] -= change
            return value

        assert float(result.weight_gradient[name][0]) == pytest.approx(derivative(loss), rel=1e-7)


@pytest.mark.parametrize("steps", [1, 3])
@every_inner
def test_the_finite_difference_strategy(
    inner: Callable[[], tuple[InnerOptimizer, oracles.Rule]], steps: int
) -> None:
    problem, (optimizer, rule) = replace(mlp(), objective=Weighted()), inner()
    result = meta_gradient(FiniteDifference(optimizer, steps, radius=SMOOTH), problem)
    assert relative_error(result.weight_gradient, expected(problem, rule, steps)) <= 1e-7


def test_implicit_gradient_of_the_minimum() -> None:
    """-(1/lambda) d <grad L_train(phi~), G> / d weights, with a dense solver's G."""
    problem, proximal = learning(), 20.0
    strategy = ImplicitMAML(SGD(0.04), 40, proximal=proximal, cg_steps=60)
    result = meta_gradient(strategy, problem)
    outer = replace(problem, objective=problem.objective.meta_objective)
    adapted = oracles.leaves(result.adapted)
    v = oracles.derivatives(oracles.loss(outer, adapted, problem.meta), adapted)
    grads = oracles.derivatives(
        oracles.loss(problem, adapted, problem.train), adapted, create_graph=True
    )
    # The residual of the system that G solves, and E12 with this very G.
    solution = result.gradient
    along = torch.stack([(grads[n] * solution[n]).sum() for n in grads]).sum()
    curved = torch.autograd.grad(
        along, list(adapted.values()), retain_graph=True, materialize_grads=True
    )
    system = {n: solution[n] + c / proximal for n, c in zip(adapted, curved, strict=True)}
    assert relative_error(system, v) <= 1e-6
    mixed = oracles.derivatives(along, weights_of(problem))
    assert (
        relative_error(result.weight_gradient, {n: -m / proximal for n, m in mixed.items()}) <= 1e-9
    )


def test_dropout_is_replayed_in_forward_mode() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Dropout(0.4), torch.nn.Linear(5, 2)
    ).double()
    problem = replace(mlp(), model=model, objective=Weighted())
    results = []
    for strategy in (FirstOrder(SGD(LR)), SecondOrder(SGD(LR), graph="recomputed")):
        torch.manual_seed(5)
        results.append(meta_gradient(strategy, problem).weight_gradient["w"])
    assert results[0] != 0
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=0)  # the same at K = 1


@pytest.mark.parametrize(
    "strategy",
    [SingleLevel(), Reptile(SGD(LR)), HigherStrategy(lambda p: torch.optim.SGD(p, LR))],
    ids=lambda s: type(s).__name__,
)
def test_strategies_without_such_a_gradient_say_so(strategy: MetaStrategy) -> None:
    message = (
        rf"objective: {type(strategy).__name__} gives its learned weights \(.*beta.*\) no gradient; "
        "use FirstOrder or SecondOrder, or an objective with fixed weights"
    )
    with pytest.raises(ValueError, match=message):
        meta_gradient(strategy, learning())


def test_the_outer_optimizer_moves_the_weights_it_holds() -> None:
    problem = learning()
    weights = problem.objective.hyper_parameters()
    before = {n: w.detach().clone() for n, w in weights.items()}
    optimizer = torch.optim.SGD(
        [
            {"params": list(problem.model.parameters())},
            {"params": list(weights.values()), "lr": 0.5},
        ],
        lr=0.01,
    )
    learner = MetaLearner(problem.model, problem.objective, FirstOrder(SGD(LR)), optimizer)
    result = learner.step(problem.train, problem.meta)
    for name, weight in weights.items():
        moved = before[name] - 0.5 * result.weight_gradient[name]
        torch.testing.assert_close(weight.detach(), moved, rtol=1e-12, atol=1e-15)
