"""Lesions that a prediction finds, misses or invents, by the rules of BraTS 2023."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from prism_meta.data.restore import bounding_box

#: Steps of dilation. Lesions of the truth that meet within them are one, and a prediction there is near.
DILATION = 3
#: Lesions of the truth up to this size, in mm^3, are left out: 50 voxels of the 1 mm grid of BraTS.
SMALLEST = 50.0


class LesionCounts(NamedTuple):
    """Numbers of lesions in one region of one case.

    Args:
        true: lesions of the truth that count.
        missed: those of them that no lesion of the prediction touches.
        false: lesions of the prediction that touch no lesion of the truth.
    """

    true: int
    missed: int
    false: int


def count_lesions(
    prediction: NDArray[np.bool_], truth: NDArray[np.bool_], *, voxel: float = 1.0
) -> LesionCounts:
    """Count the true, missed and false lesions of one region.

    A lesion is a connected component with 26 neighbours. The truth is dilated by three steps of a cross
    with diagonals in the planes (18 neighbours): lesions whose dilations are connected are one lesion, and
    a lesion of the prediction touches a lesion of the truth if it has a voxel in its dilation. Lesions of
    the truth of 50 mm^3 or less are left out, neither found nor missed, and a prediction of them is not
    false. Lesions of the prediction count at any size.

    An empty mask has no lesion: an empty truth gives 0 true and 0 missed, an empty prediction 0 false. The
    policy for empty masks does not change these numbers.

    Args:
        prediction: bool (D, H, W). A crop gives the same counts if it has all voxels of both masks.
        truth: bool, the same shape.
        voxel: volume of a voxel in mm^3. Defaults to 1.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> truth = np.zeros((20, 20, 20), dtype=bool)
        >>> truth[2:6, 2:6, 2:6] = truth[12:16, 12:16, 12:16] = True  # two lesions of 64 voxels
        >>> prediction = np.zeros_like(truth)
        >>> prediction[7, 7, 5] = prediction[2, 18, 2] = True  # near the first, and far from both
        >>> count_lesions(prediction, truth)
        LesionCounts(true=2, missed=1, false=1)

    Source: the rules for adult glioma of the BraTS 2023 challenge, https://github.com/rachitsaluja/BraTS-2023-Metrics.
    """
    from scipy import ndimage

    if prediction.shape != truth.shape:
        raise ValueError(f"prediction: got {prediction.shape}, expected the truth's {truth.shape}")
    neighbours = ndimage.generate_binary_structure(truth.ndim, truth.ndim)
    components, count = ndimage.label(prediction, neighbours)
    near = _near(truth)  # all that matters of the truth lies in this box
    dilated = ndimage.binary_dilation(
        truth[near], ndimage.generate_binary_structure(truth.ndim, 2), iterations=DILATION
    )
    lesions, number = ndimage.label(dilated, neighbours)
    large = _voxels(lesions[truth[near]], number) * voxel > SMALLEST
    found = _voxels(lesions[prediction[near]], number) > 0
    touching = np.unique(components[near][(lesions > 0) & prediction[near]])
    return LesionCounts(int(large.sum()), int((large & ~found).sum()), int(count - len(touching)))


def _near(truth: NDArray[np.bool_]) -> tuple[slice, ...]:
    """The box around the dilated truth; an empty one if there is no truth."""
    box = bounding_box(torch.from_numpy(truth))
    if box is None:
        return tuple(slice(0, 0) for _ in truth.shape)
    return tuple(slice(max(0, low - DILATION), high + DILATION) for low, high in box)


def _voxels(labels: NDArray[Any], number: int) -> NDArray[np.int64]:
    """How many of ``labels`` are 1, 2, ..., ``number``."""
    return np.bincount(labels, minlength=number + 1)[1:]
