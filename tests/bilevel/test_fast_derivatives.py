"""Fast derivatives as the engine uses them: the switch, small inputs, and the check against torch."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from helpers import EXACT, LR, conv, equal, meta_gradient, relative_error
from torch import nn
from torch.nn import functional as F  # noqa: N812, torch's own convention

import prism_meta as pm
from prism_meta.bilevel.functional import fast_derivatives
from prism_meta.bilevel.functional.checks import graph_nodes
from prism_meta.bilevel.functional.model import FunctionalModel
from prism_meta.bilevel.inner import SGD
from prism_meta.bilevel.strategies import SecondOrder


def normalised() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.LeakyReLU(), nn.Conv2d(8, 1, 3)
    )


def nodes(size: int) -> set[str]:
    model = FunctionalModel(normalised(), lambda forward, x: forward(x).square().mean())
    value = model.evaluate(model.leaves(), torch.randn(1, 1, size, size))
    return {node.name() for node in graph_nodes(value.loss)}


#: A slice with as many values as a net with group normalisation needs.
SIDE = int((fast_derivatives.SMALLEST[F.group_norm] / 2) ** 0.5) + 1


def test_fast_derivatives_have_a_switch_and_leave_small_images_to_torch() -> None:
    side = SIDE
    assert "_GroupNormBackward" in nodes(side)
    assert "_GroupNormBackward" not in nodes(side // 2)
    with pm.use_fast_derivatives(False):
        assert "_GroupNormBackward" not in nodes(side)
        with pm.use_fast_derivatives(True):
            assert "_GroupNormBackward" in nodes(side)


def test_instance_normalisation_gains_from_smaller_images() -> None:
    least = fast_derivatives.least_arguments
    assert least(normalised().modules()) == fast_derivatives.SMALLEST[F.group_norm] // 2
    net = nn.Sequential(normalised(), nn.InstanceNorm3d(2))
    assert least(net.modules()) == fast_derivatives.SMALLEST[F.instance_norm]


@pytest.mark.parametrize(
    "layer",
    [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.LeakyReLU()],
    ids=lambda m: type(m).__name__,
)
def test_each_operation_has_a_smallest_size(layer: nn.Module) -> None:
    func = {nn.GroupNorm: F.group_norm, nn.InstanceNorm2d: F.instance_norm}
    smallest = fast_derivatives.SMALLEST[func.get(type(layer), F.leaky_relu)]

    def saves(size: int) -> object:
        x = torch.randn(1, 4, size // 4, 1, requires_grad=True)
        with fast_derivatives.fast_derivatives(torch.empty(smallest)):
            y = layer(x * 1)
        node = y.grad_fn
        return node.name() if not isinstance(layer, nn.LeakyReLU) else _saves_output(node, y)

    assert saves(smallest) != saves(smallest - 4)


def _saves_output(node: Any, output: torch.Tensor) -> bool:
    return bool(node._saved_self.data_ptr() == output.data_ptr())


@pytest.mark.parametrize("graph", ["stored", "recomputed"])
def test_fast_derivatives_equal_the_oracle(graph: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = conv()
    strategy = SecondOrder(SGD(LR), 2, graph=graph)
    slow = meta_gradient(strategy, problem)
    monkeypatch.setattr(fast_derivatives, "SMALLEST", dict.fromkeys(fast_derivatives.SMALLEST, 0))
    fast = meta_gradient(strategy, problem)
    assert relative_error(fast.gradient, oracles.second_order(problem, LR, 2)) <= EXACT
    assert not equal(fast.gradient, slow.gradient)  # equal to rounding, so they did run


def test_fast_derivatives_give_way_to_a_torch_that_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        raise AttributeError("_raw_saved_self")

    side = SIDE
    fast_derivatives._agrees_with_torch.cache_clear()
    monkeypatch.setattr(fast_derivatives.SavedOutputs, "add", wrong)
    try:
        with pytest.warns(
            UserWarning, match=r"^fast derivatives are switched off: .*_raw_saved_self"
        ):
            assert "_GroupNormBackward" not in nodes(side)
        assert "_GroupNormBackward" not in nodes(side)  # without a second warning
    finally:
        fast_derivatives._agrees_with_torch.cache_clear()
