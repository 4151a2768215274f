"""Stacks of slices as scanners acquire them, each with a lesion at one place of the patient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from niftis import affine_of, reorient, save
from numpy.typing import NDArray

#: Every order and direction of the axes: RAS, RAI, RPS, ...
CODES = ["".join(c) for axes in permutations(("RL", "AP", "SI")) for c in product(*axes)]


@dataclass(frozen=True)
class Stack:
    """The grid of a stack.

    Args:
        shape: (D, H, W).
        affine: (4, 4), from voxel indices to mm.
        axis: the array axis of the slices.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    axis: int

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Two sizes in the plane of a slice, then the distance of the slices, mm."""
        sizes = [float(s) for s in nib.affines.voxel_sizes(self.affine)]
        through = sizes.pop(self.axis)
        return sizes[0], sizes[1], through

    @property
    def slices(self) -> int:
        return self.shape[self.axis]

    @property
    def centre(self) -> NDArray[np.float64]:
        """Where the lesion is, mm: off the centre, so that a flip is noticed."""
        index = [(n - 1) * share for n, share in zip(self.shape, (0.4, 0.6, 0.55), strict=True)]
        place: NDArray[np.float64] = nib.affines.apply_affine(self.affine, index)
        return place

    def distance(self) -> NDArray[np.float64]:
        """Distance of each voxel from the lesion's centre, mm."""
        index = np.stack(np.meshgrid(*map(np.arange, self.shape), indexing="ij"), -1)
        places = nib.affines.apply_affine(self.affine, index)
        return np.asarray(np.linalg.norm(places - self.centre, axis=-1))

    def label(self, radius: float) -> NDArray[np.int16]:
        return (self.distance() <= radius).astype(np.int16)

    def image(self, radius: float, *, seed: int = 0) -> NDArray[np.float32]:
        """Body of intensity 100 with noise, in a frame of zeros; the lesion has 300."""
        image = np.random.default_rng(seed).normal(100, 5, self.shape)
        image[self.distance() <= radius] = 300
        return image.astype(np.float32)

    def write(
        self, folder: Path, *, radius: float, modalities: Sequence[str] = ("t1",), seed: int = 0
    ) -> Path:
        """Write one case with a label."""
        for k, name in enumerate(modalities):
            save(self.image(radius, seed=seed + 10 * k), folder / f"{name}.nii.gz", self.affine)
        save(self.label(radius), folder / "seg.nii.gz", self.affine)
        return folder


def reoriented(stack: Stack, codes: str) -> Stack:
    """The same stack, with the axes of its files in another order."""
    marked = np.zeros(stack.shape, np.int32)
    moved, affine = reorient(marked, stack.affine, codes)
    axis = int(np.argmax(nib.affines.voxel_sizes(affine)))
    d, h, w = moved.shape
    return Stack((d, h, w), affine, axis)


def oblique(shape: tuple[int, int, int], spacing: Sequence[float]) -> NDArray[np.float64]:
    """The affine of a short-axis stack: no axis is along one of the patient."""
    turn: Any = nib.eulerangles.euler2mat(0.5, -0.35, 0.6)
    middle = turn @ np.diag(spacing) @ ((np.array(shape) - 1) / 2)
    return np.asarray(
        nib.affines.from_matvec(turn @ np.diag(spacing), [10.0, -25.0, 40.0] - middle)
    )


_AXIAL = Stack((44, 36, 9), affine_of((1.5, 1.5, 10.0)), 2)
STACKS = {
    "axial": _AXIAL,
    "sagittal": Stack((40, 32, 9), affine_of((1.5, 1.5, 6.0))[[2, 0, 1, 3]], 2),
    "sagittal, slices first": Stack((9, 40, 32), affine_of((6.0, 1.5, 1.5)), 0),
    "coronal": Stack((40, 9, 32), affine_of((1.5, 6.0, 1.5)), 1),
    "coronal, slices last": Stack((40, 32, 9), affine_of((1.5, 1.5, 6.0))[[0, 2, 1, 3]], 2),
    "short-axis": Stack((60, 45, 8), oblique((60, 45, 8), (1.2, 1.2, 10.0)), 2),
    "short-axis, slices first": Stack((8, 60, 45), oblique((8, 60, 45), (10.0, 1.2, 1.2)), 0),
    "isotropic": Stack((36, 32, 28), affine_of((1.5, 1.5, 1.5)), 2),
    "isotropic, sagittal": Stack((36, 32, 28), affine_of((1.5, 1.5, 1.5))[[2, 0, 1, 3]], 2),
    "one slice": Stack((44, 36, 1), affine_of((1.5, 1.5, 10.0)), 2),
    "one sagittal slice": Stack((1, 44, 36), affine_of((1.0, 1.5, 1.5)), 0),
}
#: Radius of the lesion, mm: it spans slices 10 mm apart.
RADIUS = 13.0
