"""Lesions by the rules of BraTS 2023: volumes with known counts, and the rules written out one by one."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, generate_binary_structure, label

from prism_meta.evaluation.lesions import count_lesions

Box = tuple[slice, slice, slice]


def volume(*boxes: tuple[int, int, int, int]) -> NDArray[np.bool_]:
    """A volume with cubes: the lowest corner of each, and its edge."""
    mask = np.zeros((40, 30, 30), dtype=bool)
    for x, y, z, edge in boxes:
        mask[x : x + edge, y : y + edge, z : z + edge] = True
    return mask


A, B = (3, 3, 3, 4), (25, 20, 20, 5)
NONE = volume()

CASES = {
    "both are empty": (NONE, NONE, (0, 0, 0)),
    "both are missed": (NONE, volume(A, B), (2, 2, 0)),
    "two are invented": (volume(A, B), NONE, (0, 0, 2)),
    "the same": (volume(A, B), volume(A, B), (2, 0, 0)),
    "one is found, one is missed, one is invented": (
        volume((4, 4, 4, 2), (3, 25, 3, 1)), volume(A, B), (2, 1, 1),
    ),
    # The cube A ends at voxel 6; its dilation by three steps ends at 9.
    "three voxels beside it": (volume((9, 4, 4, 1)), volume(A), (1, 0, 0)),
    "four voxels beside it": (volume((10, 4, 4, 1)), volume(A), (1, 1, 1)),
    # 18 neighbours reach two axes in a step: (9, 9, 6) from the corner (6, 6, 6), but (9, 9, 9) in no three.
    "three voxels off along two axes": (volume((9, 9, 6, 1)), volume(A), (1, 0, 0)),
    "three voxels off along three axes": (volume((9, 9, 9, 1)), volume(A), (1, 1, 1)),
    "two voxels off along three axes": (volume((8, 8, 8, 1)), volume(A), (1, 0, 0)),
    # The dilations of cubes 6 voxels apart are neighbours; those of cubes 7 apart have a gap.
    "two near each other are one": (volume(A), volume(A, (13, 3, 3, 4)), (1, 0, 0)),
    "two apart are two": (volume(A), volume(A, (14, 3, 3, 4)), (2, 1, 0)),
    # 48 voxels are left out, neither missed nor found; what touches them is not false.
    "a small one is missed": (NONE, volume((3, 3, 3, 3)), (0, 0, 0)),
    "a small one is found": (volume((3, 3, 3, 3)), volume((3, 3, 3, 3)), (0, 0, 0)),
    "one that bridges two": (
        volume(A, (7, 3, 3, 4), (11, 3, 3, 4), (15, 3, 3, 4)), volume(A, (17, 3, 3, 4)), (2, 0, 0),
    ),
    "parts that touch at a corner are one": (volume((20, 5, 5, 2), (22, 7, 7, 2)), NONE, (0, 0, 1)),
    "a single voxel is false": (volume((20, 5, 5, 1)), NONE, (0, 0, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_known_counts(name: str) -> None:
    prediction, truth, expected = CASES[name]
    assert tuple(count_lesions(prediction, truth)) == expected


def test_fifty_voxels_do_not_count_and_fifty_one_do() -> None:
    truth = NONE.copy()
    truth[5:10, 5:10, 5:7] = True
    assert truth.sum() == 50
    assert count_lesions(NONE, truth) == (0, 0, 0)
    truth[5, 5, 7] = True
    assert count_lesions(NONE, truth) == (1, 1, 0)


def test_the_size_is_that_in_cubic_millimetres() -> None:
    truth = volume((3, 3, 3, 3))  # 27 voxels
    assert count_lesions(NONE, truth, voxel=1.8).true == 0  # 48.6 mm^3
    assert count_lesions(NONE, truth, voxel=1.9).true == 1  # 51.3 mm^3


def by_the_rules(
    prediction: NDArray[np.bool_], truth: NDArray[np.bool_], voxel: float
) -> tuple[int, int, int]:
    """Lesion by lesion on the whole volume, in the order in which the challenge tells its rules."""
    full, cross = np.ones((3, 3, 3)), generate_binary_structure(3, 2)
    predicted, count = label(prediction, full)
    grown, _ = label(binary_dilation(truth, cross, iterations=3), full)
    touched: set[int] = set()
    true = missed = 0
    for number in range(1, grown.max() + 1):
        lesion = truth & (grown == number)
        near = binary_dilation(lesion, cross, iterations=3)
        found = set(np.unique(predicted[near])) - {0}
        touched |= found
        if lesion.sum() * voxel > 50:
            true += 1
            missed += not found
    return true, missed, count - len(touched)


@pytest.mark.parametrize("seed", range(8))
def test_random_lesions_by_the_rules(seed: int) -> None:
    """Ellipsoids of all sizes, some of them shared, cut by the border or near another."""
    generator = np.random.default_rng(seed)
    shape = np.array((70, 60, 50))
    masks = np.zeros((2, *shape), dtype=bool)
    for number in range(24):
        centre, radii = generator.uniform(0, shape), generator.uniform(0.5, 4.5, 3)
        place = np.moveaxis(np.indices(shape), 0, -1)
        inside = (((place - centre) / radii) ** 2).sum(-1) < 1
        for part in ((0,), (1,), (0, 1))[number % 3]:
            masks[part] |= inside
    prediction, truth = masks
    expected = by_the_rules(prediction, truth, 1.3)
    assert min(expected) > 0
    assert tuple(count_lesions(prediction, truth, voxel=1.3)) == expected


def test_a_crop_changes_nothing() -> None:
    prediction, truth = volume(A, (3, 20, 3, 4)), volume((10, 3, 3, 4), B)
    crop = np.s_[3:31, 3:26, 3:26]
    assert (prediction | truth).sum() == (prediction | truth)[crop].sum()
    assert count_lesions(prediction[crop], truth[crop]) == count_lesions(prediction, truth)


def test_shapes_that_differ() -> None:
    with pytest.raises(
        ValueError, match=r"prediction: got \(39, 30, 30\), expected the truth's \(40"
    ):
        count_lesions(NONE[1:], NONE)
