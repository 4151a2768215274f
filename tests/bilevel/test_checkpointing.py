"""torch.utils.checkpoint in a model: as without it, or an error."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import oracles
import pytest
import torch
from helpers import LR, Problem, copies, equal, meta_gradient, mlp, mse, randomize, relative_error
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, torch's own convention
from torch.utils.checkpoint import checkpoint
from variants import every_kind, make

from prism_meta.bilevel.inner import SGD, Adam
from prism_meta.bilevel.preflight import preflight
from prism_meta.bilevel.strategies import (
    ALL_STRATEGIES,
    CheckpointError,
    FiniteDifference,
    FirstOrder,
    ImplicitMAML,
    MetaStrategy,
    Reptile,
    SecondOrder,
)
from prism_meta.integrations.higher import HigherStrategy

ROUNDING = 1e-12
STORED = (
    "runs again in the backward pass (torch.utils.checkpoint), in a graph of several evaluations at "
    "different parameters; use SecondOrder(graph='recomputed'), or switch checkpointing off"
)
REENTRANT = (
    "model: a part of it is checkpointed with use_reentrant=True, which torch differentiates only in "
    "backward(); call torch.utils.checkpoint with use_reentrant=False"
)
#: Options of strategies for which a checkpoint works, or that make the test sharper.
OPTIONS: dict[type[MetaStrategy], dict[str, Any]] = {
    SecondOrder: {"graph": "recomputed"},
    Reptile: {"inner": Adam(0.05, eps=1e-3)},
    ImplicitMAML: {"proximal": 20.0},
}


def with_steps(kind: type[MetaStrategy], steps: int) -> MetaStrategy:
    return make(kind, steps, **OPTIONS.get(kind, {}))


every_k = pytest.mark.parametrize("steps", [1, 3])
every_model = pytest.mark.parametrize(
    "model", ["plain", "dropout", "batch_norm", "average", "direct", "tied", "frozen"]
)


class Average(nn.Module):
    """Its output depends on a buffer that the same call changes."""

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.average.mul_(0.9).add_(0.1 * x.mean(0))
        return x - self.average


class Net(nn.Module):
    """3 -> 5 -> 5 -> 2 with tanh; the middle one may be checkpointed."""

    def __init__(self, kind: str, reentrant: bool | None) -> None:
        super().__init__()
        extra: dict[str, Callable[[], nn.Module]] = {
            "dropout": lambda: nn.Dropout(0.4),
            "batch_norm": lambda: nn.BatchNorm1d(5),
            "average": Average,
        }
        self.first = nn.Linear(3, 5)
        self.block = nn.Sequential(
            nn.Linear(5, 5), extra.get(kind, nn.Identity)(), nn.Tanh(), nn.Linear(5, 5), nn.Tanh()
        )
        self.last = nn.Linear(5, 2)
        self.kind, self.reentrant = kind, reentrant
        randomize(self, seed=5)
        if kind == "tied":
            self.block[3].weight = self.block[0].weight
        if kind == "frozen":
            self.block[3].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        inner = self._direct if self.kind == "direct" else self.block
        x = inner(x) if self.reentrant is None else again(inner, x, self.reentrant)
        out: Tensor = self.last(x)
        return out

    def _direct(self, x: Tensor) -> Tensor:
        """Without a call of a module."""
        return F.linear(x, self.block[0].weight).tanh() + self.block[3].bias.exp()


def again(function: Callable[[Tensor], Tensor], x: Tensor, reentrant: bool) -> Tensor:
    out: Tensor = checkpoint(function, x, use_reentrant=reentrant)
    return out


def problem(kind: str = "plain", reentrant: bool | None = False) -> Problem:
    """The episode of the MLP; without a checkpoint where ``reentrant`` is None."""
    return replace(mlp(), model=Net(kind, reentrant))


@every_k
@every_kind
@every_model
def test_a_checkpoint_changes_nothing(model: str, kind: type[MetaStrategy], steps: int) -> None:
    results = []
    for reentrant in (None, False):
        torch.manual_seed(3)
        episode = problem(model, reentrant)
        before = copies(episode.model.state_dict())
        results.append(meta_gradient(with_steps(kind, steps), episode))
        assert equal(episode.model.state_dict(), before)
        drawn = torch.rand(1)
    plain, result = results
    torch.manual_seed(3)
    meta_gradient(with_steps(kind, steps), problem(model, None))
    assert torch.equal(torch.rand(1), drawn)
    bound = 1e-8 if kind is FiniteDifference else ROUNDING  # a difference magnifies the last digit
    assert relative_error(result.gradient, plain.gradient) <= bound
    assert relative_error(result.adapted, plain.adapted) <= ROUNDING
    torch.testing.assert_close(result.meta_loss, plain.meta_loss, rtol=ROUNDING, atol=0)
    for mine, other in (
        (result.buffers, plain.buffers),
        (result.inner_buffers, plain.inner_buffers),
    ):
        assert list(mine) == list(other)
        for buffer in other:
            torch.testing.assert_close(mine[buffer], other[buffer], rtol=ROUNDING, atol=0)


@every_k
def test_a_checkpoint_has_the_oracles_second_order(steps: int) -> None:
    """The oracle never checkpoints."""
    expected = oracles.second_order(problem(reentrant=None), LR, steps)
    result = meta_gradient(SecondOrder(SGD(LR), steps, graph="recomputed"), problem())
    assert relative_error(result.gradient, expected) <= 1e-9


def test_without_the_parameters_in_place_it_would_be_wrong() -> None:
    """What is guarded against: plain functional_call, then autograd.grad at phi~."""
    episode = problem()
    adapted = oracles.adapted_parameters(problem(reentrant=None), LR, 3)
    careless = oracles.gradient(episode, adapted, episode.meta)
    right = oracles.gradient(problem(reentrant=None), adapted, episode.meta)
    assert relative_error(careless, right) > 1e-2
    result = meta_gradient(FirstOrder(SGD(LR), 3), episode)
    assert relative_error(result.gradient, right) <= ROUNDING


@every_model
@every_k
def test_the_stored_graph_refuses_and_names_a_module(model: str, steps: int) -> None:
    strategy = SecondOrder(SGD(LR), steps, graph="stored")
    message = f"model: block.0 {STORED}"
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        meta_gradient(strategy, problem(model))
    meta_gradient(strategy, problem(model, None))


def test_a_checkpoint_without_parameters_is_right_in_the_stored_graph() -> None:
    class Activation(nn.Module):
        def __init__(self, reentrant: bool | None) -> None:
            super().__init__()
            self.net, self.reentrant = mlp().model, reentrant

        def forward(self, x: Tensor) -> Tensor:
            assert isinstance(self.net, nn.Sequential)
            x = self.net[0](x)
            x = torch.tanh(x) if self.reentrant is None else again(torch.tanh, x, self.reentrant)
            out: Tensor = self.net[2](x)
            return out

    plain, result = (
        meta_gradient(
            SecondOrder(SGD(LR), 3, graph="stored"), replace(mlp(), model=Activation(form))
        )
        for form in (None, False)
    )
    assert relative_error(result.gradient, plain.gradient) <= ROUNDING


def test_higher_refuses_in_second_order() -> None:
    strategy = HigherStrategy(lambda params: torch.optim.SGD(params, lr=LR), 2)
    with pytest.raises(CheckpointError, match=re.escape(f"model: block.0 {STORED}")):
        meta_gradient(strategy, problem())


def test_higher_finds_the_right_parameters_in_first_order() -> None:
    strategy = HigherStrategy(lambda params: torch.optim.SGD(params, lr=LR), 3, first_order=True)
    expected = meta_gradient(FirstOrder(SGD(LR), 3), problem(reentrant=None))
    result = meta_gradient(strategy, problem())
    assert relative_error(result.gradient, expected.gradient) <= ROUNDING
    assert relative_error(result.adapted, expected.adapted) <= ROUNDING


@every_kind
def test_a_reentrant_checkpoint_is_refused(kind: type[MetaStrategy]) -> None:
    with pytest.raises(CheckpointError, match=f"^{re.escape(REENTRANT)}$") as caught:
        meta_gradient(make(kind), problem(reentrant=True))
    assert "use_reentrant" in str(caught.value.__cause__)


# ---------------------------------------------------------------- E12


class Weighted:
    """L_train is (1 + w) times the mean squared error, L_meta that error."""

    def __init__(self) -> None:
        self.free = torch.full((), 0.3, dtype=torch.float64, requires_grad=True)

    def hyper_parameters(self) -> dict[str, Tensor]:
        return {"w": self.free}

    def __call__(self, forward: Any, batch: Any) -> Tensor:
        return (1 + self.free) * mse(forward, batch)

    def meta_objective(self, forward: Any, batch: Any) -> Tensor:
        return mse(forward, batch)


@every_k
@pytest.mark.parametrize("kind", [k for k in ALL_STRATEGIES if k.has_meta_gradient])
def test_learned_weights_get_the_same_gradient(kind: type[MetaStrategy], steps: int) -> None:
    plain, result = (
        meta_gradient(
            with_steps(kind, steps), replace(problem(reentrant=form), objective=Weighted())
        )
        for form in (None, False)
    )
    assert relative_error(result.weight_gradient, plain.weight_gradient) <= 1e-10


# ---------------------------------------------------------------- preflight


@every_model
def test_preflight_reports_it_and_changes_nothing(model: str) -> None:
    episode = problem(model)
    before = copies(episode.model.state_dict())
    report = preflight(episode.model, mse, episode.train)
    assert equal(episode.model.state_dict(), before)
    (finding,) = (f for f in report.findings if f.level == "error")
    assert str(finding) == f"error: block.0: blocks SecondOrder(graph='stored'): {STORED}"
    assert set(report.memory) > {"FirstOrder", "SecondOrder(graph='recomputed')"}
    assert preflight(problem(model, None).model, mse, episode.train).ok


@pytest.mark.parametrize("first", [False, True])
def test_preflight_reports_a_reentrant_one(first: bool) -> None:
    """Where it is the first thing that the input meets, torch gives its parameters no gradient."""
    model = problem(reentrant=True).model
    assert isinstance(model, Net)
    if first:
        model.first = nn.Linear(3, 5, dtype=torch.float64).requires_grad_(False)
    report = preflight(model, mse, mlp().train)
    assert str(report.findings[0]) == REENTRANT.replace("model:", "error: model:")
    assert not report.ok and report.memory == {}


class Twice(nn.Module):
    """Registers its layers under two names, as MONAI's DynUNet does its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 2)
        self.layers = nn.ModuleList([self.first, self.last])
        randomize(self, seed=67)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers[1](torch.tanh(self.first(x)))
        return out


@every_k
@pytest.mark.parametrize("graph", ["stored", "recomputed"])
def test_a_module_under_two_names_is_left_as_it_was(graph: Any, steps: int) -> None:
    problem = replace(mlp(), model=Twice())
    before = dict(problem.model.named_parameters(remove_duplicate=False))
    result = meta_gradient(SecondOrder(SGD(LR), steps, graph=graph), problem)
    after = dict(problem.model.named_parameters(remove_duplicate=False))
    assert all(after[name] is param for name, param in before.items())
    # Last, for functional_call with tie_weights, which the oracle uses, does not put them back.
    assert relative_error(result.gradient, oracles.second_order(problem, LR, steps)) <= 1e-9
