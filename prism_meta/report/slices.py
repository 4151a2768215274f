"""Slices of volumes, turned as radiologists look at them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_meta.data.axes import patient_axes
from prism_meta.data.cases import Volume

#: Planes by the axis of the patient that is normal to them.
_PLANES = ("sagittal", "coronal", "axial")


class Slice:
    """The slice of a volume with the most labelled voxels; of equal ones, or without any, the middle one.

    Args:
        volume: the volume; its first image is the background.
        labels: (D, H, W) int, class indices, which choose the slice.
        axis: the array axis that is normal to the slice.

    Attributes:
        plane: ``axial``, ``coronal`` or ``sagittal``, the nearest of them.
        pixel: height and width of a pixel in mm.
        name: the modality of the background.
        background: the image, (H, W) float32.
        truth: ``labels`` in this slice.
    """

    def __init__(self, volume: Volume, labels: NDArray[Any], axis: int) -> None:
        self._axis = axis
        others = tuple(a for a in range(3) if a != axis)
        counts = (labels > 0).sum(axis=others)
        best = np.flatnonzero(counts == counts.max())
        self._index = int(best[len(best) // 2])
        nearest = patient_axes(volume.affine)
        across, down = sorted(others, key=lambda axis: nearest[axis])
        self._swap = (across, down) != others
        # The axes of the patient grow to the right, to the front and upwards, against the picture's.
        self._flips = [
            i for i, axis in enumerate((across, down)) if volume.affine[nearest[axis], axis] > 0
        ]
        self.plane = _PLANES[nearest[axis]]
        self.pixel = (float(volume.spacing[down]), float(volume.spacing[across]))
        self.name, image = next(iter(volume.images.items()))
        self.background = self.cut(image).astype(np.float32)
        self.truth = self.cut(labels)

    def cut(self, array: NDArray[Any]) -> NDArray[Any]:
        """Cut the slice from an array (D, H, W) and turn it.

        The patient's head, or else the nose, is up. The patient's right, or else the nose, is on the left.
        """
        plane = np.take(array, self._index, axis=self._axis)
        if self._swap:
            plane = plane.T
        for axis in self._flips:
            plane = np.flip(plane, axis)
        return np.asarray(plane.T)
