"""The meta-gradient of a regularised inner problem, from its solution alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prism_meta.bilevel.inner import InnerOptimizer, Params, State
from prism_meta.bilevel.strategies.adapting import Adapted, Adapting, detached_state
from prism_meta.bilevel.strategies.base import GraphSizes, MetaGradient, batches_of
from prism_meta.bilevel.strategies.problem import Problem, detached, dot, filled


class ImplicitMAML(Adapting):
    """G = (I + H_train(phi~) / lambda)^-1 grad L_meta(phi~), by conjugate gradients.

    The inner problem is argmin L_train(p) + lambda / 2 ||p - phi||^2; its inner steps need no graph,
    so memory is that of one second derivative at phi~, whatever K. The formula holds at the minimum:
    take enough inner steps. ``diagnostics`` tells how near it is: ``stationarity`` is the norm of the
    inner problem's gradient at phi~ relative to that of L_train, ``cg_residual`` that of the linear
    system relative to its right-hand side. With several train batches L_train is their mean.

    Args:
        inner: the inner optimizer, e.g. ``SGD(0.05)``.
        steps: K, the number of inner steps.
        proximal: lambda > 0; larger keeps phi~ nearer to phi and the system better conditioned.
        cg_steps: conjugate-gradient steps, each of the cost of a second derivative.
        adapt: says by name which parameters inner steps move; the others get the implicit gradient
            of phi~ with respect to them.

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
        adapt: Adapted | None = None,
    ) -> None:
        super().__init__(inner, steps, adapt=adapt)
        if not proximal > 0:
            raise ValueError(f"proximal: got {proximal}, expected a number > 0")
        if cg_steps < 1:
            raise ValueError(f"cg_steps: got {cg_steps}, expected at least 1")
        self.proximal, self.cg_steps = proximal, cg_steps
        self.refuse_learned()

    learns_objective = True

    def solve(self, problem: Problem, train: Any, meta: Any, state: State | None) -> MetaGradient:
        phi, _ = self.split(detached(problem.trainable))

        def pull(params: Params) -> Params:
            return {n: self.proximal * (p - phi[n]) for n, p in params.items()}

        inner = self.walk(problem, train, state, penalty=pull)
        leaves = detached({**inner.fixed, **inner.params}, requires_grad=True)
        value = problem.evaluate_meta(leaves, meta)
        partial = problem.reached_gradient(value.loss, leaves, at=value.at)
        gradient = filled(partial, leaves)

        adapted = {n: leaves[n] for n in inner.params}
        values = [problem.evaluate(leaves, batch) for batch in batches_of(train)]
        at = values[0].at  # all of them were evaluated there
        loss = torch.stack([v.loss for v in values]).mean()
        grads = problem.reached_gradient(loss, adapted, at=at, create_graph=True)
        reached = partial.keys() | inner.reached

        def curvature(vector: Params) -> Params:
            inputs = {**leaves, **problem.learned}
            pulled = problem.pull_back(
                list(grads.values()),
                [vector[n] for n in grads],
                inputs,
                at=at,
                retain_graph=True,
            )
            reached.update(pulled)
            return filled(pulled, inputs)

        def system(vector: Params) -> Params:
            curved = curvature(vector)
            return {n: v + curved[n] / self.proximal for n, v in vector.items()}

        right = {n: gradient[n] for n in adapted}
        solution, residual = conjugate_gradients(system, right, self.cg_steps)
        mixed = curvature(solution)
        pulled = pull(adapted)
        stationarity = {n: (grads[n] + pulled[n]).detach() for n in grads}
        return problem.result(
            gradient={
                **{n: gradient[n] - mixed[n] / self.proximal for n in inner.fixed},
                **solution,
            },
            reached=reached,
            adapted=inner.params,
            train_loss=inner.train_loss,
            meta=value,
            inner_buffers=inner.buffers,
            hyper_gradient={n: -mixed[n] / self.proximal for n in problem.learned},
            state=detached_state(inner.state),
            diagnostics={
                "cg_residual": residual,
                "stationarity": (
                    dot(stationarity, stationarity) / dot(grads, grads).clamp(min=1e-30)
                )
                .sqrt()
                .detach(),
            },
        )


def conjugate_gradients(system: Any, right: Params, steps: int) -> tuple[Params, Tensor]:
    """Solve system(x) = right for a symmetric ``system``; x and ||residual|| / ||right||.

    It stops, without waiting for the device, where it has converged or where the curvature along a
    direction is not positive: the steps that are left change nothing.
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
