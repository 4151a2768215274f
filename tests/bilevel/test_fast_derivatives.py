"""Fast derivatives as the engine uses them: the switch, small inputs, and the check against torch."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from helpers import EXACT, LR, conv, equal, meta_gradient, relative_error
from torch import nn

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


def test_fast_derivatives_have_a_switch_and_leave_small_inputs_alone() -> None:
    side = int(fast_derivatives.SMALLEST**0.5) + 1
    assert "_GroupNormBackward" in nodes(side)
    assert "_GroupNormBackward" not in nodes(side // 2)
    with pm.use_fast_derivatives(False):
        assert "_GroupNormBackward" not in nodes(side)
        with pm.use_fast_derivatives(True):
            assert "_GroupNormBackward" in nodes(side)


@pytest.mark.parametrize("graph", ["stored", "recomputed"])
def test_fast_derivatives_equal_the_oracle(graph: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = conv()
    strategy = SecondOrder(SGD(LR), 2, graph=graph)
    slow = meta_gradient(strategy, problem)
    monkeypatch.setattr(fast_derivatives, "SMALLEST", 0)
    fast = meta_gradient(strategy, problem)
    assert relative_error(fast.gradient, oracles.second_order(problem, LR, 2)) <= EXACT
    assert not equal(fast.gradient, slow.gradient)  # equal to rounding, so they did run


def test_fast_derivatives_give_way_to_a_torch_that_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        raise AttributeError("_raw_saved_self")

    side = int(fast_derivatives.SMALLEST**0.5) + 1
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
