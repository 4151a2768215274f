"""The voxel grid of a phantom, and smooth random fields on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

FloatArray: TypeAlias = NDArray[np.float32]
Shape: TypeAlias = tuple[int, int, int]


def ramp(depth: FloatArray, width: float) -> FloatArray:
    """Soft step from 0 outside (negative depth) to 1 inside, over ``width`` mm.

    Example:
        >>> ramp(np.array([-2.0, 0.0, 0.5], np.float32), 2.0).tolist()
        [0.0, 0.5, 0.75]
    """
    return np.asarray(np.clip(0.5 + depth / width, 0, 1), np.float32)


@dataclass(frozen=True)
class Space:
    """A voxel grid centred on the origin, and the fields that are drawn on it. Lengths are in mm.

    Args:
        shape: (D, H, W) in voxels.
        spacing: edge of a voxel, mm.
    """

    shape: Shape
    spacing: float

    def axes(self) -> list[FloatArray]:
        """Positions of the voxels along each axis."""
        return [
            ((np.arange(n) - (n - 1) / 2) * self.spacing).astype(np.float32) for n in self.shape
        ]

    def points(self) -> FloatArray:
        """Position of every voxel: (3, D, H, W)."""
        return np.stack(np.meshgrid(*self.axes(), indexing="ij"))

    def field(self, rng: np.random.Generator, width: float) -> FloatArray:
        """Smooth noise of unit variance: Gaussians on a lattice, weighted with white noise.

        Args:
            rng: source of the noise.
            width: standard deviation of the Gaussians, and spacing of the lattice.

        Returns:
            (D, H, W).
        """
        nodes = [int(np.ceil(n * self.spacing / width)) + 6 for n in self.shape]
        value = rng.standard_normal(nodes).astype(np.float32)
        for axis, count in zip(self.axes(), nodes, strict=True):
            lattice = (np.arange(count) - (count - 1) / 2) * width
            weight = np.exp(-0.5 * ((axis[:, None] - lattice) / width) ** 2)
            weight /= np.sqrt((weight**2).sum(1, keepdims=True))
            # This contracts the first axis and appends the new one, so three passes restore the order.
            value = np.tensordot(value, weight.astype(np.float32), axes=(0, 1))
        return value

    def cover(self, depth: FloatArray) -> FloatArray:
        """Fraction of each voxel inside a surface; ``depth`` is positive inside."""
        return ramp(depth, self.spacing)

    def zero_distance(self, value: FloatArray) -> FloatArray:
        """First-order distance to the surface ``value`` = 0: |v| / |grad v|."""
        slopes = np.gradient(value, self.spacing)
        steepness = np.sqrt(sum(slope * slope for slope in slopes) + 1e-12)
        return np.asarray(np.abs(value) / steepness, np.float32)
