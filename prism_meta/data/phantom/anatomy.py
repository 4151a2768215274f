"""Anatomy of a phantom: a brain with a tumour as soft tissue maps, drawn in millimetres.

A shape is a depth in mm (positive inside), so that partial volume is a ramp one voxel wide. The
axes are x to the left, y to the back and z up, with the origin in the middle of the volume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from prism_meta.data.phantom.space import FloatArray, Space, ramp
from prism_meta.data.phantom.tissues import Tissue


@dataclass(frozen=True)
class Anatomy:
    """The tissues and labels of one subject, before imaging.

    Args:
        maps: (8, D, H, W), fraction of each ``Tissue`` in a voxel; the fractions sum to 1.
        brain: (D, H, W) bool, the voxels that skull-stripping keeps.
        label: (D, H, W), 0 background, 1 necrotic or non-enhancing core, 2 oedema, 4 enhancing
            tumour.
    """

    maps: FloatArray
    brain: NDArray[np.bool_]
    label: NDArray[np.uint8]


def draw_anatomy(rng: np.random.Generator, space: Space) -> Anatomy:
    """Draw a brain with one tumour.

    Args:
        rng: source of the random numbers.
        space: the voxel grid.

    Example:
        >>> drawn = draw_anatomy(np.random.default_rng(0), Space((40, 48, 36), 4.0))
        >>> drawn.maps.shape, bool(np.allclose(drawn.maps.sum(0), 1, atol=1e-4))
        ((8, 40, 48, 36), True)
    """
    points = space.points()
    posed = _pose(rng, space, points)
    depth, cerebellum = _outline(posed)
    depth = depth + 0.9 * space.field(rng, 4.5)  # the gyri are visible on the surface
    radius = rng.uniform(16, 33)
    centre = _tumour_centre(rng, points, posed, np.minimum(depth, -cerebellum))
    maps = _healthy(
        rng, space, _mass_effect(posed, points - centre, radius, rng), depth, cerebellum
    )
    label = _grow_tumour(rng, space, maps, points - centre, radius, depth, posed[0])
    brain = depth > rng.uniform(-0.6, 1.0) + 0.5 * space.field(rng, 8.0)
    return Anatomy(maps, brain, np.where(brain, label, 0).astype(np.uint8))


def _relu(value: FloatArray) -> FloatArray:
    return np.maximum(value, 0)


def _paint(maps: FloatArray, tissue: Tissue, cover: FloatArray) -> None:
    """Replace the fraction ``cover`` of each voxel with ``tissue``, in place."""
    maps *= 1 - cover
    maps[tissue] += cover


def _ellipsoid(points: FloatArray, centre: Sequence[float], radii: Sequence[float]) -> FloatArray:
    """First-order depth inside an ellipsoid, mm."""
    scale = np.asarray(radii, np.float32).reshape(3, 1, 1, 1)
    offset = (points - np.asarray(centre, np.float32).reshape(3, 1, 1, 1)) / scale
    norm = np.sqrt((offset**2).sum(0)) + np.float32(1e-3)
    slope = np.sqrt(((offset / scale) ** 2).sum(0)) / norm
    depth: FloatArray = (1 - norm) / np.maximum(slope, 1 / max(radii))
    return depth


def _mirrored(points: FloatArray) -> FloatArray:
    return np.stack([np.abs(points[0]), points[1], points[2]])


def _pose(rng: np.random.Generator, space: Space, points: FloatArray) -> FloatArray:
    """Positions in the standard brain after a small rotation, a change of size and a deformation."""
    a, b, c = np.deg2rad(rng.normal(0, 3, 3).clip(-6, 6))
    turn = np.array([[1, c, -b], [-c, 1, a], [b, -a, 1]])  # small angles
    turn /= np.linalg.norm(turn, axis=1, keepdims=True) * rng.uniform(0.95, 1.04, (3, 1))
    posed: FloatArray = np.tensordot(turn.astype(np.float32), points, 1)
    for axis in posed:
        axis += 2.2 * space.field(rng, 25.0)
    return posed


def _outline(posed: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Depth inside the whole brain, and depth inside the cerebellum and brain stem."""
    base = posed.copy()
    base[2] = np.where(posed[2] < 0, posed[2] * 1.2, posed[2])
    base[0] *= 1 + 0.0016 * _relu(-posed[1])  # the frontal lobes are narrower
    cerebrum = _ellipsoid(base, (0, 0, 7), (68, 84, 58))
    cerebellum = _ellipsoid(_mirrored(posed), (16, 44, -40), (34, 32, 26))
    stem = _ellipsoid(posed, (0, 14, -42), (14, 13, 30))
    return np.maximum(np.maximum(cerebrum, cerebellum), stem), np.maximum(cerebellum, stem)


def _tumour_centre(
    rng: np.random.Generator, points: FloatArray, posed: FloatArray, depth: FloatArray
) -> FloatArray:
    """A point in the white matter of one hemisphere, away from the midline and the skull base."""
    away = (np.abs(posed[0]) > 22) & (posed[2] > -18)
    inside = np.argwhere((depth > 15) & (depth < 42) & away)
    chosen = tuple(inside[rng.integers(len(inside))])
    return points[(slice(None), *chosen)].reshape(3, 1, 1, 1)


def _mass_effect(
    posed: FloatArray, offset: FloatArray, radius: float, rng: np.random.Generator
) -> FloatArray:
    """Positions after the tumour has pushed its surroundings outwards, most at its border."""
    reach = (offset**2).sum(0) / (2 * radius**2)
    pushed: FloatArray = posed - offset * np.float32(rng.uniform(0.1, 0.4)) * np.exp(-reach)
    return pushed


def _cortex_distance(
    rng: np.random.Generator,
    space: Space,
    posed: FloatArray,
    depth: FloatArray,
    cerebellum: FloatArray,
) -> FloatArray:
    """Distance to the pial surface, which consists of the outer surface, the sulci and the fissures."""
    x, y, z = posed
    norm = np.sqrt((x / 68) ** 2 + (y / 84) ** 2 + ((z - 7) / 58) ** 2).clip(0.35, None)
    half = (np.array(space.shape).reshape(3, 1, 1, 1) - 1) / 2
    # Sampled near the surface, so that the sulci run inwards.
    at = (posed / norm**0.6 / space.spacing + half).astype(np.float32)
    folds = ndimage.map_coordinates(space.field(rng, 2.9), at, order=1, mode="mirror")
    reach = rng.uniform(14, 19) + 5 * space.field(rng, 12.0)
    sulci = space.zero_distance(folds) + _relu(depth - reach)
    callosum = 1 - np.sqrt(((y + 2) / 46) ** 2 + ((z - 2) / 27) ** 2)
    midline = np.abs(x) + 30 * _relu(callosum)
    insula = np.sqrt(
        (z + 6 + 0.35 * y) ** 2 + _relu(36 - np.abs(x)) ** 2 + _relu(np.abs(y + 6) - 24) ** 2
    )
    tentorium = np.abs(cerebellum)
    parts = [depth, sulci, midline, insula, tentorium]
    return np.asarray(np.minimum.reduce(parts), np.float32)


def _ventricles(rng: np.random.Generator, space: Space, posed: FloatArray) -> FloatArray:
    """Depth inside the lateral and third ventricles. Their size varies strongly between subjects."""
    x, y, z = posed
    size = rng.uniform(0.7, 1.5)
    width = 5.0 * size * (1 + 0.2 * space.field(rng, 14.0))
    height = 7.5 * size**0.5
    along = (y + 4) / 37
    across = (np.abs(x) - (4.5 + 4 * size + 12 * along**2)) / width
    up = (z - 12 + 12 * along**2) / height
    horn = (1 - np.sqrt(across**2 + up**2 + along**4)) * width
    third = _ellipsoid(posed, (0, 8, -6), (1.8 * size + 0.8, 14, 12))
    return np.asarray(np.maximum(horn, third), np.float32)


def _healthy(
    rng: np.random.Generator,
    space: Space,
    posed: FloatArray,
    depth: FloatArray,
    cerebellum: FloatArray,
) -> FloatArray:
    """Tissue maps of the brain without the tumour. The outside is CSF."""
    maps = np.zeros((len(Tissue), *space.shape), np.float32)
    maps[Tissue.WHITE] = 1
    sides = _mirrored(posed)
    for centre, radii in (
        ((12, 13, 3), (8, 13, 9)),  # thalamus
        ((26, -5, 3), (5, 16, 10)),  # putamen and pallidum
        ((14, -24, 8), (5, 9, 9)),  # head of the caudate nucleus
    ):
        _paint(maps, Tissue.DEEP_GREY, space.cover(_ellipsoid(sides, centre, radii)))
    pial = _cortex_distance(rng, space, posed, depth, cerebellum)
    stem = space.cover(_ellipsoid(posed, (0, 14, -42), (12, 11, 34)))
    thickness = rng.uniform(2.8, 3.5) + 0.5 * space.field(rng, 6.0)
    gap = rng.uniform(0.1, 0.9) + 0.35 * space.field(rng, 12.0)  # sulci widen with age
    _paint(maps, Tissue.GREY, space.cover(thickness + gap - pial) * (1 - stem))
    _paint(maps, Tissue.CSF, space.cover(np.minimum(gap, 2.0) - pial) * (1 - stem))
    ventricles = _ventricles(rng, space, posed)
    _paint(maps, Tissue.CSF, space.cover(ventricles))
    # White-matter hyperintensities are bright in FLAIR and T2, but no tumour.
    spots = _relu(space.field(rng, 3.0) - rng.uniform(2.4, 3.4)) * 3
    caps = np.exp(-(((ventricles + 1.5) / 2) ** 2)) * rng.uniform(0, 0.35)
    lesion = np.minimum(spots + caps, 0.7) * (maps[Tissue.WHITE] > 0.9) * (depth > 10)
    _paint(maps, Tissue.OEDEMA, lesion.astype(np.float32))
    _paint(maps, Tissue.VESSEL, _vessels(rng, space, depth))
    _paint(maps, Tissue.CSF, space.cover(0.3 - depth))
    return maps


def _vessels(rng: np.random.Generator, space: Space, depth: FloatArray) -> FloatArray:
    """Thin curves where two noise fields are both 0, mostly near the surface."""
    tube = np.hypot(
        space.zero_distance(space.field(rng, 9.0)), space.zero_distance(space.field(rng, 9.0))
    )
    return space.cover(rng.uniform(0.5, 1.1) - tube - 0.03 * _relu(depth - 6))


def _grow_tumour(
    rng: np.random.Generator,
    space: Space,
    maps: FloatArray,
    offset: FloatArray,
    radius: float,
    depth: FloatArray,
    x: FloatArray,
) -> NDArray[np.uint8]:
    """Paint oedema and core into ``maps`` and return the labels.

    High-grade tumours (about 5 of 6) have an enhancing ring of varying thickness around necrosis, or
    are a solid enhancing nodule. Low-grade tumours have a core that does not enhance, and little
    oedema.
    """
    high_grade, solid = rng.random() < 0.83, rng.random() < 0.15
    stretch = rng.uniform(0.8, 1.25, 3)
    stretch /= stretch.prod() ** (1 / 3)
    distance = np.sqrt(((offset * stretch.reshape(3, 1, 1, 1)) ** 2).sum(0))
    distance = distance.astype(np.float32)
    home = np.sign(np.median(x[distance <= distance.min() + space.spacing]))
    bumps = 0.7 * space.field(rng, 11.0) + 0.5 * space.field(rng, 5.0)
    fluid = maps[Tissue.CSF].copy()
    shared = bumps * 0.19 * radius - 1.5 * _relu(-x * home)  # the falx stops the growth

    core_radius = radius * (rng.uniform(0.45, 0.72) if high_grade else rng.uniform(0.7, 0.9))
    core = np.minimum(core_radius - distance + shared, depth - 1.5)
    core = core - 30 * _relu(ndimage.gaussian_filter(fluid, 0.7) - 0.5) * (depth > 20)
    grey = ndimage.gaussian_filter(maps[Tissue.GREY] + 0.5 * maps[Tissue.DEEP_GREY], 0.8)
    fingers = 0.22 * radius * space.field(rng, 7.0)
    spread = radius - distance + shared + fingers - 6 * grey - 40 * _relu(fluid - 0.3)
    whole = np.maximum(np.minimum(spread, depth - 1.5), core)

    soaked = np.clip(0.68 + 0.17 * space.field(rng, 8.0), 0.4, 1)
    _paint(maps, Tissue.OEDEMA, (ramp(whole, 5.0) * soaked).astype(np.float32))
    label = np.where(whole > 0, 2, 0)
    inner = space.cover(core) if high_grade else ramp(core, 5.0)
    texture = np.clip(0.22 + 0.15 * space.field(rng, 4.0), 0, 0.6)  # solid parts of the core
    if not high_grade:
        texture = np.clip(texture + rng.uniform(0.2, 0.5), 0, 0.9)
    _paint(maps, Tissue.NECROSIS, inner)
    soft = (inner * texture).astype(np.float32)
    _paint(maps, Tissue.OEDEMA, soft)
    label[core > 0] = 1
    if high_grade:
        ring = rng.uniform(2.8, 6.0) * (1 + 0.6 * space.field(rng, 7.0))
        ring = np.where(solid, 2 * core_radius, ring) - core
        rim = inner * space.cover(ring.astype(np.float32))
        _paint(maps, Tissue.ENHANCING, rim)
        label[(core > 0) & (ring > 0)] = 4
    return label.astype(np.uint8)
