"""The meta-gradient of a regularised inner problem, from its solution only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prism_meta.bilevel.functional.model import FunctionalModel
from prism_meta.bilevel.functional.trees import (
    Params,
    State,
    add,
    detached,
    dot,
    filled,
    leaves,
    norm,
    present,
    zeros,
)
from prism_meta.bilevel.inner import InnerOptimizer
from prism_meta.bilevel.strategies.base import GraphSizes, MetaGradient, StepBatches, pack
from prism_meta.bilevel.strategies.inner_loop import AdaptingStrategy, ParameterFilter


class ImplicitMAML(AdaptingStrategy):
    """G = (I + H_train(phi~) / lambda)^-1 grad L_meta(phi~), by conjugate gradients.

    The inner problem is argmin L_train(p) + lambda / 2 ||p - phi||^2. Its inner steps need no graph, so
    memory is that of one second derivative at phi~ for any K. The formula holds at the minimum: take
    enough inner steps. ``diagnostics`` tells how close it is: ``stationarity`` is the norm of the inner
    problem's gradient at phi~ relative to that of L_train, ``cg_residual`` that of the linear system
    relative to its right-hand side. With several ``StepBatches`` L_train is their mean.

    Args:
        inner: the inner optimizer, e.g. ``SGD(0.05)``.
        steps: K, the number of inner steps.
        proximal: lambda > 0. A larger one keeps phi~ closer to phi and the system better conditioned.
        cg_steps: conjugate-gradient steps, each as expensive as a second derivative.
        adapt: predicate on parameter names: which parameters the inner steps move. The others get the
            implicit gradient of phi~ with respect to them. Defaults to all.

    Raises:
        ValueError: a number is out of range, or ``inner`` has learned hyper-parameters.

    Source: iMAML, Rajeswaran et al., NeurIPS 2019.

    Example:
        >>> from prism_meta.bilevel.inner import SGD
        >>> from torch import nn
        >>> model = nn.Linear(1, 1, bias=False).double()
        >>> mse = lambda forward, batch: (forward(batch[0]) - batch[1]).square().mean()
        >>> batch = (torch.ones(1, 1).double(), torch.zeros(1, 1).double())
        >>> strategy = ImplicitMAML(SGD(0.25), steps=50, proximal=2.0)
        >>> result = strategy.meta_gradient(model, mse, batch, batch)
        >>> bool(torch.allclose(result.gradient["weight"], model.weight / 2))  # w~ = w/2, H = 2
        True
    """

    name = "implicit"
    units = "3 + 2 per CG step"
    equation = "implicit"
    options = ("proximal", "cg_steps")
    learns_hyper_parameters = False

    @property
    def evaluations(self) -> int:
        # L_train is the mean over the batches of all steps, and each product takes all of them.
        return self.steps + 1 + self.steps * (1 + 2 * (self.cg_steps + 1))

    @classmethod
    def memory(cls, sizes: GraphSizes, steps: int) -> dict[str, int]:
        return {cls.__name__: sizes.forward + sizes.backward + 6 * sizes.params}

    def __init__(
        self,
        inner: InnerOptimizer,
        steps: int = 5,
        *,
        proximal: float = 1.0,
        cg_steps: int = 5,
        adapt: ParameterFilter | None = None,
    ) -> None:
        super().__init__(inner, steps, adapt=adapt)
        if not proximal > 0:
            raise ValueError(f"proximal: got {proximal}, expected a number > 0")
        if cg_steps < 1:
            raise ValueError(f"cg_steps: got {cg_steps}, expected at least 1")
        self.proximal, self.cg_steps = proximal, cg_steps

    def solve(
        self, model: FunctionalModel, train: StepBatches, meta: Any, state: State | None
    ) -> MetaGradient:
        phi, _ = self.split(detached(model.trainable))

        def pull(params: Params) -> Params:
            return {n: self.proximal * (p - phi[n]) for n, p in params.items()}

        inner = self.adapt_detached(model, train, state, penalty=pull)
        point = leaves(inner.everything)
        value = model.evaluate_meta(point, meta)
        by_meta = value.gradient(point)
        right = filled(by_meta, point)
        adapted = {n: point[n] for n in inner.params}
        used = {*by_meta, *inner.used}
        # L_train is the mean over the train batches, and so are its derivatives.
        values = [model.evaluate(point, batch, twice=True) for batch in train]
        slopes = [v.gradient(adapted, create_graph=True) for v in values]

        def curvature(vector: Params) -> tuple[Params, Params]:
            """H v and the mixed derivatives of all parameters, and those of the learned weights."""
            total: Any = (zeros(point), zeros(model.weights))
            for v, slope in zip(values, slopes, strict=True):
                along = {n: vector[n] / len(values) for n in slope}
                total = add(total, v.vjp(slope, along, (point, model.weights), retain_graph=True))
            used.update(present(total[0]))
            return filled(total[0], point), filled(total[1], model.weights)

        def system(vector: Params) -> Params:
            curved, _ = curvature(vector)
            return {n: v + curved[n] / self.proximal for n, v in vector.items()}

        solution, residual = conjugate_gradients(
            system, {n: right[n] for n in adapted}, self.cg_steps
        )
        mixed, by_weights = curvature(solution)
        train_slope: Any = zeros(adapted)
        for slope in slopes:
            part = {n: slope[n].detach() / len(slopes) if n in slope else None for n in adapted}
            train_slope = add(train_slope, part)
        pulled, train_slope = detached(pull(adapted)), present(train_slope)
        remaining = {n: g + pulled[n] for n, g in train_slope.items()}
        total = {**{n: right[n] - mixed[n] / self.proximal for n in inner.fixed}, **solution}
        return pack(
            model,
            inner,
            value,
            {n: g for n, g in total.items() if n in used},
            weight_gradient={n: -w / self.proximal for n, w in by_weights.items()},
            diagnostics={
                "cg_residual": residual,
                "stationarity": norm(remaining) / norm(train_slope).clamp(min=1e-15),
            },
        )


def conjugate_gradients(
    system: Callable[[Params], Params], right: Params, steps: int
) -> tuple[Params, Tensor]:
    """Solve system(x) = right for a symmetric ``system``; x and ||residual|| / ||right||.

    It stops once it has converged or the curvature along a direction is not positive. The remaining steps
    then change nothing, which avoids a device synchronisation.
    """
    solution = {n: torch.zeros_like(r) for n, r in right.items()}
    residual, direction = dict(right), dict(right)
    start = squared = dot(right, right)
    zero = torch.zeros_like(squared)
    active = squared > 0
    for _ in range(steps):
        image = system(direction)
        curved = dot(direction, image)
        active = active & (curved > 0) & (squared > 0)
        length = torch.where(active, squared / torch.where(active, curved, 1.0), zero)
        solution = {n: s + length.to(s.dtype) * direction[n] for n, s in solution.items()}
        residual = {n: r - length.to(r.dtype) * image[n] for n, r in residual.items()}
        last, squared = squared, dot(residual, residual)
        ratio = torch.where(active, squared / torch.where(active, last, 1.0), zero)
        direction = {n: r + ratio.to(r.dtype) * direction[n] for n, r in residual.items()}
    return solution, (squared / start.clamp(min=1e-30)).sqrt()
