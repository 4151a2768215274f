"""E1: the inner steps, shared by every strategy that adapts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from prism_meta.bilevel.inner import InnerOptimizer, Params, State
from prism_meta.bilevel.strategies.base import batches_of
from prism_meta.bilevel.strategies.problem import Problem, ProblemStrategy, detached

Adapted = Callable[[str], bool]


@dataclass(frozen=True)
class Step:
    """What inner step k began with, enough to make it again; and its gradient, if it was asked for."""

    params: Params
    state: State
    batch: Any
    buffers: Params
    random: tuple[Tensor, Tensor | None]
    gradient: Params | None


@dataclass(frozen=True)
class Trajectory:
    """K inner steps.

    Args:
        fixed: the parameters that are not adapted, as leaves.
        params: phi~, of those that are.
        state: of the inner optimizer after the last step.
        buffers: the model's buffers after the last step.
        reached: names of the adapted parameters that a train batch reached.
        train_loss: L_train at phi.
        steps: one entry per step, where they were asked for.
    """

    fixed: Params
    params: Params
    state: State
    buffers: Params
    train_loss: Tensor
    reached: set[str]
    steps: list[Step] = field(default_factory=list)


class Adapting(ProblemStrategy):
    """Base of the strategies that take inner steps.

    Args:
        inner: the differentiable optimizer U of E1.
        steps: K, the number of inner steps, at least 1.
        adapt: says by a parameter's name whether inner steps move it; the others are learned by the
            outer step alone. All are adapted unless given.

    Raises:
        ValueError: ``steps`` is less than 1; later, no parameter of the model is adapted.
    """

    def __init__(
        self, inner: InnerOptimizer, steps: int = 1, *, adapt: Adapted | None = None
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps: got {steps}, expected at least 1 inner step")
        self.inner, self.steps, self.adapt = inner, steps, adapt

    def split(self, phi: Params) -> tuple[Params, Params]:
        """The adapted and the fixed parameters."""
        chosen = {n: p for n, p in phi.items() if self.adapt is None or self.adapt(n)}
        if not chosen:
            raise ValueError(
                f"adapt: is False for every parameter; the model's are {', '.join(phi)}"
            )
        return chosen, {n: p for n, p in phi.items() if n not in chosen}

    def unroll(self, problem: Problem, phi: Params, train: Any, state: State | None) -> Trajectory:
        """Inner steps as one differentiable function of ``phi``: the graph of every step is kept."""
        params, fixed = self.split(phi)
        state = self.inner.init(detached(params)) if state is None else state
        buffers, losses = problem.buffers(), []
        batches, reached = batches_of(train), set[str]()
        for k in range(self.steps):
            value = problem.evaluate({**fixed, **params}, batches[k % len(batches)], buffers)
            grads = problem.reached_gradient(value.loss, params, at=value.at, create_graph=True)
            reached |= grads.keys()
            params, state = self.update(grads, state, params)
            buffers = value.buffers
            losses.append(value.loss)
        return Trajectory(fixed, params, state, buffers, losses[0], reached)

    def walk(
        self,
        problem: Problem,
        train: Any,
        state: State | None,
        *,
        record: Literal["nothing", "steps", "gradients", "updates"] = "nothing",
        penalty: Callable[[Params], Params] | None = None,
    ) -> Trajectory:
        """Inner steps with no graph but that of the learned hyper-parameters.

        ``record`` keeps what each step began with, and its gradient; with ``updates`` these are leaves,
        and phi~ has a graph down to them. ``penalty`` is added to each gradient.
        """
        params, fixed = self.split(detached(problem.trainable))
        state = self.inner.init(params) if state is None else state
        follows = record == "updates" or (
            bool(self.inner.hyper_parameters()) and record == "nothing"
        )
        buffers, losses, steps = problem.buffers(), [], []
        batches, reached = batches_of(train), set[str]()
        for k in range(self.steps):
            batch = batches[k % len(batches)]
            random = problem.random_state()
            leaves = detached(params, requires_grad=True)
            value = problem.evaluate({**fixed, **leaves}, batch, buffers)
            grads = problem.reached_gradient(value.loss, leaves, at=value.at)
            reached |= grads.keys()
            if record == "updates":
                grads = detached(grads, requires_grad=True)
            if record != "nothing":
                kept = None if record == "steps" else grads
                steps.append(Step(params, state, batch, buffers, random, kept))
            if penalty is not None:
                extra = penalty(params)
                grads = {n: g + extra[n] for n, g in grads.items()}
            with torch.set_grad_enabled(follows):
                params, state = self.update(grads, state, params)
            buffers = value.buffers
            losses.append(value.loss.detach())
        return Trajectory(fixed, params, state, buffers, losses[0], reached, steps)

    def update(self, grads: Params, state: State, params: Params) -> tuple[Params, State]:
        """One step of the inner optimizer on the parameters that have a gradient."""
        moved, new_state = self.inner.update(
            grads, {n: state[n] for n in grads}, {n: params[n] for n in grads}
        )
        return {**params, **moved}, {**state, **new_state}

    def refuse_learned(self) -> None:
        """For strategies that give hyper-parameters no gradient."""
        if self.inner.hyper_parameters():
            raise ValueError(
                f"inner: {type(self).__name__} gives the hyper-parameters "
                f"{', '.join(self.inner.hyper_parameters())} no gradient; use FirstOrder or SecondOrder, "
                "or requires_grad_(False) on the inner optimizer"
            )


def detached_state(state: State) -> State:
    """The same state, without its graph."""
    return {name: detached(values) for name, values in state.items()}
