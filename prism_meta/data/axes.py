"""The axes of a case: which one its slices are stacked along, and their order on the model's grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from nibabel import orientations
from numpy.typing import NDArray

#: Voxel sizes are alike up to this factor. A little more than 1.1, because headers are rounded.
_ALIKE = 1.1001
#: Directions to which the axes of the model's grid point, by axis of the patient.
_POSITIVE = "RAS"


def slice_axis(shape: Sequence[int], affine: NDArray[np.float64]) -> int:
    """The array axis that the slices of a volume are stacked along.

    This is the axis of the largest voxels, as in stacks of thick slices. Where several axes have the
    largest voxels, within 10 percent, it is the last of them; so it is the third axis of an isotropic
    volume. An axis of one voxel is the slice axis of a single slice, whatever its header says of the
    thickness.

    Args:
        shape: (D, H, W).
        affine: (4, 4), from voxel indices to mm.

    Example:
        >>> slice_axis((8, 120, 90), np.diag([10.0, 1.2, 1.2, 1.0]))
        0
        >>> slice_axis((60, 60, 60), np.eye(4))
        2
    """
    single = [axis for axis, size in enumerate(shape) if size == 1]
    if single:
        return single[-1]
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    return int(np.flatnonzero(sizes * _ALIKE >= sizes.max())[-1])


def patient_axes(affine: NDArray[np.float64]) -> list[int]:
    """For each array axis, the nearest axis of the patient: 0 left-right, 1 front-back, 2 up-down.

    Example:
        >>> patient_axes(np.diag([1.0, -1.0, 2.0, 1.0])[[2, 0, 1, 3]])
        [1, 2, 0]
    """
    return [int(axis) for axis in orientations.io_orientation(affine)[:, 0]]


def model_codes(shape: Sequence[int], affine: NDArray[np.float64]) -> str:
    """Where the axes of the model's grid point to: right, anterior and superior, the slice axis last.

    Example:
        >>> model_codes((60, 60, 60), np.eye(4))
        'RAS'
        >>> model_codes((8, 120, 90), np.diag([10.0, 1.2, 1.2, 1.0]))
        'ASR'
    """
    through = _POSITIVE[patient_axes(affine)[slice_axis(shape, affine)]]
    return _POSITIVE.replace(through, "") + through
