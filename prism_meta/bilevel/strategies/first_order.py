"""Strategies that need first derivatives alone: one level, E3, and Reptile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler

from prism_meta.bilevel.inner import InnerOptimizer, Params, State
from prism_meta.bilevel.strategies.adapting import Adapted, Adapting, Trajectory, detached_state
from prism_meta.bilevel.strategies.base import GraphSizes, MetaGradient, batches_of
from prism_meta.bilevel.strategies.problem import (
    NOWHERE,
    Problem,
    ProblemStrategy,
    detached,
    filled,
)


class SingleLevel(ProblemStrategy):
    """One level: the gradient of L_train at phi, which is also phi~; the meta batch is only looked at.

    Use it as the baseline. ``meta_loss`` is evaluated without a gradient, so that curves of all
    strategies can be laid side by side. For the control that sees as many cases as a meta-learner
    does, give it a train batch of twice the size. Of a list of train batches it takes the first.

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
    equation = "grad L_train at phi"
    adapts = False
    has_meta_gradient = False

    @classmethod
    def memory(cls, sizes: GraphSizes, steps: int) -> dict[str, int]:
        return {cls.__name__: sizes.forward + sizes.params}

    def solve(self, problem: Problem, train: Any, meta: Any, state: State | None) -> MetaGradient:
        phi = problem.leaves()
        value = problem.evaluate(phi, batches_of(train)[0])
        gradient = problem.reached_gradient(value.loss, phi, at=value.at)
        with torch.no_grad():
            meta_value = problem.evaluate_meta(phi, meta)
        return problem.result(
            gradient=gradient,
            reached=gradient,
            adapted=phi,
            train_loss=value.loss,
            meta=meta_value,
            # The model learnt from the train batch, so these are the buffers of the outer step.
            buffers=value.buffers,
            inner_buffers=value.buffers,
        )


class FirstOrder(Adapting):
    """E3: the gradient of L_meta at phi~, with phi~ taken as a constant.

    Use it first: two units per step at K = 1, and no second derivative is needed. It ignores how
    phi~ depends on phi, an error of order eta_in. Learned hyper-parameters, and the objective's learned
    weights (E12, by one forward-mode pass per inner step), get their gradient with the inner gradients
    taken as constants of phi, which at K = 1 is exact.

    Args:
        inner: the inner optimizer, e.g. ``SGD(0.05)``.
        steps: K, the number of inner steps.
        adapt: says by name which parameters inner steps move; all unless given.

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

    learns_objective = True

    def solve(self, problem: Problem, train: Any, meta: Any, state: State | None) -> MetaGradient:
        record: Literal["updates", "nothing"] = "updates" if problem.learned else "nothing"
        inner = self.walk(problem, train, state, record=record)
        leaves = detached({**inner.fixed, **inner.params}, requires_grad=True)
        value = problem.evaluate_meta(leaves, meta)
        gradient = problem.reached_gradient(value.loss, leaves, at=value.at)
        return problem.result(
            gradient=gradient,
            reached=gradient.keys() | inner.reached,
            adapted=inner.params,
            train_loss=inner.train_loss,
            meta=value,
            inner_buffers=inner.buffers,
            hyper_gradient=self._hyper_gradient(problem, inner, filled(gradient, leaves)),
            state=detached_state(inner.state),
        )

    def _hyper_gradient(self, problem: Problem, inner: Trajectory, gradient: Params) -> Params:
        """From grad L_meta at phi~ back through the updates, and from each inner gradient by E12."""
        inputs = dict(self.inner.hyper_parameters())
        for k, step in enumerate(inner.steps):
            inputs |= {f"{k} {n}": g for n, g in (step.gradient or {}).items()}
        pulled = problem.pull_back(
            list(inner.params.values()),
            [gradient[n] for n in inner.params],
            inputs,
            at=NOWHERE,
        )
        pulled = filled(pulled, inputs)
        weights = {n: torch.zeros_like(w) for n, w in problem.learned.items()}
        for k, step in enumerate(inner.steps):
            direction = {n: pulled[f"{k} {n}"] for n in step.gradient or {}}
            with problem.replaying(step.random):
                part = problem.mixed_derivative(
                    step.params, inner.fixed, direction, step.batch, step.buffers
                )
            weights = {n: w + part[n] for n, w in weights.items()}
        return {**{n: pulled[n] for n in self.inner.hyper_parameters()}, **weights}


class Reptile(Adapting):
    """G = phi - phi~: the outer step moves phi towards the adapted parameters.

    With ``torch.optim.SGD(lr=1)`` outside and alpha = 0 the outer rate is Reptile's epsilon;
    ``schedule`` lets it grow from 0.1 to 1 over training. The meta batch is only looked at. (With any
    strategy, eta_out = 0 in E2 is Reptile too, with alpha as its epsilon.)

    Args:
        inner: the inner optimizer, e.g. ``SGD(0.05)``.
        steps: K, the number of inner steps; with K = 1 this is plain training.
        adapt: says by name which parameters inner steps move; the others get no gradient.

    Raises:
        ValueError: ``inner`` has learned hyper-parameters, for which Reptile has no gradient.

    Source: Nichol et al., 2018.

    Example:
        >>> from prism_meta.bilevel.inner import SGD
        >>> from torch import nn
        >>> model = nn.Linear(1, 1, bias=False)
        >>> mse = lambda forward, batch: (forward(batch[0]) - batch[1]).square().mean()
        >>> batch = (torch.ones(1, 1), torch.zeros(1, 1))
        >>> result = Reptile(SGD(0.25), steps=1).meta_gradient(model, mse, batch, batch)
        >>> bool(torch.allclose(result.gradient["weight"], model.weight / 2))
        True
    """

    name = "reptile"
    units = "1 1/3"
    equation = "phi - phi~"
    has_meta_gradient = False

    @classmethod
    def memory(cls, sizes: GraphSizes, steps: int) -> dict[str, int]:
        return {cls.__name__: sizes.forward + 2 * sizes.params}

    def __init__(
        self, inner: InnerOptimizer, steps: int = 1, *, adapt: Adapted | None = None
    ) -> None:
        super().__init__(inner, steps, adapt=adapt)
        self.refuse_learned()

    def solve(self, problem: Problem, train: Any, meta: Any, state: State | None) -> MetaGradient:
        inner = self.walk(problem, train, state)
        with torch.no_grad():
            value = problem.evaluate_meta({**inner.fixed, **inner.params}, meta)
        moved = {n: problem.trainable[n].detach() - p for n, p in inner.params.items()}
        return problem.result(
            gradient=moved,
            reached=inner.reached,
            adapted=inner.params,
            train_loss=inner.train_loss,
            meta=value,
            inner_buffers=inner.buffers,
            state=detached_state(inner.state),
        )

    def outer(
        self, params: Sequence[nn.Parameter], total_steps: int
    ) -> tuple[Optimizer, LRScheduler]:
        optimizer = torch.optim.SGD(params, lr=1.0)
        return optimizer, self.schedule(optimizer, total_steps)

    @staticmethod
    def schedule(
        optimizer: Optimizer, total_steps: int, *, start: float = 0.1, end: float = 1.0
    ) -> LinearLR:
        """Epsilon: the outer rate times a factor that grows linearly from ``start`` to ``end``."""
        return LinearLR(
            optimizer, start_factor=start, end_factor=end, total_iters=max(1, total_steps - 1)
        )
