"""E1: the inner loop, shared by every strategy that adapts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from prism_meta.bilevel.functional.model import FunctionalModel
from prism_meta.bilevel.functional.recompute import RandomState
from prism_meta.bilevel.functional.trees import Params, State, detached, leaves
from prism_meta.bilevel.inner import InnerOptimizer
from prism_meta.bilevel.strategies.base import Adaptation, FunctionalStrategy, StepBatches

#: Predicate on parameter names.
ParameterFilter = Callable[[str], bool]


@dataclass(frozen=True)
class InnerStep:
    """Inner step k: the inputs needed to replay it, and what it computed.

    Args:
        params: of the adapted parameters, phi_k.
        state: of the inner optimizer before the step.
        batch: D_train of this step.
        buffers: of the model before the step.
        random: the states of the generators before the step.
        loss: L_train at phi_k.
        gradient: grad L_train at phi_k, without entries for unused parameters.
    """

    params: Params
    state: State
    batch: Any
    buffers: Params
    random: RandomState
    loss: Tensor
    gradient: Params


class AdaptingStrategy(FunctionalStrategy):
    """Base of the strategies that take inner steps.

    Args:
        inner: the differentiable optimizer U of E1.
        steps: K, the number of inner steps, at least 1.
        adapt: predicate on parameter names: which parameters the inner steps move. The others are
            learned only by the outer step. Defaults to all parameters.

    Raises:
        ValueError: ``steps`` is less than 1, or ``inner`` has learned hyper-parameters for which this
            strategy has no gradient; later, no parameter of the model is adapted.
    """

    #: Whether learned hyper-parameters of the inner optimizer get a gradient.
    learns_hyper_parameters: ClassVar[bool] = True

    def __init__(
        self, inner: InnerOptimizer, steps: int = 1, *, adapt: ParameterFilter | None = None
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps: got {steps}, expected at least 1 inner step")
        if inner.hyper_parameters() and not self.learns_hyper_parameters:
            raise ValueError(
                f"inner: {type(self).__name__} gives the hyper-parameters "
                f"{', '.join(inner.hyper_parameters())} no gradient; use FirstOrder or SecondOrder, "
                "or requires_grad_(False) on the inner optimizer"
            )
        self.inner, self.steps, self.adapt = inner, steps, adapt

    @property
    def evaluations(self) -> int:
        return self.steps + 1

    def split(self, phi: Params) -> tuple[Params, Params]:
        """The adapted and the fixed parameters."""
        chosen = {n: p for n, p in phi.items() if self.adapt is None or self.adapt(n)}
        if not chosen:
            raise ValueError(
                f"adapt: is False for every parameter; the model's are {', '.join(phi)}"
            )
        return chosen, {n: p for n, p in phi.items() if n not in chosen}

    def adapt_unrolled(
        self, model: FunctionalModel, phi: Params, train: StepBatches, state: State | None
    ) -> Adaptation:
        """Inner steps as a differentiable function of ``phi``: the graphs of all steps are kept."""
        params, fixed = self.split(phi)
        state = self.inner.init(detached(params)) if state is None else state
        buffers, train_loss, used = model.buffers(), None, set[str]()
        for k in range(self.steps):
            value = model.evaluate({**fixed, **params}, train.of_step(k), buffers, twice=True)
            gradient = value.gradient(params, create_graph=True)
            params, state = self.update(gradient, state, params)
            buffers, used = value.buffers, used | gradient.keys()
            train_loss = value.loss if train_loss is None else train_loss
        assert train_loss is not None  # there is a step
        return Adaptation(fixed, params, buffers, train_loss, used, state)

    def adapt_detached(
        self,
        model: FunctionalModel,
        train: StepBatches,
        state: State | None,
        *,
        on_step: Callable[[InnerStep], None] | None = None,
        penalty: Callable[[Params], Params] | None = None,
        weights: Sequence[float] | None = None,
    ) -> Adaptation:
        """Inner steps without a graph: each starts at constants.

        Args:
            model: starts at its own parameters.
            train: D_train.
            state: of the inner optimizer. Defaults to a fresh one.
            on_step: called with each step, to record what is needed of it.
            penalty: a gradient at phi_k that is added to that of L_train.
            weights: factor of the gradient of each step. Defaults to 1.
        """
        params, fixed = self.split(detached(model.trainable))
        state = self.inner.init(params) if state is None else state
        buffers, train_loss, used = model.buffers(), None, set[str]()
        for k in range(self.steps):
            batch, here = train.of_step(k), leaves(params)
            random = None if on_step is None else model.random_state()
            value = model.evaluate({**fixed, **here}, batch, buffers)
            gradient = value.gradient(here)
            if on_step is not None and random is not None:
                loss = value.loss.detach()
                on_step(InnerStep(params, state, batch, buffers, random, loss, gradient))
            if penalty is not None:
                extra = penalty(params)
                gradient = {n: g + extra[n] for n, g in gradient.items()}
            if weights is not None:
                gradient = {n: weights[k] * g for n, g in gradient.items()}
            with torch.no_grad():
                params, state = self.update(gradient, state, params)
            buffers, used = value.buffers, used | gradient.keys()
            train_loss = value.loss.detach() if train_loss is None else train_loss
        assert train_loss is not None  # there is a step
        return Adaptation(fixed, params, buffers, train_loss, used, state)

    def update(self, gradient: Params, state: State, params: Params) -> tuple[Params, State]:
        """One step of the inner optimizer; parameters without a gradient stay as they are."""
        moved, new_state = self.inner.update(
            gradient, {n: state[n] for n in gradient}, {n: params[n] for n in gradient}
        )
        return {**params, **moved}, {**state, **new_state}
