"""Every strategy of the registry in every way to use it, and the oracle of its gradient.

A new strategy that is registered gets the whole common suite. It needs an entry in ``ORACLES`` only if its
``equation`` is a new one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracles
import pytest
from helpers import EXACT, LR, SMOOTH, Problem, trainable

from prism_meta.bilevel.inner import SGD
from prism_meta.bilevel.strategies import (
    ALL_STRATEGIES,
    FiniteDifference,
    ImplicitMAML,
    MetaGradient,
    MetaStrategy,
    SecondOrder,
)

#: What each ``equation`` says, from the problem, the strategy and its result.
ORACLES: dict[str, Callable[[Problem, Any, MetaGradient], oracles.Values]] = {
    "grad L_train": lambda problem, strategy, result: oracles.gradient(
        problem, trainable(problem.model), problem.train
    ),
    "grad (L_train + L_meta) / 2": lambda problem, strategy, result: {
        n: (g + by_meta) / 2
        for (n, g), by_meta in zip(
            oracles.gradient(problem, trainable(problem.model), problem.train).items(),
            oracles.gradient(problem, trainable(problem.model), problem.meta).values(),
            strict=True,
        )
    },
    "E3": lambda problem, strategy, result: oracles.first_order(problem, LR, strategy.steps),
    "E4": lambda problem, strategy, result: oracles.second_order(problem, LR, strategy.steps),
    "phi - phi~": lambda problem, strategy, result: {
        n: p - oracles.adapted_parameters(problem, LR, strategy.steps)[n]
        for n, p in trainable(problem.model).items()
    },
    "implicit": lambda problem, strategy, result: oracles.implicit(
        problem, result.adapted, strategy.proximal
    ),
}
#: Options under which a strategy is exact, or all of them if there are several ways.
WAYS: dict[type[MetaStrategy], list[dict[str, Any]]] = {
    SecondOrder: [{"graph": "stored"}, {"graph": "recomputed"}],
    FiniteDifference: [{"radius": SMOOTH}],
    ImplicitMAML: [{"proximal": 20.0, "cg_steps": 20}],
}
#: Relative errors of the gradient; those that are not listed are exact. See test_finite_difference.
BOUNDS: dict[type[MetaStrategy], float] = {FiniteDifference: 1e-7}
ADAPTING = [kind for kind in ALL_STRATEGIES if kind.adapts]


def make(kind: type[MetaStrategy], steps: int = 1, **options: Any) -> MetaStrategy:
    """Any strategy: those that adapt take an inner optimizer and a number of steps."""
    if not kind.adapts:
        return kind()
    return kind(**{"inner": SGD(LR), "steps": steps, **options})


def bound(strategy: MetaStrategy) -> float:
    """The relative error that its gradient may have."""
    return BOUNDS.get(type(strategy), EXACT)


VARIANTS = [
    pytest.param(
        make(kind, steps, **options),
        id="-".join([kind.__name__, *map(str, options.values()), str(steps)]),
    )
    for kind in ALL_STRATEGIES
    for options in WAYS.get(kind, [{}])
    for steps in ((1, 2, 3) if kind.adapts else (1,))
]
every_variant = pytest.mark.parametrize("strategy", VARIANTS)
every_kind = pytest.mark.parametrize("kind", ALL_STRATEGIES)
every_adapting = pytest.mark.parametrize("kind", ADAPTING)
