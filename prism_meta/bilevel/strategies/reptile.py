"""Reptile and Lookahead: the way back from the adapted parameters as a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler

from prism_meta.bilevel.functional.model import FunctionalModel
from prism_meta.bilevel.functional.trees import State
from prism_meta.bilevel.inner import InnerOptimizer
from prism_meta.bilevel.strategies.base import GraphSizes, MetaGradient, StepBatches, pack
from prism_meta.bilevel.strategies.inner_loop import AdaptingStrategy, ParameterFilter

#: Default epsilon of the first and of the last outer step.
EPSILON = (0.1, 1.0)
#: How the gradients of the inner steps are weighted.
StepWeights = Literal["equal", "arithmetic"]


def arithmetic_weights(steps: int) -> list[float]:
    """Weights 2 (n - i + 1) / (n + 1) of the inner gradients i = 1, ..., n; their mean is 1.

    The mean of all iterates of n steps of SGD moves by eta_in sum_i (n - i + 1) / n g_i, so steps with these
    weights go in the direction of that mean. They show how much of Reptile's effect is averaging.

    Args:
        steps: n, at least 1.

    Example:
        >>> arithmetic_weights(3)
        [1.5, 1.0, 0.5]
    """
    return [2 * (steps - i) / (steps + 1) for i in range(steps)]


class Reptile(AdaptingStrategy):
    """G = phi - phi~: the outer step moves phi towards the adapted parameters.

    With ``torch.optim.SGD(lr=1)`` outside and alpha = 0 the outer rate is Reptile's epsilon:
    phi <- phi + epsilon (phi~ - phi). ``outer_optimizer`` gives that optimizer and lets epsilon run from the
    first to the second number of ``epsilon`` over training. A constant epsilon of 1 is plain training with
    the inner optimizer, and a smaller one is Lookahead. The meta batch is only measured. (With any strategy,
    eta_out = 0 in E2 is Reptile too, with alpha as its epsilon.)

    Args:
        inner: the inner optimizer, e.g. ``SGD(0.05)``.
        steps: K, the number of inner steps; with K = 1 and epsilon = 1 this is plain training.
        adapt: predicate on parameter names: which parameters the inner steps move. The others get no
            gradient. Defaults to all.
        epsilon: one number in (0, 1] for all outer steps, or the first and the last of a linear schedule.
            Defaults to (0.1, 1.0), as in HGA's published script.
        step_weights: ``"arithmetic"`` multiplies the gradient of each inner step by its
            ``arithmetic_weights``. Defaults to ``"equal"``, a factor of 1.

    Raises:
        ValueError: ``inner`` has learned hyper-parameters, for which Reptile has no gradient, or an argument
            is out of range.

    Source: Nichol et al., 2018; Lookahead, Zhang et al., NeurIPS 2019; HGA (hierarchical gradient
    alignment, the published extension of PASSION), which walks through all subsets of modalities.

    Example:
        >>> from prism_meta.bilevel.inner import SGD
        >>> from torch import nn
        >>> model = nn.Linear(1, 1, bias=False)
        >>> mse = lambda forward, batch: (forward(batch[0]) - batch[1]).square().mean()
        >>> batch = (torch.ones(1, 1), torch.zeros(1, 1))
        >>> result = Reptile(SGD(0.25), steps=1).meta_gradient(model, mse, batch, batch)
        >>> bool(torch.allclose(result.gradient["weight"], model.weight / 2))
        True
        >>> optimizer, _ = Reptile(SGD(0.25), epsilon=0.5).outer_optimizer(list(model.parameters()), 10)
        >>> optimizer.param_groups[0]["lr"]
        0.5
    """

    name = "reptile"
    units = "1 1/3"
    equation = "phi - phi~"
    has_meta_gradient = False
    learns_from_meta = False
    learns_hyper_parameters = False
    options = ("epsilon", "step_weights")

    def __init__(
        self,
        inner: InnerOptimizer,
        steps: int = 1,
        *,
        adapt: ParameterFilter | None = None,
        epsilon: float | tuple[float, float] = EPSILON,
        step_weights: StepWeights = "equal",
    ) -> None:
        super().__init__(inner, steps, adapt=adapt)
        self.epsilon, self.step_weights = epsilon, step_weights
        if not all(0 < value <= 1 for value in self._ends):
            raise ValueError(f"epsilon: got {epsilon}, expected numbers in (0, 1]")
        if step_weights not in ("equal", "arithmetic"):
            raise ValueError(
                f"step_weights: got {step_weights!r}, expected 'equal' or 'arithmetic'"
            )

    @property
    def evaluations(self) -> int:
        return self.steps

    @classmethod
    def memory(cls, sizes: GraphSizes, steps: int) -> dict[str, int]:
        return {cls.__name__: sizes.forward + 2 * sizes.params}

    def solve(
        self, model: FunctionalModel, train: StepBatches, meta: Any, state: State | None
    ) -> MetaGradient:
        weights = arithmetic_weights(self.steps) if self.step_weights == "arithmetic" else None
        inner = self.adapt_detached(model, train, state, weights=weights)
        with torch.no_grad():
            measured = model.evaluate_meta(inner.everything, meta)
        moved = {n: model.trainable[n] - inner.params[n] for n in inner.used}
        return pack(model, inner, measured, moved)

    def outer_optimizer(
        self, params: Sequence[nn.Parameter], total_steps: int
    ) -> tuple[Optimizer, LRScheduler]:
        optimizer = torch.optim.SGD(params, lr=1.0)
        start, end = self._ends
        return optimizer, self.schedule(optimizer, total_steps, start=start, end=end)

    @property
    def _ends(self) -> tuple[float, float]:
        """The first and the last epsilon."""
        return self.epsilon if isinstance(self.epsilon, tuple) else (self.epsilon, self.epsilon)

    @staticmethod
    def schedule(
        optimizer: Optimizer,
        total_steps: int,
        *,
        start: float = EPSILON[0],
        end: float = EPSILON[1],
    ) -> LinearLR:
        """Epsilon: a factor of ``optimizer``'s rate, from ``start`` to ``end`` over ``total_steps``."""
        return LinearLR(
            optimizer, start_factor=start, end_factor=end, total_iters=max(1, total_steps - 1)
        )
