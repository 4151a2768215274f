"""What the trainer asks of an objective whose weights change over training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Adaptive(Protocol):
    """An objective whose weights change over training, e.g. ``PrismObjective`` with a weighting."""

    def weights(self) -> dict[str, Tensor]:
        """The current weights, which are logged."""

    def observe(self, terms: Mapping[str, Tensor]) -> None:
        """Add the terms of one episode to running sums."""

    def end_epoch(self) -> None:
        """Update the weights from the sums and reset the sums."""

    def state_dict(self) -> dict[str, Tensor]:
        """The state that a checkpoint keeps."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore ``state_dict``."""
