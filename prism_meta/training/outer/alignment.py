"""The cosine of the meta-gradient with the single-level one, measured now and then during training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from prism_meta.bilevel.alignment import cosine, single_level_gradient
from prism_meta.bilevel.functional.trees import Params
from prism_meta.bilevel.learner import MetaLearner
from prism_meta.bilevel.strategies import MetaGradient
from prism_meta.training.processes.communication import mean_over_processes

if TYPE_CHECKING:  # it takes two seconds to import
    from lightning_fabric import Fabric

#: Outer steps between measurements. One costs an evaluation and its gradient: half a first-order step at
#: most, so that a hundredth of the steps adds less than 1 percent to any training.
COSINE_EVERY = 100


class Alignment:
    """Measures cos(G, grad L_meta(phi)) of the steps ``every``, 2 ``every``, ...

    Both gradients are means over the episodes of the step and over all processes. A strategy that does
    not differentiate L_meta (``SingleLevel``, ``Reptile``) has no meta-gradient, and is not measured.

    Args:
        learner: its model is at phi.
        fabric: devices and processes, launched.
        every: number of outer steps; 0 measures none.
    """

    def __init__(self, learner: MetaLearner, fabric: Fabric, every: int) -> None:
        self.learner, self.fabric = learner, fabric
        self.every = every if learner.strategy.has_meta_gradient else 0

    def __call__(
        self, step: int, result: MetaGradient, episodes: Sequence[tuple[Any, Any]]
    ) -> Tensor | None:
        """The cosine before the outer step is taken; None if this step is not measured.

        Args:
            step: counted from 0.
            result: with the mean gradient, on the device of the model.
            episodes: of this process. Every process must call it.
        """
        if self.every == 0 or (step + 1) % self.every != 0:
            return None
        scaler = self.learner.scaler
        found = [
            single_level_gradient(
                self.learner.model,
                self.learner.objective,
                self.fabric.to_device(meta),
                scale=1.0 if scaler is None else scaler.get_scale(),
            )
            for _, meta in episodes
        ]
        single: Params = {name: sum(one[name] for one in found) for name in found[0]}  # type: ignore[misc]
        if self.fabric.world_size > 1:
            single = mean_over_processes(single, self.fabric)
        return cosine(result.gradient, single)
