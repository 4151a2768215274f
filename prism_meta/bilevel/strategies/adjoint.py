"""Back through recorded inner steps: the adjoint of E1, one step at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from prism_meta.bilevel.functional.model import FunctionalModel
from prism_meta.bilevel.functional.recompute import ReplayCheck
from prism_meta.bilevel.functional.trees import (
    Params,
    State,
    add,
    filled,
    leaves,
    present,
    vjp,
    zeros,
)
from prism_meta.bilevel.strategies.base import MetaGradient, StepBatches, pack
from prism_meta.bilevel.strategies.inner_loop import AdaptingStrategy, InnerStep


class Cotangent(NamedTuple):
    """d L_meta with respect to what an inner step starts from; None stands for 0.

    Args:
        params: of the adapted parameters, lambda_k.
        state: of the inner optimizer's state.
        fixed: of the parameters that are not adapted, summed over the later steps.
        hyper: of the inner optimizer's learned hyper-parameters, summed over the steps.
        weights: of the objective's learned weights, summed over the steps.
    """

    params: Any
    state: Any
    fixed: Any
    hyper: Any
    weights: Any


class Curvature(NamedTuple):
    """The derivatives of <grad L_train, v> for one v; None where they are 0.

    Args:
        params: H v, one entry per adapted parameter.
        fixed: the mixed derivative for each parameter that is not adapted.
        weights: the mixed derivative for each learned weight of the objective (E12).
    """

    params: Any
    fixed: Any
    weights: Any


class Linearization(NamedTuple):
    """An inner step at which the curvature of L_train can be asked for.

    Args:
        gradient: grad L_train at phi_k.
        curvature: from v, with the gradient's entries, to the curvature along it.
        diagnostics: scalars that say how accurate it is, valid after ``curvature`` was called.
    """

    gradient: Params
    curvature: Callable[[Params], Curvature]
    diagnostics: dict[str, Tensor]


def back(
    strategy: AdaptingStrategy, step: InnerStep, at: Linearization, cotangent: Cotangent
) -> Cotangent:
    """The cotangent before an inner step from that after it.

    lambda_k follows from lambda_{k+1} by the derivative of U(g_k, s_k, phi_k): directly, and through
    g_k by the curvature of L_train at phi_k. The state of the inner optimizer has a cotangent too.
    """
    params, gradient, state = leaves(step.params), leaves(at.gradient), leaves(step.state)
    hyper = dict(strategy.inner.hyper_parameters())
    after = strategy.update(gradient, state, params)
    by_params, by_gradient, by_state, by_hyper = vjp(
        after, (cotangent.params, cotangent.state), (params, gradient, state, hyper)
    )
    curved = at.curvature(filled(by_gradient, gradient))
    return Cotangent(
        add(by_params, curved.params),
        by_state,
        add(cotangent.fixed, curved.fixed),
        add(cotangent.hyper, by_hyper),
        add(cotangent.weights, curved.weights),
    )


class AdjointStrategy(AdaptingStrategy):
    """Base of the strategies that go back through the inner steps, with one step's graph at a time.

    The cotangent starts as grad L_meta(phi~). A sub-class says how the curvature is computed.
    """

    def records(self, model: FunctionalModel) -> bool:
        """Whether the inner steps have to be gone back through."""
        return True

    def recorded(self, step: InnerStep) -> InnerStep:
        """What is kept of a step until the adjoint comes back to it."""
        return step

    @abstractmethod
    def linearize(
        self, model: FunctionalModel, step: InnerStep, fixed: Params, check: ReplayCheck
    ) -> Linearization:
        """The gradient and the curvature of L_train at a recorded step."""

    def total(self, at_adapted: Params, cotangent: Cotangent) -> Params:
        """G, from grad L_meta at phi~ and the cotangent of phi."""
        return {**present(cotangent.fixed), **present(cotangent.params)}

    def solve(
        self, model: FunctionalModel, train: StepBatches, meta: Any, state: State | None
    ) -> MetaGradient:
        steps: list[InnerStep] = []

        def record(step: InnerStep) -> None:
            steps.append(self.recorded(step))

        inner = self.adapt_detached(
            model, train, state, on_step=record if self.records(model) else None
        )
        adapted = leaves(inner.everything)
        value = model.evaluate_meta(adapted, meta)
        gradient = value.gradient(adapted)
        cotangent = Cotangent(
            params={n: gradient.get(n) for n in inner.params},
            state=zeros(inner.state),
            fixed={n: gradient.get(n) for n in inner.fixed},
            hyper=zeros(dict(self.inner.hyper_parameters())),
            weights=zeros(model.weights),
        )
        check, diagnostics = ReplayCheck(), dict[str, Tensor]()
        while steps:
            step = steps.pop()  # its memory is free once the adjoint has passed it
            at = self.linearize(model, step, inner.fixed, check)
            cotangent = back(self, step, at, cotangent)
            for name, error in at.diagnostics.items():
                diagnostics[name] = error.maximum(diagnostics.get(name, error))
            del at
        check.finish()
        return pack(
            model,
            inner,
            value,
            self.total(gradient, cotangent),
            hyper_gradient=filled(cotangent.hyper, self.inner.hyper_parameters()),
            weight_gradient=filled(cotangent.weights, model.weights),
            diagnostics=diagnostics,
        )
