"""First and second order (both graphs), paired with the oracles that they must equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracles
import pytest
from helpers import PROBLEMS

from prism_meta.bilevel.inner import SGD, Adam, AdamW, InnerOptimizer
from prism_meta.bilevel.strategies import FirstOrder, MetaStrategy, SecondOrder, SingleLevel

LR = 0.1
EXACT = 1e-9
ROUNDING = 1e-12


def first(inner: InnerOptimizer, steps: int = 1, **options: Any) -> MetaStrategy:
    return FirstOrder(inner, steps, **options)


def stored(inner: InnerOptimizer, steps: int = 1, **options: Any) -> MetaStrategy:
    return SecondOrder(inner, steps, graph="stored", **options)


def recomputed(inner: InnerOptimizer, steps: int = 1, **options: Any) -> MetaStrategy:
    return SecondOrder(inner, steps, graph="recomputed", **options)


#: Each strategy with the oracle that it must equal.
ORDERS = [
    pytest.param(first, oracles.first_order, id="first"),
    pytest.param(stored, oracles.second_order, id="stored"),
    pytest.param(recomputed, oracles.second_order, id="recomputed"),
]
every_order = pytest.mark.parametrize(("kind", "oracle"), ORDERS)
every_graph = pytest.mark.parametrize("kind", [stored, recomputed])
every_problem = pytest.mark.parametrize("make_problem", PROBLEMS)
#: One level, and two levels in first and second order, for tests of the outer step.
LEVELS = [
    pytest.param(SingleLevel(), id="single-level"),
    pytest.param(FirstOrder(SGD(LR), 2), id="first-order"),
    pytest.param(SecondOrder(SGD(LR), 2), id="second-order"),
]
#: Each inner optimizer with the same rule written by hand.
INNERS: list[tuple[Callable[[], InnerOptimizer], oracles.Rule]] = [
    (lambda: SGD(LR, momentum=0.9), oracles.sgd(LR, 0.9)),
    (lambda: Adam(0.05), oracles.adam(0.05)),
    (
        lambda: Adam(0.05, (0.5, 0.8), eps=1e-3, weight_decay=0.1),
        oracles.adam(0.05, 0.5, 0.8, 1e-3, l2=0.1),
    ),
    (
        lambda: AdamW(0.05, (0.5, 0.8), eps=1e-3, weight_decay=0.3),
        oracles.adam(0.05, 0.5, 0.8, 1e-3, decay=0.3),
    ),
]
Kind = Callable[..., MetaStrategy]
Oracle = Callable[..., oracles.Values]
