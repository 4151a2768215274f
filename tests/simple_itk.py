"""Overlap, surface distances and volumes by SimpleITK, whose filters share no code with MONAI or scipy."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from metric_cases import Mask, MaskPair
from numpy.typing import NDArray

sitk: Any = pytest.importorskip("SimpleITK")


class Measured(NamedTuple):
    """Dice, HD95 in mm, the surface Dice, and both volumes in mm^3 (in 2-D areas in mm^2)."""

    dice: float
    hd95: float
    nsd: float
    predicted: float
    true: float


def measured(pair: MaskPair, *, tolerance: float) -> Measured:
    """The metrics of two masks that are not empty."""
    prediction, truth = (_image(mask, pair.spacing) for mask in (pair.prediction, pair.truth))
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(truth, prediction)
    there, back = _distances(prediction, truth), _distances(truth, prediction)
    near = (there <= tolerance + 1e-6).sum() + (back <= tolerance + 1e-6).sum()
    return Measured(
        overlap.GetDiceCoefficient(1),
        max(float(np.percentile(each, 95)) for each in (there, back)),
        float(near / (len(there) + len(back))),
        _volume(prediction),
        _volume(truth),
    )


def similarity(pair: MaskPair) -> float:
    """2 (P - T) / (P + T) of the volumes P and T."""
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*(_image(mask, pair.spacing) for mask in (pair.prediction, pair.truth)))
    return float(overlap.GetVolumeSimilarity(1))


def _image(mask: Mask, spacing: tuple[float, ...]) -> Any:
    # Its axes are in the opposite order. A margin of one voxel makes the faces of the volume an outside.
    image = sitk.GetImageFromArray(np.pad(mask, 1).astype(np.uint8))
    image.SetSpacing(spacing[::-1])
    return image


def _distances(source: Any, other: Any) -> NDArray[np.float64]:
    """From each surface voxel of ``source`` to the nearest surface voxel of ``other``, in mm."""
    from_other = sitk.SignedMaurerDistanceMap(
        _surface(other), insideIsPositive=False, squaredDistance=False, useImageSpacing=True
    )
    # The surface itself has distances of 0 and less.
    away = np.maximum(sitk.GetArrayFromImage(from_other), 0)
    distances: NDArray[np.float64] = away[sitk.GetArrayFromImage(_surface(source)) > 0]
    return distances


def _surface(image: Any) -> Any:
    return sitk.LabelContour(image, fullyConnected=False)


def _volume(image: Any) -> float:
    shape = sitk.LabelShapeStatisticsImageFilter()
    shape.Execute(image)
    return float(shape.GetPhysicalSize(1))


def lesions(prediction: Mask, truth: Mask, *, voxel: float) -> tuple[int, int, int]:
    """True, missed and false lesions in 3-D by the rules of BraTS 2023, see ``count_lesions``."""
    predicted, true = (_image(mask, (1.0, 1.0, 1.0)) for mask in (prediction, truth))
    # Dilation reaches beyond a margin of one voxel.
    predicted, true = (sitk.ConstantPad(image, [3] * 3, [3] * 3, 0) for image in (predicted, true))
    components = sitk.GetArrayFromImage(_components(predicted))
    grown = sitk.GetArrayFromImage(_components(_grown(true)))
    inside = sitk.GetArrayFromImage(true) > 0
    count = missed = 0
    for number in range(1, int(grown.max()) + 1):
        lesion = grown == number
        if (lesion & inside).sum() * voxel > 50:
            count += 1
            missed += not components[lesion].any()
    touching = set(np.unique(components[grown > 0])) - {0}
    return count, int(missed), int(components.max()) - len(touching)


def _grown(image: Any) -> Any:
    """Three steps of dilation by 18 neighbours: a square in each of the three planes."""
    for _ in range(3):
        planes = [
            sitk.BinaryDilate(image, radius, sitk.sitkBox)
            for radius in ((1, 1, 0), (1, 0, 1), (0, 1, 1))
        ]
        image = planes[0] | planes[1] | planes[2]
    return image


def _components(image: Any) -> Any:
    """Connected components by 26 neighbours, numbered from 1."""
    return sitk.ConnectedComponent(image, True)  # with overloads, it takes no names
