"""Grids: whether the files of a case lie on one, and the resampling of those that do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

#: What happens to files that do not lie on the grid of their case.
Align: TypeAlias = Literal["refuse", "resample"]
#: Files lie on one grid if no voxel is farther off than this, in voxels. No network sees less.
TOLERANCE = 0.1


def corners(shape: Sequence[int]) -> NDArray[np.float64]:
    """Homogeneous voxel indices of the corners of a volume: (4, 8).

    Example:
        >>> corners((2, 3, 4))[:, -1]
        array([1., 2., 3., 1.])
    """
    return np.array([[*c, 1.0] for c in product(*((0, n - 1) for n in shape))]).T


def voxel_sizes(affine: NDArray[np.float64]) -> tuple[float, ...]:
    """Voxel size in mm along each array axis.

    Example:
        >>> voxel_sizes(np.diag([1.0, -2.0, 3.0, 1.0]))
        (1.0, 2.0, 3.0)
    """
    return tuple(float(s) for s in np.linalg.norm(affine[:3, :3], axis=0))


def distance(
    shape: Sequence[int], affine: NDArray[np.float64], reference: NDArray[np.float64]
) -> float:
    """The largest distance between the voxels of two grids of one shape, in voxels of the reference.

    Args:
        shape: (D, H, W) of both.
        affine: (4, 4), from voxel indices to mm.
        reference: (4, 4), of the other grid.

    Example:
        >>> moved = np.eye(4)
        >>> moved[2, 3] = 1.0
        >>> distance((8, 8, 8), moved, np.diag([1.0, 1.0, 10.0, 1.0])) > 6  # at the last slice
        True
    """
    places = corners(shape)
    found = np.linalg.solve(reference, affine) @ places - places
    return float(np.abs(found[:3]).max())


def overlap(
    shape: Sequence[int],
    affine: NDArray[np.float64],
    other_shape: Sequence[int],
    other: NDArray[np.float64],
) -> bool:
    """Whether the box of one grid reaches into the box of the other, seen along the axes of either."""
    pairs = ((shape, affine, other_shape, other), (other_shape, other, shape, affine))
    for a_shape, a, b_shape, b in pairs:
        places = (np.linalg.solve(b, a) @ corners(a_shape))[:3]
        ends = np.asarray(b_shape, np.float64)
        if (places.max(1) < -0.5).any() or (places.min(1) > ends - 0.5).any():
            return False
    return True


def resample(
    image: NDArray[Any],
    affine: NDArray[np.float64],
    *,
    shape: tuple[int, int, int],
    reference: NDArray[np.float64],
    nearest: bool = False,
) -> NDArray[Any]:
    """Resample a volume onto another grid in world space; what lies outside of it becomes 0.

    Args:
        image: (D, H, W).
        affine: (4, 4), of the image.
        shape: of the other grid.
        reference: (4, 4), its affine.
        nearest: take the nearest voxel, for labels. Defaults to linear interpolation.

    Returns:
        An array of ``shape``, in the type of ``image``.

    Example:
        >>> image = np.arange(4.0).reshape(4, 1, 1)
        >>> moved = np.eye(4)
        >>> moved[0, 3] = 0.5
        >>> resample(image, np.eye(4), shape=(5, 1, 1), reference=moved).ravel()
        array([0.5, 1.5, 2.5, 3. , 0. ])
    """
    from monai.data.meta_tensor import MetaTensor
    from monai.transforms.spatial.array import SpatialResample

    # At the border and not 0: else the outer half of a thick slice would fade to black.
    transform = SpatialResample(
        mode="nearest" if nearest else "bilinear", padding_mode="border", dtype=torch.float64
    )
    source = MetaTensor(torch.from_numpy(image.astype(np.float64))[None], affine=affine)
    moved = transform(source, dst_affine=torch.from_numpy(reference), spatial_size=shape)
    result: NDArray[Any] = np.asarray(torch.as_tensor(moved.as_tensor())[0]).astype(image.dtype)
    result[~_inside(image.shape, affine, shape, reference)] = 0
    return result


def _inside(
    shape: Sequence[int],
    affine: NDArray[np.float64],
    other_shape: Sequence[int],
    other: NDArray[np.float64],
) -> NDArray[np.bool_]:
    """Which voxels of the other grid have their centre in a voxel of the first: bool of its shape."""
    change = np.linalg.solve(affine, other)
    indices = np.ogrid[tuple(slice(n) for n in other_shape)]
    inside = np.ones(other_shape, bool)
    for row, size in zip(change, shape, strict=False):
        place = row[3] + sum(step * index for step, index in zip(row, indices, strict=False))
        inside &= (place > -0.5 - 1e-6) & (place < size - 0.5 + 1e-6)
    return inside


class Notes:
    """What is odd about files, but no fault: collected over all cases, and told once.

    Example:
        >>> notes = Notes()
        >>> for k in range(5):
        ...     notes.add("grids differ", f"case p{k}: t2.nii.gz")
        >>> print(*notes.lines())
        grids differ (5 files): case p0: t2.nii.gz, case p1: t2.nii.gz, case p2: t2.nii.gz and 2 more
    """

    def __init__(self) -> None:
        self._files: dict[str, list[str]] = {}

    def add(self, statement: str, file: str) -> None:
        """Note that ``statement`` holds of a file."""
        self._files.setdefault(statement, []).append(file)

    def lines(self) -> Iterator[str]:
        """One line per statement, with the first files."""
        for statement, files in self._files.items():
            more = f" and {len(files) - 3} more" if len(files) > 3 else ""
            count = "1 file" if len(files) == 1 else f"{len(files)} files"
            yield f"{statement} ({count}): {', '.join(files[:3])}{more}"
