"""E4 by finite differences, for nets without second derivatives."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prism_meta.bilevel.functional.model import Evaluation, FunctionalModel
from prism_meta.bilevel.functional.precision import WideModel
from prism_meta.bilevel.functional.recompute import ReplayCheck
from prism_meta.bilevel.functional.trees import Params, State, filled, leaves, norm
from prism_meta.bilevel.inner import InnerOptimizer
from prism_meta.bilevel.strategies.adjoint import AdjointStrategy, Curvature, Linearization
from prism_meta.bilevel.strategies.base import GraphSizes, MetaGradient, StepBatches
from prism_meta.bilevel.strategies.inner_loop import InnerStep, ParameterFilter

#: What torch says about operands of different types, and about a type that it lacks.
_TYPES = re.compile(r"dtype|scalar type|double|float64|No available kernel", re.IGNORECASE)


class FiniteDifference(AdjointStrategy):
    """E4 with H v from two extra gradients per inner step, for nets without second derivatives.

    Not recommended if ``SecondOrder`` works: on the CPU, which has no fast convolution in float64, it
    takes 14 to 19 times the time and 9 times the memory of first order on a U-Net.

    H v is (grad L(phi + r v) - grad L(phi - r v)) / 2r, with r ||v|| = ``radius`` * ||phi||
    (``radius`` if phi is 0). At a kink of an activation (ReLU, LeakyReLU) the gradient jumps. The
    difference mistakes each jump between its two points for curvature, which a second derivative does
    not. A smaller radius crosses fewer kinks, but each counts for more, so the error grows until none
    is crossed. That radius is far below the resolution of float32, and it shrinks with the number of
    voxels. So everything is computed in float64 (``dtype``), with a default radius of
    eps^(3/4) = 2e-12. In float32 the default is eps^(1/3) = 5e-3, which suits only smooth nets (tanh,
    GELU, SiLU).

    Errors of the meta-gradient of float32 nets (``python benchmarks/finite_differences.py``):

    ==================== =========== ======= ============= =============
    net                  first order default float32, 5e-3 float64, 6e-6
    ==================== =========== ======= ============= =============
    MLP, tanh            3e-3        9e-8    4e-7          3e-8
    MLP, LeakyReLU       4e-3        6e-8    4e-3          3e-8
    U-Net, LeakyReLU     0.09        2e-6    0.09          1.2
    PrismNet, LeakyReLU  0.15        3e-6    0.04          1.2
    ==================== =========== ======= ============= =============

    ``diagnostics["asymmetry"]`` compares the two one-sided differences, ||D+ - D-|| / ||D||, and is
    the largest over the inner steps. It is near 0 if the gradient is smooth between the two points. A
    value near 1 or above says that kinks were crossed and that the result cannot be trusted.
    What the model and the objective detach (coarse maps that guide a fusion, the teacher of E8 and E9)
    changes in a difference, while a second derivative holds it constant: on PRISM the two differ by
    some percent.

    Args:
        inner: the inner optimizer, e.g. ``SGD(0.05)``.
        steps: K, the number of inner steps.
        adapt: predicate on parameter names: which parameters the inner steps move. Defaults to all.
        radius: relative to the norm of the adapted parameters. Defaults to the values above; for the
            objective's learned weights to the root of their type's precision.
        dtype: the type in which the model is evaluated; wider parameters keep theirs. Pass
            ``torch.float32`` for a smooth net, or if the model cannot be evaluated in float64 (it casts
            to a fixed type, or an operation or the device has no float64).

    Raises:
        ValueError: ``radius`` is not positive, or ``dtype`` is not a floating-point type; later, the
            model cannot be evaluated in it.

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

    @property
    def evaluations(self) -> int:
        return 3 * self.steps + 1

    @classmethod
    def memory(cls, sizes: GraphSizes, steps: int) -> dict[str, int]:
        narrow = sizes.forward + (2 * steps + 4) * sizes.params
        return {cls.__name__: int(sizes.float64 * narrow)}

    def __init__(
        self,
        inner: InnerOptimizer,
        steps: int = 1,
        *,
        adapt: ParameterFilter | None = None,
        radius: float | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(inner, steps, adapt=adapt)
        if radius is not None and not radius > 0:
            raise ValueError(f"radius: got {radius}, expected a number > 0")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype: got {dtype}, expected a floating-point type")
        self.radius, self.dtype = radius, dtype

    def solve(
        self, model: FunctionalModel, train: StepBatches, meta: Any, state: State | None
    ) -> MetaGradient:
        is_wider = True  # a device may refuse the type itself
        try:
            wide = WideModel(model, self.dtype)
            is_wider = wide.is_wider
            result = super().solve(wide if is_wider else model, train, meta, state)
        except (RuntimeError, TypeError) as error:
            if not is_wider or not _TYPES.search(str(error)):
                raise
            raise ValueError(
                f"dtype: the model cannot be evaluated in {self.dtype} ({str(error).splitlines()[0]}); "
                "give FiniteDifference(dtype=torch.float32), which is near E4 only for smooth models"
            ) from error
        return narrowed(result, model) if is_wider else result

    def linearize(
        self, model: FunctionalModel, step: InnerStep, fixed: Params, check: ReplayCheck
    ) -> Linearization:
        middle, everything = step.gradient, {**step.params, **fixed}
        radius = self.radius or _default_radius(step.params)
        diagnostics: dict[str, Tensor] = {}

        def moved(vector: Params, r: Tensor) -> Evaluation:
            point = {n: step.params[n] + r.to(v.dtype) * v for n, v in vector.items()}
            with step.random.replayed():
                return model.evaluate(leaves({**everything, **point}), step.batch, step.buffers)

        def weight_slopes(vector: Params, scale: Tensor) -> Params:
            # They are rounded to the weights' own type. Along v they have kinks but no jumps: the error
            # of the difference is of order r, that of rounding of order eps / r.
            r = scale * (self.radius or torch.finfo(_coarsest(model.weights)).eps ** (1 / 2))
            up, down = (
                filled(moved(vector, s * r).gradient(model.weights), model.weights) for s in (1, -1)
            )
            return {n: (g - down[n]) / (2 * r).to(g.dtype) for n, g in up.items()}

        def curvature(vector: Params) -> Curvature:
            size, reach = norm(vector), norm(step.params)
            reach = torch.where(reach > 0, reach, 1.0)
            # If v = 0 there is no direction to move along, and H v = 0.
            scale = torch.where(size > 0, reach / size, 1.0)
            r = radius * scale
            ends = [moved(vector, s * r) for s in (1, -1)]
            if radius < 0.1:  # then the mean loss of both ends is near that between them
                check.add(step.loss, (ends[0].loss + ends[1].loss) / 2, tolerance=radius**0.5)
            plus, minus = (end.gradient(end.params) for end in ends)
            bend = {n: plus[n] - 2 * middle[n] + minus[n] for n in middle}
            slope = {n: (plus[n] - minus[n]) / 2 for n in middle}
            diagnostics["asymmetry"] = norm(bend) / norm(slope).clamp(min=1e-30)
            curved = {n: (p - minus[n]) / (2 * r).to(p.dtype) for n, p in plus.items()}
            return Curvature(
                {n: curved.get(n) for n in step.params},
                {n: curved.get(n) for n in fixed},
                weight_slopes(vector, scale) if model.weights else {},
            )

        return Linearization(middle, curvature, diagnostics)


def narrowed(result: MetaGradient, model: FunctionalModel) -> MetaGradient:
    """``result`` in the types of ``model``; a loss keeps that of the widest tensor."""

    def as_own(values: Params, own: Mapping[str, Tensor]) -> Params:
        return {n: v.to(own[n].dtype) for n, v in values.items()}

    params, buffers = model.trainable, dict(model.model.named_buffers())
    state = {
        name: {
            key: value.to(params[name].dtype) if value.shape == params[name].shape else value
            for key, value in values.items()
        }
        for name, values in result.state.items()
    }
    return replace(
        result,
        gradient=as_own(result.gradient, params),
        adapted=as_own(result.adapted, params),
        buffers=as_own(result.buffers, buffers),
        inner_buffers=as_own(result.inner_buffers, buffers),
        state=state,
    )


def _coarsest(params: Params) -> torch.dtype:
    return max((p.dtype for p in params.values()), key=lambda dtype: torch.finfo(dtype).eps)


def _default_radius(params: Params) -> float:
    eps = torch.finfo(_coarsest(params)).eps
    return float(eps ** (3 / 4 if eps < 1e-12 else 1 / 3))
