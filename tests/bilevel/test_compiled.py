"""A model that torch.compile made: the same numbers, or an error that says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prism_meta as pm
from prism_meta.bilevel.strategies import SecondDerivativeError


def episode(backend: str | None, strategy: pm.MetaStrategy) -> dict[str, Tensor]:
    """The meta-gradient of a net with normalisations and activations, compiled if there is a backend."""
    torch.manual_seed(0)
    net: Any = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.GroupNorm(2, 4),
        nn.LeakyReLU(),
        nn.Conv2d(4, 2, 3, bias=False),  # a bias would have gradient 0
        nn.InstanceNorm2d(2),
    ).double()
    if backend is not None:
        torch._dynamo.reset()
        net = torch.compile(net, backend=backend)

    def objective(forward: Any, image: Tensor) -> Tensor:
        return (forward(image) - image[:, :, 2:-2, 2:-2]).square().mean()

    train, meta = torch.randn(2, 2, 1, 8, 8, dtype=torch.float64)
    result = strategy.meta_gradient(net, objective, train, meta)
    return {name.removeprefix("_orig_mod."): g for name, g in result.gradient.items()}


@pytest.mark.parametrize(
    ("backend", "strategy"),
    [
        ("aot_eager", pm.FirstOrder(pm.SGD(0.1), 2)),
        ("eager", pm.FirstOrder(pm.SGD(0.1), 2)),
        ("eager", pm.SecondOrder(pm.SGD(0.1))),
        ("eager", pm.SecondOrder(pm.SGD(0.1), 3)),
    ],
)
def test_the_same_numbers(backend: str, strategy: pm.MetaStrategy) -> None:
    ours, own = episode(backend, strategy), episode(None, strategy)
    for name, exact in own.items():
        assert (ours[name] - exact).norm() < 1e-12 * exact.norm()


@pytest.mark.parametrize("steps", [1, 3])
def test_no_second_derivative(steps: int) -> None:
    with pytest.raises(SecondDerivativeError) as caught:
        episode("aot_eager", pm.SecondOrder(pm.SGD(0.1), steps))
    assert str(caught.value) == (
        "the output of torch.compile has no second derivative; pass the module that torch.compile was "
        "given, or use FiniteDifference or FirstOrder, which need none"
    )
