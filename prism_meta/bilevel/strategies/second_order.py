"""Strategies that differentiate through the inner steps: E4, exact and by finite differences."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from prism_meta.bilevel.inner import InnerOptimizer, Params, State
from prism_meta.bilevel.strategies.adapting import Adapted, Adapting, Step, detached_state
from prism_meta.bilevel.strategies.base import GraphSizes, MetaGradient
from prism_meta.bilevel.strategies.problem import NOWHERE, Problem, Value, detached, dot, filled

#: What torch says of operands whose types do not fit, and of a type that it lacks.
_TYPES = re.compile(r"dtype|scalar type|double|float64|No available kernel", re.IGNORECASE)
Graph = Literal["auto", "stored", "recomputed"]
#: From w, shaped like the adapted parameters, to the derivative of <grad L_train, w> with respect to
#: all parameters: H w, and the mixed derivatives for those that are not adapted; and with respect to
#: the objective's learned weights (E12). What it does not depend on has no entry.
Curvature = Callable[[Params], Params]


class Adjoint(Adapting):
    """E4 from the last inner step back to the first, with one step's graph in memory at a time.

    With lambda_K = grad L_meta(phi~), step k gives lambda_k from lambda_{k+1} by the derivative of
    U(g_k, s_k, phi_k): directly, and through g_k by the curvature of L_train at phi_k. The state of the
    inner optimizer has an adjoint too. Sub-classes say how the curvature is computed.
    """

    learns_objective = True
    #: What ``curvature`` needs of each step.
    record: ClassVar[Literal["steps", "gradients"]] = "steps"

    @abstractmethod
    def curvature(
        self, problem: Problem, step: Step, fixed: Params
    ) -> tuple[Params, Curvature, dict[str, Tensor]]:
        """The inner gradient at ``step``, the curvature there, and diagnostics."""

    def solve(self, problem: Problem, train: Any, meta: Any, state: State | None) -> MetaGradient:
        inner = self.walk(problem, train, state, record=self.record)
        leaves = detached({**inner.fixed, **inner.params}, requires_grad=True)
        value = problem.evaluate_meta(leaves, meta)
        partial = problem.reached_gradient(value.loss, leaves, at=value.at)
        gradient, reached = filled(partial, leaves), partial.keys() | inner.reached
        adjoint = {n: gradient[n] for n in inner.params}
        total = {n: gradient[n] for n in inner.fixed}
        hyper = {
            n: torch.zeros_like(p)
            for n, p in {**self.inner.hyper_parameters(), **problem.learned}.items()
        }
        state_adjoint: Params = {}
        diagnostics: dict[str, Tensor] = {}
        while inner.steps:
            step = inner.steps.pop()  # its memory is free again once the adjoint has passed it
            adjoint, state_adjoint, fixed_part, hyper_part, here = self._back(
                problem, step, inner.fixed, adjoint, state_adjoint
            )
            diagnostics = {n: torch.maximum(v, diagnostics.get(n, v)) for n, v in here.items()}
            reached |= fixed_part.keys()
            total, hyper = _sum(total, fixed_part), _sum(hyper, hyper_part)
        return problem.result(
            gradient={**total, **adjoint},
            reached=reached,
            adapted=inner.params,
            train_loss=inner.train_loss,
            meta=value,
            inner_buffers=inner.buffers,
            hyper_gradient=hyper,
            state=detached_state(inner.state),
            diagnostics=diagnostics,
        )

    def _back(
        self, problem: Problem, step: Step, fixed: Params, adjoint: Params, state_adjoint: Params
    ) -> tuple[Params, Params, Params, Params, dict[str, Tensor]]:
        """lambda_k, the state's adjoint, and the shares of fixed and of hyper-parameters."""
        values, curvature, diagnostics = self.curvature(problem, step, fixed)
        params = detached(step.params, requires_grad=True)
        grads = detached(values, requires_grad=True)
        flat = _flat(step.state)
        leaves = detached(flat, requires_grad=True)
        with torch.enable_grad():
            new_params, new_state = self.update(grads, _unflat(leaves, step.state), params)
        flat_new = _flat(new_state)
        inputs = {
            **{f"params {n}": p for n, p in params.items()},
            **{f"grads {n}": g for n, g in grads.items()},
            **{f"state {n}": s for n, s in leaves.items()},
            **{f"hyper {n}": h for n, h in self.inner.hyper_parameters().items()},
        }
        followed = {n: flat_new[n] for n in state_adjoint if n in flat_new}
        pulled = problem.pull_back(
            [*new_params.values(), *followed.values()],
            [*(adjoint[n] for n in new_params), *(state_adjoint[n] for n in followed)],
            inputs,
            at=NOWHERE,
        )
        pulled = filled(pulled, inputs)

        def part(kind: str) -> Params:
            return {n[len(kind) + 1 :]: v for n, v in pulled.items() if n.startswith(f"{kind} ")}

        direct, curved = part("params"), curvature(part("grads"))
        return (
            _sum(direct, curved),
            part("state"),
            {n: c for n, c in curved.items() if n in fixed},
            {**part("hyper"), **{n: c for n, c in curved.items() if n in problem.learned}},
            diagnostics,
        )


class SecondOrder(Adjoint):
    """E4: the exact gradient of L_meta(phi~(phi)), through the inner steps.

    For one SGD step G = (I - eta_in H_train(phi)) grad L_meta(phi~). Needs operations with a second
    derivative; ``preflight`` says which of a model's have none.

    Args:
        inner: the inner optimizer, e.g. ``SGD(0.05)``.
        steps: K, the number of inner steps.
        adapt: says by name which parameters inner steps move; all unless given.
        graph: ``stored`` keeps the graphs of all steps: 4 units of time at K = 1, memory grows with K.
            ``recomputed`` keeps parameters and optimizer state per step and rebuilds one step at a
            time: about a third more time at large K, memory for one step. Both give the same numbers
            to rounding, dropout included. ``auto`` stores the graph of a single step and recomputes
            more.

    Source: MAML, Finn et al., ICML 2017; the adjoint of an unrolled optimizer as in Maclaurin et al.,
    ICML 2015, with saved in place of reversed steps.

    Example:
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
        adapt: Adapted | None = None,
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

    def solve(self, problem: Problem, train: Any, meta: Any, state: State | None) -> MetaGradient:
        if not self.stores:
            return super().solve(problem, train, meta, state)
        phi = problem.leaves()
        inner = self.unroll(problem, phi, train, state)
        value = problem.evaluate_meta({**inner.fixed, **inner.params}, meta)
        learned = self.inner.hyper_parameters()
        inputs = {**phi, **{f"hyper {n}": h for n, h in learned.items()}, **problem.learned}
        # The graph is of several evaluations: at phi, at phi_1, ... and at phi~.
        partial = problem.reached_gradient(value.loss, inputs, at=None)
        gradient = filled(partial, inputs)
        return problem.result(
            gradient=gradient,
            reached=partial.keys() | inner.reached,
            adapted=inner.params,
            train_loss=inner.train_loss,
            meta=value,
            inner_buffers=inner.buffers,
            hyper_gradient={
                **{n: gradient[f"hyper {n}"] for n in learned},
                **{n: gradient[n] for n in problem.learned},
            },
            state=detached_state(inner.state),
        )

    def curvature(
        self, problem: Problem, step: Step, fixed: Params
    ) -> tuple[Params, Curvature, dict[str, Tensor]]:
        params = detached(step.params, requires_grad=True)
        others = detached(fixed, requires_grad=True)
        with problem.replaying(step.random):
            value = problem.evaluate({**others, **params}, step.batch, step.buffers)
        grads = problem.reached_gradient(value.loss, params, at=value.at, create_graph=True)

        def product(vector: Params) -> Params:
            return problem.pull_back(
                list(grads.values()),
                [vector[n] for n in grads],
                {**params, **others, **problem.learned},
                at=value.at,
            )

        return grads, product, {}


class FiniteDifference(Adjoint):
    """E4 with H v from two extra gradients per inner step, for nets without second derivatives.

    H v is (grad L(phi + r v) - grad L(phi - r v)) / 2r, with r ||v|| = ``radius`` * ||phi||
    (``radius`` where phi is 0). Where an activation has a kink (ReLU, LeakyReLU) the gradient jumps,
    and the difference takes each jump between its two points for curvature, which a second derivative
    does not. With a smaller radius fewer are crossed, but each counts for more: the error grows, until
    none is crossed. That is far below what float32 can resolve, and the more voxels the lower. So all
    is computed in float64 (``dtype``), and the default radius there is eps^(3/4) = 2e-12. In float32 it
    is eps^(1/3) = 5e-3, which is good for smooth nets (tanh, GELU, SiLU) alone.

    Errors of the meta-gradient of float32 nets (``python benchmarks/finite_differences.py``):

    ==================== =========== ======= ============= =============
    net                  first order default float32, 5e-3 float64, 6e-6
    ==================== =========== ======= ============= =============
    MLP, tanh            3e-3        9e-8    4e-7          3e-8
    MLP, LeakyReLU       4e-3        6e-8    4e-3          3e-8
    U-Net, LeakyReLU     0.09        2e-6    0.09          1.2
    PrismNet, LeakyReLU  0.15        3e-6    0.04          1.2
    ==================== =========== ======= ============= =============

    On the CPU, which has no fast convolution in float64, it takes the U-Net's 14 to 19 times the time and
    9 times the memory of first order (in float32 2.4 times the time).

    ``diagnostics["asymmetry"]`` compares the two one-sided differences, ||D+ - D-|| / ||D||, and is
    the largest over the inner steps: near 0 where the gradient is smooth between the two points; a
    value near 1 or above says that kinks were crossed and that the result cannot be trusted.
    What model and objective detach (prm maps that guide a fusion, the teacher of E8 and E9) moves in
    a difference, while a second derivative holds it constant: on PRISM the two differ by some percent.

    Args:
        inner: the inner optimizer, e.g. ``SGD(0.05)``.
        steps: K, the number of inner steps.
        adapt: says by name which parameters inner steps move; all unless given.
        radius: relative to the norm of the adapted parameters; unless given, by the type as above, and
            for the objective's learned weights the root of their type's precision.
        dtype: the model is evaluated in it; parameters of a wider type keep theirs. Give float32 for a
            smooth net, or where the model cannot be evaluated in float64: it casts to a fixed type, or
            an operation or the device has no float64.

    Raises:
        ValueError: ``radius`` is not positive, or ``dtype`` is no floating-point type; later, the model
            cannot be evaluated in it.

    Source: the finite-difference form of DARTS (Liu et al., ICLR 2019).

    Example:
        >>> from prism_meta.bilevel.inner import SGD
        >>> from torch import nn
        >>> model = nn.Linear(1, 1, bias=False).double()
        >>> mse = lambda forward, batch: (forward(batch[0]) - batch[1]).square().mean()
        >>> batch = (torch.ones(1, 1).double(), torch.zeros(1, 1).double())
        >>> result = FiniteDifference(SGD(0.25)).meta_gradient(model, mse, batch, batch)
        >>> bool(torch.allclose(result.gradient["weight"], model.weight / 2, rtol=1e-3))
        True
    """

    name = "finite_difference"
    units = "4, in float64"
    equation = "E4"

    @classmethod
    def memory(cls, sizes: GraphSizes, steps: int) -> dict[str, int]:
        narrow = sizes.forward + (2 * steps + 4) * sizes.params
        return {cls.__name__: int(sizes.float64 * narrow)}

    record = "gradients"

    def __init__(
        self,
        inner: InnerOptimizer,
        steps: int = 1,
        *,
        adapt: Adapted | None = None,
        radius: float | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(inner, steps, adapt=adapt)
        if radius is not None and not radius > 0:
            raise ValueError(f"radius: got {radius}, expected a number > 0")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype: got {dtype}, expected a floating-point type")
        self.radius, self.dtype = radius, dtype

    def solve(self, problem: Problem, train: Any, meta: Any, state: State | None) -> MetaGradient:
        wide: Problem | None = None  # a device may refuse the type itself
        try:
            wide = problem.in_type(self.dtype)
            result = super().solve(wide, train, meta, state)
        except (RuntimeError, TypeError) as error:
            if wide is problem or not _TYPES.search(str(error)):
                raise
            raise ValueError(
                f"dtype: the model cannot be evaluated in {self.dtype} ({str(error).splitlines()[0]}); "
                "give FiniteDifference(dtype=torch.float32), which is near E4 for smooth models alone"
            ) from error
        return result if wide is problem else problem.narrowed(result)

    def curvature(
        self, problem: Problem, step: Step, fixed: Params
    ) -> tuple[Params, Curvature, dict[str, Tensor]]:
        middle = step.gradient
        assert middle is not None  # see ``record``
        diagnostics: dict[str, Tensor] = {}
        radius = self.radius or _radius(step.params)
        everything = {**step.params, **fixed}

        def evaluated(vector: Params, r: Tensor, *, requires_grad: bool) -> Value:
            moved = {n: step.params[n] + r.to(v.dtype) * v for n, v in vector.items()}
            leaves = detached({**everything, **moved}, requires_grad=requires_grad)
            with problem.replaying(step.random):
                return problem.evaluate(leaves, step.batch, step.buffers)

        def gradient(vector: Params, r: Tensor) -> Params:
            value = evaluated(vector, r, requires_grad=True)
            return problem.reached_gradient(value.loss, value.at.params, at=value.at)

        def learned(vector: Params, scale: Tensor) -> Params:
            # They are rounded to the weights' own type. Along v they have kinks, but do not jump: the
            # error of the difference is of order r, that of rounding of order eps / r.
            r = scale * (self.radius or torch.finfo(_coarsest(problem.learned)).eps ** (1 / 2))
            values = [evaluated(vector, s * r, requires_grad=False) for s in (1, -1)]
            up, down = (problem.gradient(v.loss, problem.learned, at=v.at) for v in values)
            return {n: (g - down[n]) / (2 * r).to(g.dtype) for n, g in up.items()}

        def product(vector: Params) -> Params:
            size, reach = _norm(vector), _norm(step.params)
            reach = torch.where(reach > 0, reach, 1.0)
            # Where v = 0 there is no direction to move along, and H v = 0.
            scale = torch.where(size > 0, reach / size, 1.0)
            r = radius * scale
            plus, minus = gradient(vector, r), gradient(vector, -r)
            bend = {n: plus[n] - 2 * middle[n] + minus[n] for n in middle}
            slope = {n: (plus[n] - minus[n]) / 2 for n in middle}
            diagnostics["asymmetry"] = _norm(bend) / _norm(slope).clamp(min=1e-30)
            curved = {n: (p - minus[n]) / (2 * r).to(p.dtype) for n, p in plus.items()}
            return {**curved, **(learned(vector, scale) if problem.learned else {})}

        return middle, product, diagnostics


def _coarsest(params: Params) -> torch.dtype:
    return max((p.dtype for p in params.values()), key=lambda dtype: torch.finfo(dtype).eps)


def _radius(params: Params) -> float:
    """The default of ``FiniteDifference``."""
    dtype = _coarsest(params)
    return float(torch.finfo(dtype).eps ** (3 / 4 if dtype == torch.float64 else 1 / 3))


def _sum(total: Params, part: Params) -> Params:
    """``total`` with what ``part`` adds to it."""
    return {n: t + part[n] if n in part else t for n, t in total.items()}


def _norm(values: Params) -> Tensor:
    """Over all entries, in float64; 0 where there is none."""
    return dot(values, values).sqrt()


def _flat(state: State) -> Params:
    """The floating-point tensors of a state, under one name each."""
    return {
        f"{name} {key}": value
        for name, values in state.items()
        for key, value in values.items()
        if value.is_floating_point() and key != "step"
    }


def _unflat(flat: Params, state: State) -> State:
    """``state`` with the tensors of ``flat`` in it."""
    return {
        name: {key: flat.get(f"{name} {key}", value) for key, value in values.items()}
        for name, values in state.items()
    }
