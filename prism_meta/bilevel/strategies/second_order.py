"""E4, exact: the gradient through the inner steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from prism_meta.bilevel.functional.model import FunctionalModel
from prism_meta.bilevel.functional.recompute import ReplayCheck
from prism_meta.bilevel.functional.trees import Params, State, filled, leaves, present
from prism_meta.bilevel.inner import InnerOptimizer
from prism_meta.bilevel.strategies.adjoint import AdjointStrategy, Curvature, Linearization
from prism_meta.bilevel.strategies.base import GraphSizes, MetaGradient, StepBatches, pack
from prism_meta.bilevel.strategies.inner_loop import InnerStep, ParameterFilter

Graph = Literal["auto", "stored", "recomputed"]


class SecondOrder(AdjointStrategy):
    """E4: the exact gradient of L_meta(phi~(phi)), through the inner steps.

    For one SGD step G = (I - eta_in H_train(phi)) grad L_meta(phi~). All operations need a second
    derivative. Attention and recurrent layers run kernels that have one; ``preflight`` names the
    modules of a model that have none.

    Args:
        inner: the inner optimizer, e.g. ``SGD(0.05)``.
        steps: K, the number of inner steps.
        adapt: predicate on parameter names: which parameters the inner steps move. Defaults to all.
        graph: ``stored`` keeps the graphs of all steps: 4 units of time at K = 1, and memory grows with
            K. ``recomputed`` keeps the parameters and the optimizer's state of each step and rebuilds
            one step at a time: about a third more time at large K, memory of one graph and a copy of
            the parameters per step. Both give the same numbers to rounding, dropout included.
            ``auto``, the default, stores the graph of a single step and recomputes more.

    Raises:
        ValueError: ``steps`` or ``graph`` is out of range.
        ReplayError: later, a recomputed step gives another loss than the step that was taken.

    Source: MAML, Finn et al., ICML 2017; the adjoint of an unrolled optimizer as in Maclaurin et al.,
    ICML 2015, with saved instead of reversed steps.

    Example:
        >>> import torch
        >>> from prism_meta.bilevel.inner import SGD
        >>> from torch import nn
        >>> model = nn.Linear(1, 1, bias=False)
        >>> mse = lambda forward, batch: (forward(batch[0]) - batch[1]).square().mean()
        >>> batch = (torch.ones(1, 1), torch.zeros(1, 1))
        >>> result = SecondOrder(SGD(0.25)).meta_gradient(model, mse, batch, batch)
        >>> bool(torch.allclose(result.gradient["weight"], model.weight / 2))  # d/dw (w / 2)^2
        True
    """

    name = "second_order"
    units = "4"
    equation = "E4"

    @property
    def evaluations(self) -> int:
        return 3 * self.steps + 1

    @classmethod
    def memory(cls, sizes: GraphSizes, steps: int) -> dict[str, int]:
        both = sizes.forward + sizes.backward
        return {
            f"{cls.__name__}(graph='stored')": steps * (both + 2 * sizes.params) + sizes.forward,
            f"{cls.__name__}(graph='recomputed')": both + (steps + 3) * sizes.params,
        }

    def __init__(
        self,
        inner: InnerOptimizer,
        steps: int = 1,
        *,
        adapt: ParameterFilter | None = None,
        graph: Graph = "auto",
    ) -> None:
        super().__init__(inner, steps, adapt=adapt)
        if graph not in ("auto", "stored", "recomputed"):
            raise ValueError(f"graph: got {graph!r}, expected 'auto', 'stored' or 'recomputed'")
        self.graph = graph

    @property
    def stores(self) -> bool:
        """Whether the graphs of all inner steps are kept."""
        return self.graph == "stored" or (self.graph == "auto" and self.steps == 1)

    def solve(
        self, model: FunctionalModel, train: StepBatches, meta: Any, state: State | None
    ) -> MetaGradient:
        if not self.stores:
            return super().solve(model, train, meta, state)
        phi, hyper = model.leaves(), dict(self.inner.hyper_parameters())
        inner = self.adapt_unrolled(model, phi, train, state)
        value = model.evaluate_meta(inner.everything, meta)
        one = value.loss.new_ones(())
        gradient, by_hyper, by_weights = value.vjp(value.loss, one, (phi, hyper, model.weights))
        return pack(
            model,
            inner,
            value,
            present(gradient),
            hyper_gradient=filled(by_hyper, hyper),
            weight_gradient=filled(by_weights, model.weights),
        )

    def recorded(self, step: InnerStep) -> InnerStep:
        return replace(step, gradient={})  # it is computed again

    def linearize(
        self, model: FunctionalModel, step: InnerStep, fixed: Params, check: ReplayCheck
    ) -> Linearization:
        params, others = leaves(step.params), leaves(fixed)
        with step.random.replayed():
            value = model.evaluate({**others, **params}, step.batch, step.buffers, twice=True)
        check.add(step.loss, value.loss)
        gradient = value.gradient(params, create_graph=True)

        def curvature(vector: Params) -> Curvature:
            return Curvature(*value.vjp(gradient, vector, (params, others, model.weights)))

        return Linearization(gradient, curvature, {})
