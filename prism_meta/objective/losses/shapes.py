"""Checks of shapes, one-hot labels and means over voxels, which several losses share."""

from __future__ import annotations

import torch
from torch import Tensor


def one_hot_of(
    target: Tensor, num_classes: int, like: Tensor, valid: Tensor | None = None
) -> Tensor:
    """One-hot labels (B, K, V) in the dtype of ``like``; voxels that are not ``valid`` have no class.

    This uses ``scatter_``, because ``F.one_hot`` returns int64 with the classes last.
    """
    labels = target.flatten(1)[:, None]
    shape = (target.shape[0], num_classes, labels.shape[2])
    one_hot = torch.zeros(shape, dtype=like.dtype, device=like.device)
    if valid is None:
        return one_hot.scatter_(1, labels, 1)
    return one_hot.scatter_(1, labels, valid.flatten(1)[:, None].to(like.dtype))


def mean_over_voxels(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of values (B, ..., V) over the valid voxels: (B, ...); 0 for a sample that has none.

    Args:
        values: one number per voxel.
        valid: (B, *S) bool with V voxels. None for all voxels.
    """
    if valid is None:
        return values.mean(-1)
    inside = valid.flatten(1)
    inside = inside.view(len(inside), *[1] * (values.ndim - 2), -1)
    return (values * inside).sum(-1) / inside.sum(-1).clamp(min=1)


def check_target(maps: Tensor, target: Tensor, *, what: str = "logits") -> None:
    """Refuse a target whose shape is not (B, *S) of ``maps`` (B, C, *S)."""
    if (maps.shape[0], *maps.shape[2:]) != target.shape:
        raise ValueError(
            f"target: got {tuple(target.shape)}, expected (B, *S) = "
            f"{(maps.shape[0], *maps.shape[2:])} for {what} {tuple(maps.shape)}"
        )
