"""A small net, its episodes, and the loop over ``MetaLearner.step`` that other trainers must equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prism_meta as pm
from prism_meta.bilevel.inner import SGD, Adam, MetaSGD
from prism_meta.bilevel.learner import MetaLearner
from prism_meta.bilevel.strategies import (
    FirstOrder,
    MetaStrategy,
    Reptile,
    SecondOrder,
    SingleLevel,
)

STEPS = 6
Make = Callable[[nn.Module], MetaStrategy]
STRATEGIES: dict[str, Make] = {
    "single-level": lambda model: SingleLevel(),
    "first-order": lambda model: FirstOrder(SGD(0.05)),
    "second-order": lambda model: SecondOrder(Adam(0.01), steps=2),
    "learned-rates": lambda model: SecondOrder(MetaSGD(model, 0.02), steps=2),
    "reptile": lambda model: Reptile(SGD(0.05), steps=3),
}
#: Strategies that have a state between steps, each in another place.
RESUMED = [
    pytest.param(STRATEGIES["learned-rates"], "fresh", id="learned-rates"),
    pytest.param(lambda model: FirstOrder(Adam(0.02), steps=2), "carried", id="carried"),
    pytest.param(lambda model: FirstOrder(Adam(0.01), steps=2), "shared", id="shared"),
]


class Net(nn.Module):
    """Two layers with a BatchNorm between, so that buffers count."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.norm(self.first(x))))
        return out


def mse(forward: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (forward(batch[0]) - batch[1]).square().mean()


def episodes(steps: int = STEPS) -> list[Any]:
    generator = torch.Generator().manual_seed(1)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(8, 3, generator=generator)
        return x, x.sum(1, keepdim=True).sin()

    return [(batch(), batch()) for _ in range(steps)]


def learner(make: Make, **options: Any) -> MetaLearner:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net()
    strategy = make(model)
    rates = getattr(strategy, "inner", None)
    learned = {} if rates is None else rates.hyper_parameters()
    optimizer = torch.optim.Adam([*model.parameters(), *learned.values()], lr=0.01)
    return MetaLearner(model, mse, strategy, optimizer, **options)


def looped(own: MetaLearner, every: list[Any] | None = None) -> MetaLearner:
    for train, meta in episodes() if every is None else every:
        own.step(train, meta)
    return own


def assert_same(ours: MetaLearner, theirs: MetaLearner) -> None:
    """Bit for bit: parameters, buffers, states of the outer and of the inner optimizer."""
    states = [
        {
            "model": own.model.state_dict(),
            "outer": own.optimizer.state_dict(),
            "own": own.state_dict(),
        }
        for own in (ours, theirs)
    ]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def prism_learner() -> MetaLearner:
    """PRISM's loss, which has terms, and two inner steps on different batches."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = pm.wrap(nn.Conv2d(2, 3, 1), modalities=("t1", "t2"))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    return MetaLearner(net, pm.PrismObjective(), FirstOrder(SGD(0.05), steps=2), optimizer)


def prism_episodes() -> list[Any]:
    image = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    target = (image[:, 0] > 0).long()
    train = pm.Batch(image, torch.tensor([[True, False], [False, True]]), target)
    meta = pm.Batch(image, torch.ones(2, 2).bool(), target, case_ids=("a", "b"))
    return [(pm.StepBatches([train, meta]), meta)] * 3
