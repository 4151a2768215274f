"""Small problems that the strategies are checked on, and functions that compare updates."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, torch's own convention

from prism_meta.bilevel.inner import SGD
from prism_meta.bilevel.strategies import (
    FiniteDifference,
    FirstOrder,
    ImplicitMAML,
    MetaGradient,
    MetaStrategy,
    Reptile,
    SecondOrder,
    SingleLevel,
)
from prism_meta.errors import CaseError, PrismError
from prism_meta.modalities import Batch
from prism_meta.networks.prism import PrismNet
from prism_meta.objective.prism import PrismObjective

F64 = torch.float64
#: Bound for two ways to compute the same number in float64.
EXACT = 1e-9
#: Inner rate and number of inner steps of STRATEGIES.
LR = 0.1
STEPS = 3
#: Radius of finite differences: the cube root of float64's precision, which is best for a smooth loss.
SMOOTH = 6e-6
#: One instance of every strategy, and both graphs of second order.
STRATEGIES: list[Any] = [
    pytest.param(SingleLevel(), id="single"),
    pytest.param(FirstOrder(SGD(LR), STEPS), id="first"),
    pytest.param(SecondOrder(SGD(LR), STEPS, graph="stored"), id="stored"),
    pytest.param(SecondOrder(SGD(LR), STEPS, graph="recomputed"), id="recomputed"),
    pytest.param(Reptile(SGD(LR), STEPS), id="reptile"),
    pytest.param(FiniteDifference(SGD(LR), STEPS, radius=SMOOTH), id="differences"),
    pytest.param(ImplicitMAML(SGD(LR), STEPS, proximal=20.0, cg_steps=20), id="implicit"),
]


@dataclass(frozen=True)
class Problem:
    """A model, an objective and the two batches of one episode, all in float64."""

    name: str
    model: nn.Module
    objective: Callable[..., Any]
    train: Any
    meta: Any


def faults_of(action: Callable[[], object], kind: type[PrismError] = CaseError) -> tuple[str, ...]:
    """The faults of the error that ``action`` raises; each must be one line of the message."""
    with pytest.raises(kind) as caught:
        action()
    assert str(caught.value) == "\n".join(caught.value.faults)
    return caught.value.faults


def dice(a: Tensor, b: Tensor) -> float:
    """Dice overlap of two masks; 1 if they are equal."""
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def relative_error(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """||actual - expected|| / ||expected|| over all entries; the names must agree."""
    assert list(actual) == list(expected), (list(actual), list(expected))
    difference = sum((actual[n] - expected[n]).square().sum().item() for n in expected)
    norm = sum(e.square().sum().item() for e in expected.values())
    return float((difference / norm) ** 0.5)


def equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether all values are equal bit by bit; the names must agree."""
    assert list(actual) == list(expected), (list(actual), list(expected))
    return all(torch.equal(actual[n], expected[n]) for n in expected)


def copies(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: v.detach().clone() for n, v in values.items()}


def meta_gradient(strategy: MetaStrategy, problem: Problem, **options: Any) -> MetaGradient:
    """Run ``strategy`` on the episode of ``problem``."""
    return strategy.meta_gradient(
        problem.model, problem.objective, problem.train, problem.meta, **options
    )


def run_example(owner: type) -> None:
    """Run the example of a docstring that is a Python block instead of a doctest."""
    (example,) = re.findall(r"( *```python\n.*?)```", inspect.getdoc(owner) or "", re.DOTALL)
    with torch.random.fork_rng():
        exec(textwrap.dedent(example).removeprefix("```python\n"), {})  # noqa: S102, our own docstring


def derivative(function: Callable[[float], float], at: float = 0.0, step: float = 1e-3) -> float:
    """Derivative by fourth-order central differences: truncation about step^4, rounding 1e-16 / step."""
    near = function(at + step) - function(at - step)
    far = function(at + 2 * step) - function(at - 2 * step)
    return (8 * near - far) / (12 * step)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters phi, detached."""
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def norm(values: Mapping[str, Tensor]) -> float:
    return float(sum(v.square().sum().item() for v in values.values()) ** 0.5)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def labels(*shape: int, classes: int, seed: int) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def randomize(model: nn.Module, *, seed: int, scale: float = 0.5) -> nn.Module:
    """Convert to float64 and redraw every parameter, so that no zero bias or unit gain hides a mistake."""
    model.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            gain = param.ndim == 1 and name.endswith("weight")
            param.copy_(gain + scale * torch.randn(param.shape, dtype=F64, generator=generator))
    return model


def mse(forward: Callable[..., Any], batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (forward(x) - y).square().mean()


def cross_entropy(forward: Callable[..., Any], batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(forward(x), y)


def mlp() -> Problem:
    """A net 3 -> 5 -> 2 with tanh: its loss is curved, and smooth everywhere."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    return Problem(
        "mlp",
        randomize(model, seed=0),
        mse,
        (randn(6, 3, seed=1), randn(6, 2, seed=2)),
        (randn(5, 3, seed=3), randn(5, 2, seed=4)),
    )


def linear() -> Problem:
    """A linear regression, whose loss is quadratic in the parameters."""
    return Problem(
        "linear",
        randomize(nn.Linear(3, 2), seed=60),
        mse,
        (randn(8, 3, seed=61), randn(8, 2, seed=62)),
        (randn(7, 3, seed=63), randn(7, 2, seed=64)),
    )


def episodes(count: int) -> list[tuple[Any, Any]]:
    """Batches for the MLP, different ones for every outer step."""
    batches = [
        (randn(5, 3, seed=s), randn(5, 2, seed=s + 1)) for s in range(200, 200 + 4 * count, 2)
    ]
    return list(zip(batches[::2], batches[1::2], strict=True))


def dropout() -> Problem:
    """The MLP with Dropout, which draws a new mask in every forward pass."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 2))
    return replace(mlp(), name="dropout", model=randomize(model, seed=65))


def batch_norm() -> Problem:
    """The MLP with BatchNorm in training mode."""
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))
    return replace(mlp(), name="batch_norm", model=randomize(model, seed=66))


class Corners(nn.Module):
    """A model with a frozen layer, an unused parameter, a tied weight and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.square = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.again = nn.Linear(3, 3)
        self.again.weight = self.square.weight
        self.unused = nn.Parameter(torch.ones(2))
        self.head = nn.Linear(3, 2)
        randomize(self, seed=5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.square(self.frozen(x))))
        out: Tensor = self.head(torch.tanh(self.again(x)))
        return out


def corners() -> Problem:
    return replace(mlp(), name="corners", model=Corners())


class Average(nn.Module):
    """A model whose buffer averages activations and keeps their graph, unlike BatchNorm's."""

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("average", torch.zeros(2))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.tanh(self.linear(x))
        self.average.mul_(0.9).add_(0.1 * out.mean(0))
        return out - self.average


def average() -> Problem:
    return replace(mlp(), name="average", model=Average())


def conv() -> Problem:
    """A small segmentation net with InstanceNorm, two channels to three classes."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.InstanceNorm2d(4, affine=True),
        nn.LeakyReLU(0.01),
        nn.Conv2d(4, 3, 1),
    )
    return Problem(
        "conv",
        randomize(model, seed=10),
        cross_entropy,
        (randn(2, 2, 6, 5, seed=11), labels(2, 6, 5, classes=3, seed=12)),
        (randn(3, 2, 6, 5, seed=13), labels(3, 6, 5, classes=3, seed=14)),
    )


def prism_net(**changes: Any) -> PrismNet:
    """A 2-D PrismNet with 3 modalities and 3 classes, in float64."""
    sizes = {"num_modalities": 3, "num_classes": 3, "spatial_dims": 2, "width": 2, "depth": 2}
    with torch.random.fork_rng():
        torch.manual_seed(20)
        return PrismNet(**{**sizes, **changes}).double()


def prism_batch(mask: list[list[bool]], *size: int, seed: int, classes: int = 3) -> Batch:
    """Random images and labels for the rows of ``mask``."""
    shape = (len(mask), len(mask[0]), *size)
    target = labels(len(mask), *size, classes=classes, seed=seed + 1)
    return Batch(randn(*shape, seed=seed), torch.tensor(mask), target)


def prism() -> Problem:
    """PrismNet and PrismObjective; the train batch never shows the last modality."""
    return Problem(
        "prism",
        prism_net(),
        PrismObjective(),
        prism_batch([[True, False, False], [True, True, False]], 7, 6, seed=21),
        prism_batch([[True, True, True], [False, False, True]], 7, 6, seed=31),
    )


PROBLEMS = (mlp, conv, prism)
every_problem = pytest.mark.parametrize("make_problem", PROBLEMS)
every_order = pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
