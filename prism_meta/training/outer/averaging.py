"""The exponential moving average of a model's weights over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class AveragedWeights:
    """A copy of a model whose parameters and buffers are an exponential moving average of the model's.

    After n updates the old average counts min(decay, (n + 1) / (n + 10)), so that the first weights of a
    training are forgotten soon, also in a short one. Integer buffers are the newest.

    Args:
        model: the model that is trained.
        decay: in [0, 1), what the old average counts at last.

    Source: Polyak and Juditsky, 1992; the growing decay is TensorFlow's ``ExponentialMovingAverage``.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> averaged = AveragedWeights(model, 0.5)
        >>> for value in (1.0, 2.0):
        ...     _ = nn.init.constant_(model.weight, value)
        ...     averaged.update(model)
        >>> round(averaged.model.weight.item(), 4)  # 2 / 11 of the first value and 9 / 11 of the second
        1.8182
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        def average(
            averaged: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int
        ) -> None:
            updates = torch.as_tensor(count).double()
            old = torch.clamp((1 + updates) / (10 + updates), max=decay)
            for mean, value in zip(averaged, current, strict=True):
                if mean.is_floating_point() or mean.is_complex():
                    mean.lerp_(value, (1 - old).to(mean))
                else:
                    mean.copy_(value)

        self._average = AveragedModel(model, multi_avg_fn=average, use_buffers=True)

    @property
    def model(self) -> nn.Module:
        """The model with the averaged weights."""
        found: nn.Module = self._average.module
        return found

    def update(self, model: nn.Module) -> None:
        """Add the weights after one outer step."""
        self._average.update_parameters(model)

    def state_dict(self) -> dict[str, Any]:
        """The state that a checkpoint keeps."""
        return dict(self._average.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self._average.load_state_dict(state)
