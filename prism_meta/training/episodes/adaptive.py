"""What the trainer asks of objectives and episodes that change over training."""

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


@runtime_checkable
class AdaptiveEpisodes(Protocol):
    """Episodes that may depend on the losses of the training so far, e.g. ``Episodes`` with ``HardMask``."""

    @property
    def follows_losses(self) -> bool:
        """Whether they do."""

    def observe(self, mask: Tensor, losses: Tensor) -> None:
        """Add the losses (B,) of samples that were shown ``mask``, bool (B, M)."""

    def state_dict(self) -> dict[str, Tensor]:
        """All that the next episodes depend on, beside their index."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore ``state_dict``."""
