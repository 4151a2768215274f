"""Which weights of a training are the best, and whether it should end early."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from prism_meta.training.folder.weights import save_weights, weights_file
from prism_meta.training.loggers.picture import draw_outlines
from prism_meta.training.processes.agreement import Processes
from prism_meta.training.validation.validation import Validation


@dataclass(frozen=True)
class Best:
    """The best validation so far.

    Args:
        dice: that which decides, in [0, 1]; -1 before the first validation.
        step: the outer step that it followed.
        weights: ``last`` or ``ema``, whichever was better.
        since: validations after it.
        ended: whether the training ended early.
    """

    dice: float = -1.0
    step: int = 0
    weights: str = "last"
    since: int = 0
    ended: bool = False


class Selection:
    """Validates during a training, keeps the best weights, and says when there is no progress any more.

    Args:
        validation: what to validate on.
        models: ``last`` -> the model, and ``ema`` -> that with averaged weights, if there is one.
        processes: each of them predicts its share of the cases.
        folder: the best weights go to ``weights/best.safetensors`` in it. Defaults to no file.
    """

    def __init__(
        self,
        validation: Validation,
        models: Mapping[str, nn.Module],
        processes: Processes,
        folder: Path | None = None,
    ) -> None:
        self.validation, self.models = validation, dict(models)
        self.processes, self.folder = processes, folder
        self.best = Best()

    def is_due(self, step: int, total: int) -> bool:
        """Whether the training validates after this many of all outer steps."""
        return step % self.validation.every == 0 or step == total

    def __call__(self, step: int) -> dict[str, Any]:
        """Validate after ``step`` outer steps. Every process must call it.

        Returns:
            ``last`` (and ``ema``) -> the scores, see ``Validation.score``; and ``best``, see ``Best``.
        """
        rank, world = self.processes.fabric.global_rank, self.processes.fabric.world_size
        cases = self.validation.cases
        own = {
            kind: self.validation.dice(model, cases[rank::world])
            for kind, model in self.models.items()
        }
        told = self.processes.gather(own)
        scores = {
            # In the order of the cases, so that the sums do not depend on the number of processes.
            kind: self.validation.score(
                [told[k % world][kind][k // world] for k in range(len(cases))]
            )
            for kind in self.models
        }
        key = "dice" if self.validation.select == "mean" else "worst"
        kind = max(scores, key=lambda kind: scores[kind][key])
        if scores[kind][key] > self.best.dice:
            self.best = Best(scores[kind][key], step, kind)
            self._save(self.models[kind])
        else:
            since, patience = self.best.since + 1, self.validation.patience
            ended = patience is not None and since >= patience
            self.best = replace(self.best, since=since, ended=ended)
        best = {name: getattr(self.best, name) for name in ("dice", "step", "weights")}
        return {**scores, "best": best}

    def draw(self) -> NDArray[np.uint8]:
        """A picture of a slice of the first case, predicted with the last weights."""
        return draw_outlines(*self.validation.slice_of_first(self.models["last"]))

    def _save(self, model: nn.Module) -> None:
        with self.processes.together():
            if self.folder is not None and self.processes.fabric.is_global_zero:
                save_weights(weights_file(self.folder, "best"), model)

    def state_dict(self) -> dict[str, Any]:
        """The state that a checkpoint keeps."""
        return asdict(self.best)

    def load_state_dict(self, state: Mapping[str, Any], *, longer: bool) -> None:
        """Restore ``state_dict``; a training that was made ``longer`` is as patient as at its start."""
        self.best = Best(**state)
        if longer:
            self.best = replace(self.best, since=0, ended=False)
