"""One level on both batches: the control of what a second level adds to seeing two batches."""

from __future__ import annotations

from typing import Any

from prism_meta.bilevel.functional.model import FunctionalModel
from prism_meta.bilevel.functional.trees import State
from prism_meta.bilevel.strategies.base import (
    Adaptation,
    FunctionalStrategy,
    GraphSizes,
    MetaGradient,
    StepBatches,
    pack,
)


class Joint(FunctionalStrategy):
    """One level, on both batches: G = (grad L_train(phi) + grad L_meta(phi)) / 2, and phi~ = phi.

    Use it as the control of a two-level strategy with K = 1: it sees the same two batches at the same cost
    of two evaluations and gradients, in one step instead of two levels. A gain over ``SingleLevel`` that it
    also has does not come from the second level. It uses the first of several ``StepBatches``. BatchNorm
    keeps the statistics of the train batch, as with ``SingleLevel``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Linear(1, 1, bias=False)
        >>> mse = lambda forward, batch: (forward(batch[0]) - batch[1]).square().mean()
        >>> train, meta = ((torch.full((1, 1), x), torch.zeros(1, 1)) for x in (1.0, 2.0))
        >>> result = Joint().meta_gradient(model, mse, train, meta)
        >>> bool(torch.allclose(result.gradient["weight"], (2 + 8) / 2 * model.weight))
        True
    """

    name = "joint"
    units = "2"
    equation = "grad (L_train + L_meta) / 2"
    adapts = False
    has_meta_gradient = False

    @property
    def evaluations(self) -> int:
        return 2

    @classmethod
    def memory(cls, sizes: GraphSizes, steps: int) -> dict[str, int]:
        return {cls.__name__: sizes.forward + 2 * sizes.params}

    def solve(
        self, model: FunctionalModel, train: StepBatches, meta: Any, state: State | None
    ) -> MetaGradient:
        phi = model.leaves()
        at_train = model.evaluate(phi, train.of_step(0))
        by_train = at_train.gradient(phi)
        loss = at_train.loss.detach()
        buffers = at_train.buffers
        del at_train  # its graph is not needed any more
        at_meta = model.evaluate_meta(phi, meta)
        total = dict(by_train)
        for name, slope in at_meta.gradient(phi).items():
            total[name] = total[name] + slope if name in total else slope
        inner = Adaptation({}, phi, buffers, loss, total)
        halves = {n: slope / 2 for n, slope in total.items()}
        return pack(model, inner, at_meta, halves, buffers=buffers)
