"""A strategy that prism-meta does not have, registered by one line; a plugin for pytest (``-p``)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import prism_meta as pm
from prism_meta.bilevel.functional.model import FunctionalModel
from prism_meta.bilevel.functional.trees import State
from prism_meta.bilevel.strategies import FirstOrder, GraphSizes, SecondOrder
from prism_meta.bilevel.strategies.inner_loop import AdaptingStrategy


@pm.register_strategy
class Halfway(AdaptingStrategy):
    """The mean of E3 and E4."""

    name = "halfway"
    units = "6"
    equation = "(E3 + E4) / 2"

    @classmethod
    def memory(cls, sizes: GraphSizes, steps: int) -> dict[str, int]:
        return {cls.__name__: SecondOrder.memory(sizes, steps)["SecondOrder(graph='recomputed')"]}

    def solve(
        self, model: FunctionalModel, train: pm.StepBatches, meta: Any, state: State | None
    ) -> pm.MetaGradient:
        first, second = (
            kind.solve(model, train, meta, state)
            for kind in (
                FirstOrder(self.inner, self.steps, adapt=self.adapt),
                SecondOrder(self.inner, self.steps, adapt=self.adapt, graph="recomputed"),
            )
        )
        halves = pm.MetaGradient.mean([first, second])
        return replace(second, gradient=halves.gradient, weight_gradient=halves.weight_gradient)


def pytest_configure() -> None:
    """Its oracle, which only a strategy with an equation of its own needs."""
    import oracles
    from variants import ORACLES

    def halfway(problem: Any, strategy: Any, result: pm.MetaGradient) -> oracles.Values:
        first, second = (ORACLES[e](problem, strategy, result) for e in ("E3", "E4"))
        return {n: (g + second[n]) / 2 for n, g in first.items()}

    ORACLES["(E3 + E4) / 2"] = halfway
