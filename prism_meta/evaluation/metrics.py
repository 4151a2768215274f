"""Dice, HD95 and normalised surface Dice of two masks; a named policy says what empty masks give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prism_meta.empty_masks import BratsEmpty, EmptyPolicy

#: Tolerance of the normalised surface Dice in mm. The BraTS challenges after 2024 report 0.5 and 1 mm.
TOLERANCE = 1.0


def diagonal_of(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """The diagonal of a volume of ``shape`` voxels in mm.

    Example:
        >>> diagonal_of((3, 4), (1.0, 1.0))
        5.0
    """
    return math.sqrt(sum((n * mm) ** 2 for n, mm in zip(shape, spacing, strict=True)))


class Overlap(NamedTuple):
    """How well two masks agree.

    Args:
        dice: Dice coefficient in [0, 1].
        hd95: 95th percentile of the symmetric surface distance in mm.
        nsd: normalised surface Dice at ``TOLERANCE``, in [0, 1].
    """

    dice: float
    hd95: float
    nsd: float


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
    scores = overlap(prediction, truth, spacing=spacing, empty=empty, shape=shape)
    return scores.dice, scores.hd95


def overlap(
    prediction: Tensor,
    truth: Tensor,
    *,
    spacing: Sequence[float],
    empty: EmptyPolicy | None = None,
    shape: Sequence[int] | None = None,
) -> Overlap:
    """Dice, HD95 and normalised surface Dice (NSD) of one region of one case.

    NSD is the share of the surface voxels of both masks that lie at most ``TOLERANCE`` mm from the surface
    of the other mask. A surface voxel has a face on the outside of its mask. This is the boundary by voxels
    of MONAI and of Metrics Reloaded; the DeepMind library weights by the area of surface elements between
    voxels, and gives other numbers.

    If a mask is empty, the policy gives Dice and HD95, and NSD equals that Dice: an empty prediction of an
    empty truth is as good as its Dice, and a missed or invented region has NSD 0.

    Args:
        prediction: see ``dice_hd95``.
        truth: see ``dice_hd95``.
        spacing: see ``dice_hd95``.
        empty: see ``dice_hd95``.
        shape: see ``dice_hd95``.

    Raises:
        ValueError: see ``dice_hd95``.

    Example:
        >>> import torch
        >>> a = torch.zeros(8, 8, 8, dtype=torch.bool)
        >>> a[2:4, 2:4, 2:4] = True
        >>> overlap(a, a.roll(1, 0), spacing=(2.0, 1.0, 1.0))  # half of both surfaces is shared
        Overlap(dice=0.5, hd95=2.0, nsd=0.5)

    Source: Nikolov et al., Clinically applicable segmentation of head and neck anatomy for radiotherapy,
    JMIR 2021; Maier-Hein et al., Metrics reloaded, Nature Methods 2024.
    """
    # Importing MONAI takes seconds, so every module imports it only where it is used.
    from monai.metrics.meandice import compute_dice
    from monai.metrics.utils import get_edge_surface_distance

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
        diagonal = diagonal_of(shape or truth.shape, spacing)
        one = has_prediction or has_truth
        dice, hd95 = empty.one(diagonal) if one else empty.both(diagonal)
        return Overlap(dice, hd95, dice)
    # Cropping to a box around both masks changes no number, since there is no edge outside it.
    voxels = (prediction | truth).nonzero()
    low, high = voxels.amin(0).tolist(), (voxels.amax(0) + 1).tolist()
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    p, t = prediction[box].float(), truth[box].float()
    dice = float(compute_dice(p[None, None], t[None, None]))
    # MONAI's functions for HD95 and NSD would compute the same distances, which take most of the time, twice.
    _, distances, _ = get_edge_surface_distance(
        p, t, spacing=[float(mm) for mm in spacing], symmetric=True
    )
    hd95 = max(float(torch.quantile(d, 0.95)) for d in distances)
    near = sum(int((d <= TOLERANCE).sum()) for d in distances)
    return Overlap(dice, hd95, near / sum(map(len, distances)))
