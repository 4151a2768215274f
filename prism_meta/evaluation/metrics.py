"""Dice and HD95 of regions, with a named policy for empty masks.

MONAI computes the distances. The policy decides what an empty mask gives, and every table prints its
policy, because the choice moves averages by more than most methods do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class EmptyPolicy(Protocol):
    """What an empty mask gives: ``(dice, hd95)``."""

    name: str
    statement: str

    def both(self, diagonal: float) -> tuple[float, float]:
        """The value if neither the prediction nor the truth has a voxel of the region."""

    def one(self, diagonal: float) -> tuple[float, float]:
        """The value if only one of them has: a missed tumour or an invented one."""


class BratsEmpty:
    """The BraTS rule: both empty is perfect, one empty is the worst of the 240x240x155 mm grid."""

    name = "brats"
    statement = "both empty: Dice 1, HD95 0; one empty: Dice 0, HD95 373.13 mm"

    def both(self, diagonal: float) -> tuple[float, float]:
        return 1.0, 0.0

    def one(self, diagonal: float) -> tuple[float, float]:
        return 0.0, 373.13


class NanEmpty:
    """Undefined values are NaN, and averages leave them out; a missed tumour still has Dice 0."""

    name = "nan"
    statement = "both empty: NaN; one empty: Dice 0, HD95 NaN (averages leave NaN out)"

    def both(self, diagonal: float) -> tuple[float, float]:
        return math.nan, math.nan

    def one(self, diagonal: float) -> tuple[float, float]:
        return 0.0, math.nan


class DiagonalEmpty:
    """The BraTS rule, but one empty mask gives the diagonal of the case's own volume in mm."""

    name = "diagonal"
    statement = "both empty: Dice 1, HD95 0; one empty: Dice 0, HD95 the volume's diagonal in mm"

    def both(self, diagonal: float) -> tuple[float, float]:
        return 1.0, 0.0

    def one(self, diagonal: float) -> tuple[float, float]:
        return 0.0, diagonal


def dice_hd95(
    prediction: Tensor,
    truth: Tensor,
    *,
    spacing: Sequence[float],
    empty: EmptyPolicy | None = None,
    shape: Sequence[int] | None = None,
) -> tuple[float, float]:
    """Dice and HD95 of one region of one case.

    Args:
        prediction: bool (D, H, W) or (H, W).
        truth: bool, the same shape.
        spacing: size of a voxel in mm, one number per axis.
        empty: what an empty mask gives. Defaults to ``BratsEmpty()``.
        shape: size of the whole volume in voxels, which gives the diagonal. Defaults to the shape of
            the masks; pass it if they are cropped.

    Returns:
        Dice in [0, 1] and HD95 in mm.

    Raises:
        ValueError: the shapes differ, or the spacing has another number of axes.

    Example:
        >>> import torch
        >>> a = torch.zeros(8, 8, 8, dtype=torch.bool)
        >>> a[2:4, 2:4, 2:4] = True
        >>> dice_hd95(a, a.roll(1, 0), spacing=(2.0, 1.0, 1.0))
        (0.5, 2.0)
        >>> dice_hd95(a, a & False, spacing=(1, 1, 1))
        (0.0, 373.13)
    """
    # Importing MONAI takes seconds, so every module imports it only where it is used.
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.meandice import compute_dice

    if prediction.shape != truth.shape:
        raise ValueError(
            f"prediction: got {tuple(prediction.shape)}, expected the truth's {tuple(truth.shape)}"
        )
    if len(spacing) != truth.ndim:
        raise ValueError(
            f"spacing: got {len(spacing)} numbers, expected {truth.ndim}, one per axis"
        )
    empty = empty or BratsEmpty()
    has_prediction, has_truth = bool(prediction.any()), bool(truth.any())
    if not (has_prediction and has_truth):
        sizes = zip(shape or truth.shape, spacing, strict=True)
        diagonal = math.sqrt(sum((n * mm) ** 2 for n, mm in sizes))
        return empty.one(diagonal) if has_prediction or has_truth else empty.both(diagonal)
    # Cropping to a box around both masks changes no number, since there is no edge outside it.
    voxels = (prediction | truth).nonzero()
    low, high = voxels.amin(0).tolist(), (voxels.amax(0) + 1).tolist()
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    p, t = prediction[box][None, None].float(), truth[box][None, None].float()
    dice = compute_dice(p, t)
    hd95 = compute_hausdorff_distance(p, t, percentile=95, spacing=[float(mm) for mm in spacing])
    return float(dice), float(hd95)
