"""Where and on what strategies may be called: gradient modes, kinds of modules, kinds of numbers."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    EXACT,
    F64,
    LR,
    SMOOTH,
    STRATEGIES,
    Problem,
    copies,
    equal,
    meta_gradient,
    mlp,
    mse,
    randn,
    relative_error,
    trainable,
)
from torch import Tensor, nn

import prism_meta as pm
from prism_meta.bilevel.functional.errors import NonFiniteError, ReplayError
from prism_meta.bilevel.inner import SGD, Adam, AdamW, InnerOptimizer, MetaSGD
from prism_meta.bilevel.learner import MetaLearner
from prism_meta.bilevel.strategies import (
    FiniteDifference,
    FirstOrder,
    MetaStrategy,
    Reptile,
    SecondOrder,
    SingleLevel,
)

every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


# ---------------------------------------------------------------- gradient modes


@every_strategy
def test_no_grad_around_a_call_changes_nothing(strategy: MetaStrategy) -> None:
    problem = mlp()
    expected = meta_gradient(strategy, problem)
    with torch.no_grad():
        result = meta_gradient(strategy, problem)
    assert equal(result.gradient, expected.gradient) and equal(result.adapted, expected.adapted)
    assert not any(g.requires_grad for g in result.gradient.values())


@every_strategy
def test_inference_mode_is_refused(strategy: MetaStrategy) -> None:
    message = (
        r"^meta_gradient: called in torch.inference_mode\(\), whose tensors can have no gradient; call it "
        r"outside \(torch.no_grad\(\) does no harm\)$"
    )
    with torch.inference_mode(), pytest.raises(RuntimeError, match=message):
        meta_gradient(strategy, mlp())


def test_a_step_in_a_validation_hook_is_a_step() -> None:
    problem = mlp()
    models = [deepcopy(problem.model) for _ in range(2)]
    for model, recording in zip(models, (True, False), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with torch.set_grad_enabled(recording):
            MetaLearner(model, mse, SecondOrder(SGD(LR)), optimizer).step(
                problem.train, problem.meta
            )
    assert equal(trainable(models[0]), trainable(models[1]))
    assert not equal(trainable(models[0]), trainable(problem.model))


# ---------------------------------------------------------------- kinds of modules


def inference_model() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(3, 2)


MODELS: list[tuple[Callable[[], nn.Module], str]] = [
    (
        lambda: nn.Sequential(nn.LazyLinear(2)),
        "model: 0.weight, 0.bias have no shape yet (a lazy module); run the model once on a batch before "
        "training",
    ),
    (
        lambda: nn.DataParallel(nn.Linear(3, 2)),
        "model: got DataParallel, whose replicas hold other parameters than the model; pass the "
        "module inside it, and run one process per device (Lightning Fabric does)",
    ),
    (
        inference_model,
        "model: Linear was made in torch.inference_mode(); make it outside of that context",
    ),
]


@pytest.mark.parametrize(("make", "message"), MODELS, ids=["lazy", "data-parallel", "inference"])
@pytest.mark.parametrize(
    "call",
    [
        lambda model, batch: SecondOrder(SGD(LR)).meta_gradient(model, mse, batch, batch),
        lambda model, batch: pm.preflight(model, mse, batch),
    ],
    ids=["strategy", "preflight"],
)
def test_a_module_that_cannot_be_called_functionally_is_refused(
    make: Callable[[], nn.Module], message: str, call: Callable[[nn.Module, Any], object]
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(make(), (torch.ones(4, 3), torch.ones(4, 2)))


def test_a_scripted_module_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates torch.jit
        model = nn.Sequential(torch.jit.script(nn.Linear(3, 2)))
    message = (
        r"^model: Sequential is scripted \(torch.jit\), and its parameters cannot be replaced; pass the "
        r"module that was given to torch.jit.script$"
    )
    with pytest.raises(ValueError, match=message):
        SingleLevel().meta_gradient(model, mse, *2 * [(torch.ones(4, 3), torch.ones(4, 2))])


def test_lbfgs_outside_is_refused() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"^optimizer: LBFGS evaluates the loss several times"):
        MetaLearner(model, mse, SingleLevel(), torch.optim.LBFGS(model.parameters()))


# ---------------------------------------------------------------- replayed steps


class Drawing(nn.Module):
    """An MLP whose hidden units are dropped by random numbers from outside torch."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.net, self.draw = mlp().model, draw

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.net, nn.Sequential)
        hidden = self.net[1](self.net[0](x))
        kept = torch.tensor([self.draw() > 0.4 for _ in range(5)], dtype=F64)
        out: Tensor = self.net[2](hidden * kept)
        return out


@pytest.mark.parametrize("draw", [random.random, lambda: float(np.random.rand())])
@pytest.mark.parametrize(
    "strategy", [SecondOrder(SGD(LR), 3), FiniteDifference(SGD(LR), 3, radius=SMOOTH)]
)
def test_random_numbers_of_python_and_numpy_are_replayed(
    strategy: MetaStrategy, draw: Callable[[], float]
) -> None:
    results = []
    for each in (SecondOrder(SGD(LR), 3, graph="stored"), strategy):
        random.seed(1)
        np.random.seed(1)
        results.append(meta_gradient(each, replace(mlp(), model=Drawing(draw))))
        left = draw()
    assert relative_error(results[1].gradient, results[0].gradient) <= 1e-7
    random.seed(1)
    np.random.seed(1)
    meta_gradient(SecondOrder(SGD(LR), 3, graph="stored"), replace(mlp(), model=Drawing(draw)))
    assert left == draw()  # a replay leaves the generators where the steps left them


class Remembering(nn.Module):
    """A tensor that is no buffer, and that every call of the model changes."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.average = mlp().model, torch.zeros(2, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        self.average = 0.9 * self.average + 0.1 * out.detach().mean(0)
        return out - self.average


@pytest.mark.parametrize("generator", [True, False])
def test_a_step_that_cannot_be_replayed_is_an_error(generator: bool) -> None:
    own = np.random.default_rng(0)
    model = Drawing(own.random) if generator else Remembering()
    problem = replace(mlp(), model=model)
    message = (
        r"^model: an inner step was recomputed with another result \(loss \S+ instead of \S+\): forward "
        r"depends on something that changed in between, e.g. a tensor attribute that it updates or random "
        r"numbers from a generator of its own; register such a tensor as a buffer, or use "
        r"SecondOrder\(graph='stored'\)$"
    )
    for strategy in (SecondOrder(SGD(LR), 3), FiniteDifference(SGD(LR), 3)):
        with pytest.raises(ReplayError, match=message):
            meta_gradient(strategy, problem)
    meta_gradient(SecondOrder(SGD(LR), 3, graph="stored"), problem)


# ---------------------------------------------------------------- complex parameters


class Fourier(nn.Module):
    """A spectral filter: complex weights on the frequencies of the input."""

    def __init__(self) -> None:
        super().__init__()
        real = randn(5, 2, seed=3)
        self.weight = nn.Parameter(torch.view_as_complex(0.5 * real))
        self.bias = nn.Parameter(randn(8, seed=4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.tanh(torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=8) + self.bias)
        return out


class FourierPairs(nn.Module):
    """The same with pairs of real numbers."""

    def __init__(self) -> None:
        super().__init__()
        filtered = Fourier()
        self.weight = nn.Parameter(torch.view_as_real(filtered.weight.detach()).clone())
        self.bias = nn.Parameter(filtered.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.view_as_complex(self.weight)
        out: Tensor = torch.tanh(torch.fft.irfft(torch.fft.rfft(x) * weight, n=8) + self.bias)
        return out


INNERS: list[Callable[[nn.Module], InnerOptimizer]] = [
    lambda model: SGD(LR),
    lambda model: SGD(LR, momentum=0.9, nesterov=True, weight_decay=0.1),
    lambda model: Adam(0.05, eps=1e-3, weight_decay=0.1),
    lambda model: AdamW(0.05, eps=1e-3, weight_decay=0.1),
    lambda model: MetaSGD(model, lr=LR),
]
KINDS: list[Callable[[InnerOptimizer], MetaStrategy]] = [
    lambda inner: FirstOrder(inner, 3),
    lambda inner: SecondOrder(inner, 3, graph="stored"),
    lambda inner: SecondOrder(inner, 3, graph="recomputed"),
    lambda inner: FiniteDifference(inner, 3, radius=SMOOTH),
]


@pytest.mark.parametrize("make_inner", INNERS, ids=["sgd", "momentum", "adam", "adamw", "meta-sgd"])
@pytest.mark.parametrize("make", KINDS, ids=["first", "stored", "recomputed", "differences"])
def test_complex_parameters_are_pairs_of_real_ones(
    make: Callable[[InnerOptimizer], MetaStrategy],
    make_inner: Callable[[nn.Module], InnerOptimizer],
) -> None:
    batches = [(randn(3, 8, seed=s), randn(3, 8, seed=s + 1)) for s in (5, 7)]
    results = []
    for model in (Fourier(), FourierPairs()):
        problem = Problem("fourier", model, mse, *batches)
        results.append(meta_gradient(make(make_inner(model)), problem))
    ours, pairs = results
    bound = 1e-7 if isinstance(make(SGD(LR)), FiniteDifference) else EXACT
    for mine, real in ((ours.gradient, pairs.gradient), (ours.adapted, pairs.adapted)):
        as_real = {**mine, "weight": torch.view_as_real(mine["weight"])}
        assert relative_error(as_real, real) <= bound
    assert ours.hyper_gradient.keys() == pairs.hyper_gradient.keys()
    for name, slope in ours.hyper_gradient.items():
        torch.testing.assert_close(slope, pairs.hyper_gradient[name], rtol=bound, atol=bound)


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        (SGD(0.1, momentum=0.9, weight_decay=0.1), torch.optim.SGD),
        (Adam(0.05, weight_decay=0.1), torch.optim.Adam),
        (AdamW(0.05, weight_decay=0.1), torch.optim.AdamW),
    ],
)
def test_complex_steps_equal_those_of_torch(inner: InnerOptimizer, outer: Any) -> None:
    weight = nn.Parameter(torch.view_as_complex(randn(4, 2, seed=1)))
    options: dict[str, Any] = {"momentum": 0.9} if outer is torch.optim.SGD else {}
    optimizer = outer([weight], lr=0.1 if options else 0.05, weight_decay=0.1, **options)
    params = {"w": weight.detach().clone()}
    state = inner.init(params)
    for step in range(4):
        gradient = torch.view_as_complex(randn(4, 2, seed=10 + step))
        params, state = inner.update({"w": gradient}, state, params)
        weight.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(params["w"], weight.detach(), rtol=1e-12, atol=1e-15)


# ---------------------------------------------------------------- numbers that are not finite


@dataclass
class Named:
    x: Tensor
    y: Tensor
    case_ids: tuple[str, ...]


def with_terms(forward: Callable[..., Any], batch: Named) -> Any:
    loss = (forward(batch.x) - batch.y).square().mean()

    @dataclass
    class Value:
        loss: Tensor
        terms: dict[str, Tensor]

    return Value(loss, {"square": loss, "constant": torch.ones(())})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("where", ["train", "meta"])
@pytest.mark.parametrize(
    "strategy",
    [SingleLevel(), FirstOrder(SGD(LR)), SecondOrder(SGD(LR), 2), Reptile(SGD(LR), 2)],
    ids=["single", "first", "second", "reptile"],
)
def test_what_is_not_finite_never_reaches_the_parameters(
    strategy: MetaStrategy, where: str, bad: float
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    batches = {
        name: Named(torch.randn(5, 3), torch.randn(5, 2), (f"{name}-1", "shared"))
        for name in ("train", "meta")
    }
    batches[where].y[0, 0] = bad
    learner = MetaLearner(model, with_terms, strategy, torch.optim.Adam(model.parameters()))
    before = copies(model.state_dict())
    with pytest.raises(NonFiniteError) as caught:
        learner.step(batches["train"], batches["meta"])
    assert str(caught.value).startswith("outer step: not finite on cases train-1, shared, meta-1: ")
    if where == "meta":
        assert "meta loss, term square" in str(caught.value)
    assert equal(model.state_dict(), before) and learner.optimizer.state == {}
