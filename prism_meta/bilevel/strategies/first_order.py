"""Strategies that need only first derivatives: one level, and E3."""

from __future__ import annotations

from typing import Any

import torch

from prism_meta.bilevel.functional.forward_mode import mixed_derivative
from prism_meta.bilevel.functional.model import FunctionalModel
from prism_meta.bilevel.functional.recompute import ReplayCheck
from prism_meta.bilevel.functional.trees import Params, State, zeros
from prism_meta.bilevel.strategies.adjoint import (
    AdjointStrategy,
    Cotangent,
    Curvature,
    Linearization,
)
from prism_meta.bilevel.strategies.base import (
    Adaptation,
    FunctionalStrategy,
    GraphSizes,
    MetaGradient,
    StepBatches,
    pack,
)
from prism_meta.bilevel.strategies.inner_loop import InnerStep


class SingleLevel(FunctionalStrategy):
    """One level: the gradient of L_train at phi, which is also phi~. The meta batch is only measured.

    Use it as the baseline. ``meta_loss`` is evaluated without a gradient, so that the curves of all
    strategies can be compared. A control that sees as many cases as a meta-learner does takes a train
    batch of twice the size. It uses the first of several ``StepBatches``.

    Example:
        >>> from torch import nn
        >>> model = nn.Linear(1, 1, bias=False)
        >>> mse = lambda forward, batch: (forward(batch[0]) - batch[1]).square().mean()
        >>> batch = (torch.ones(1, 1), torch.zeros(1, 1))
        >>> result = SingleLevel().meta_gradient(model, mse, batch, batch)
        >>> bool(torch.allclose(result.gradient["weight"], 2 * model.weight))
        True
    """

    name = "single_level"
    units = "1 1/3"
    equation = "grad L_train"
    adapts = False
    has_meta_gradient = False
    learns_from_meta = False

    @classmethod
    def memory(cls, sizes: GraphSizes, steps: int) -> dict[str, int]:
        return {cls.__name__: sizes.forward + sizes.params}

    def solve(
        self, model: FunctionalModel, train: StepBatches, meta: Any, state: State | None
    ) -> MetaGradient:
        phi = model.leaves()
        value = model.evaluate(phi, train.of_step(0))
        gradient = value.gradient(phi)
        with torch.no_grad():
            measured = model.evaluate_meta(phi, meta)
        inner = Adaptation({}, phi, value.buffers, value.loss, gradient)
        # The model learns from the train batch, so the outer step takes its buffers from there.
        return pack(model, inner, measured, gradient, buffers=value.buffers)


class FirstOrder(AdjointStrategy):
    """E3: the gradient of L_meta at phi~, with phi~ taken as a constant.

    The cheapest second level: two units of time at K = 1, and no second derivative is needed. It ignores
    how phi~ depends on phi, an error of order eta_in. Learned hyper-parameters of the inner optimizer and
    learned weights of the objective (E12, by one forward-mode pass per inner step) do get their gradient.
    It takes the inner gradients as constants of phi, which is exact at K = 1.

    Args:
        inner: the inner optimizer, e.g. ``SGD(0.05)``.
        steps: K, the number of inner steps.
        adapt: predicate on parameter names: which parameters the inner steps move. Defaults to all.

    Source: FOMAML, Finn et al., ICML 2017; Nichol et al., 2018.

    Example:
        >>> from prism_meta.bilevel.inner import SGD
        >>> from torch import nn
        >>> model = nn.Linear(1, 1, bias=False)
        >>> mse = lambda forward, batch: (forward(batch[0]) - batch[1]).square().mean()
        >>> batch = (torch.ones(1, 1), torch.zeros(1, 1))
        >>> result = FirstOrder(SGD(0.25)).meta_gradient(model, mse, batch, batch)
        >>> bool(torch.allclose(result.gradient["weight"], model.weight))  # 2 * (w / 2)
        True
    """

    name = "first_order"
    units = "2"
    equation = "E3"

    @classmethod
    def memory(cls, sizes: GraphSizes, steps: int) -> dict[str, int]:
        return {cls.__name__: sizes.forward + 3 * sizes.params}

    def records(self, model: FunctionalModel) -> bool:
        return bool(self.inner.hyper_parameters() or model.weights)

    def total(self, at_adapted: Params, cotangent: Cotangent) -> Params:
        return at_adapted

    def linearize(
        self, model: FunctionalModel, step: InnerStep, fixed: Params, check: ReplayCheck
    ) -> Linearization:
        def curvature(vector: Params) -> Curvature:
            by_weights: Any = zeros(model.weights)
            if model.weights:
                with step.random.replayed():
                    by_weights, loss = mixed_derivative(
                        model, {**fixed, **step.params}, vector, step.batch, step.buffers
                    )
                check.add(step.loss, loss)
            return Curvature(zeros(step.params), zeros(fixed), by_weights)

        return Linearization(step.gradient, curvature, {})
