"""Pairs of masks on which metrics are compared with those of other libraries."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, gaussian_filter

Mask = NDArray[np.bool_]


class MaskPair(NamedTuple):
    """A prediction and a truth, with the size of a voxel in mm."""

    prediction: Mask
    truth: Mask
    spacing: tuple[float, ...]


def blob(seed: int, shape: tuple[int, ...] = (16, 18, 14), *, border: bool = False) -> Mask:
    """Smooth random islands; with ``border`` they reach the faces of the volume."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2.0)
    mask: Mask = noise > np.quantile(noise, 0.85)
    if not border:
        inner = tuple(slice(2, -2) for _ in shape)
        inside = np.zeros(shape, dtype=bool)
        inside[inner] = True
        mask &= inside
    return mask


def voxel(*place: int, shape: tuple[int, ...] = (16, 18, 14)) -> Mask:
    mask = np.zeros(shape, dtype=bool)
    mask[place] = True
    return mask


def box(low: int, high: int, shape: tuple[int, ...] = (16, 18, 14)) -> Mask:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(low, high) for _ in shape)] = True
    return mask


ISOTROPIC, THICK, THIN = (1.0, 1.0, 1.0), (0.7, 0.9, 5.0), (2.5, 0.5, 0.5)

#: Name -> the pair. None of the masks is empty.
PAIRS: dict[str, MaskPair] = {
    "the same": MaskPair(blob(0), blob(0), THICK),
    "one voxel each": MaskPair(voxel(3, 4, 5), voxel(8, 6, 9), THICK),
    "the same voxel": MaskPair(voxel(3, 4, 5), voxel(3, 4, 5), ISOTROPIC),
    "neighbouring voxels": MaskPair(voxel(3, 4, 5), voxel(3, 4, 6), THICK),
    "one voxel in a blob": MaskPair(voxel(7, 9, 6), blob(2, border=True), THIN),
    "a voxel in each corner": MaskPair(voxel(0, 0, 0), voxel(-1, -1, -1), THIN),
    "a box in a box": MaskPair(box(5, 9), box(3, 11), THICK),
    "a box and its shell": MaskPair(box(3, 11), box(3, 11) & ~box(4, 10), ISOTROPIC),
    "the whole volume": MaskPair(
        np.ones((6, 5, 4), dtype=bool), voxel(2, 2, 2, shape=(6, 5, 4)), THIN
    ),
    "a part of the surface": MaskPair(box(3, 11) & ~box(3, 5), box(3, 11), THICK),
    "apart": MaskPair(box(1, 4), box(10, 13), THICK),
    "a slice": MaskPair(blob(3)[:, :, 6:7], blob(4)[:, :, 6:7] | blob(3)[:, :, 6:7], THICK),
    "in a plane": MaskPair(blob(5, (30, 24)), blob(6, (30, 24)), (0.8, 1.5)),
    "in a plane, at its edges": MaskPair(
        blob(7, (30, 24), border=True), blob(8, (30, 24), border=True), (1.0, 3.0)
    ),
    "eroded": MaskPair(binary_erosion(blob(9, border=True)), blob(9, border=True), ISOTROPIC),
}
PAIRS |= {
    f"blobs {seed}, {name}": MaskPair(
        blob(seed, border=seed % 2 == 0), blob(seed + 100, border=seed % 2 == 0), spacing
    )
    for seed in range(10, 16)
    for name, spacing in {"isotropic": ISOTROPIC, "thick": THICK, "thin": THIN}.items()
}
# Most surfaces are shared, as in a good segmentation.
PAIRS |= {
    f"nearly the same {seed}": MaskPair(
        blob(seed) & ~np.roll(blob(seed + 50), 2, 0), blob(seed), spacing
    )
    for seed, spacing in zip(range(20, 24), (ISOTROPIC, THICK, THIN, THICK), strict=True)
}


def ellipsoids(seed: int, shape: tuple[int, int, int] = (60, 50, 40)) -> tuple[Mask, Mask]:
    """A prediction and a truth with lesions of all sizes, some of them shared, cut or near another."""
    generator = np.random.default_rng(seed)
    masks = np.zeros((2, *shape), dtype=bool)
    place = np.moveaxis(np.indices(shape), 0, -1)
    for number in range(18):
        centre, radii = generator.uniform(0, shape), generator.uniform(0.5, 4.5, 3)
        inside = (((place - centre) / radii) ** 2).sum(-1) < 1
        for part in ((0,), (1,), (0, 1))[number % 3]:
            masks[part] |= inside
    return masks[0], masks[1]
