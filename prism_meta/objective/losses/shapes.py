"""Checks of shapes, and one-hot labels, which several losses share."""

from __future__ import annotations

import torch
from torch import Tensor


def one_hot_of(target: Tensor, num_classes: int, like: Tensor) -> Tensor:
    """One-hot labels (B, K, V) in the dtype of ``like``.

    This uses ``scatter_``, because ``F.one_hot`` returns int64 with the classes last.
    """
    labels = target.flatten(1)[:, None]
    shape = (target.shape[0], num_classes, labels.shape[2])
    return torch.zeros(shape, dtype=like.dtype, device=like.device).scatter_(1, labels, 1)


def check_target(maps: Tensor, target: Tensor, *, what: str = "logits") -> None:
    """Refuse a target whose shape is not (B, *S) of ``maps`` (B, C, *S)."""
    if (maps.shape[0], *maps.shape[2:]) != target.shape:
        raise ValueError(
            f"target: got {tuple(target.shape)}, expected (B, *S) = "
            f"{(maps.shape[0], *maps.shape[2:])} for {what} {tuple(maps.shape)}"
        )
