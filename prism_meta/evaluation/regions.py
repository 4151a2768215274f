"""The regions of one prediction, measured against the labels of its case."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from prism_meta.data.cases import Volume
from prism_meta.data.labels import LabelSet
from prism_meta.empty_masks import EmptyPolicy
from prism_meta.evaluation.lesions import count_lesions
from prism_meta.evaluation.metrics import diagonal_of, overlap
from prism_meta.evaluation.windows import box_or_whole


class Scores(NamedTuple):
    """The numbers of a ``Record``, in the same order; see there."""

    dice: float
    hd95: float
    nsd: float
    predicted_ml: float
    true_ml: float
    true_lesions: float
    missed_lesions: float
    false_lesions: float
    diagonal: float


def measure(
    prediction: Tensor, truth: Tensor, volume: Volume, *, labels: LabelSet, empty: EmptyPolicy
) -> dict[str, Scores]:
    """Region -> its scores.

    Args:
        prediction: class indices, uint8 (D, H, W).
        truth: class indices, uint8 (D, H, W).
        volume: gives the spacing in mm and the volume of a voxel.
        labels: which classes form a region.
        empty: what an empty mask gives.
    """
    # No region has a voxel outside this box; cropping is faster than measuring whole volumes.
    box = box_or_whole((prediction | truth) != 0)
    voxel = voxel_volume(volume.affine)
    scores = {}
    for region in labels.regions:
        p, t = labels.region(prediction[box], region), labels.region(truth[box], region)
        agreement = overlap(p, t, spacing=volume.spacing, empty=empty, shape=volume.shape)
        lesions = count_lesions(p.numpy(), t.numpy(), voxel=voxel)
        scores[region] = Scores(
            *agreement,
            predicted_ml=voxel * int(p.sum()) / 1000,
            true_ml=voxel * int(t.sum()) / 1000,
            true_lesions=lesions.true,
            missed_lesions=lesions.missed,
            false_lesions=lesions.false,
            diagonal=diagonal_of(volume.shape, volume.spacing),
        )
    return scores


def voxel_volume(affine: NDArray[np.floating[Any]]) -> float:
    """The volume of a voxel in mm^3, from the affine (4, 4) of its grid.

    Example:
        >>> voxel_volume(np.diag([0.1, 0.1, 3.0, 1.0])) == 0.1 * 0.1 * 3.0
        True
    """
    # Unlike the determinant, it has no rounding errors on a straight grid.
    return abs(float(np.dot(np.cross(*affine[:3, :2].T), affine[:3, 2])))
