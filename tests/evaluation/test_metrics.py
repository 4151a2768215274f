"""Dice and HD95 against values worked out by hand, the empty-mask policies, and MONAI itself."""

from __future__ import annotations

import math

import pytest
import torch
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.meandice import compute_dice
from scipy.ndimage import gaussian_filter

from prism_meta.evaluation.metrics import (
    BratsEmpty,
    DiagonalEmpty,
    EmptyPolicy,
    NanEmpty,
    dice_hd95,
)

MM = (1.0, 1.0, 1.0)
EMPTY = torch.zeros(3, 2, 1, dtype=torch.bool)
FILLED = torch.ones(3, 2, 1, dtype=torch.bool)


def mask(shape: tuple[int, ...], *voxels: tuple[int, ...]) -> torch.Tensor:
    out = torch.zeros(shape, dtype=torch.bool)
    for voxel in voxels:
        out[voxel] = True
    return out


CUBE = torch.zeros(5, 5, 5, dtype=torch.bool)
CUBE[1:4, 1:4, 1:4] = True

GOLDEN = {
    "the same": (CUBE, CUBE, MM, 1.0, 0.0),
    "apart along the thick axis": (
        mask((6, 4, 4), (1, 1, 1)), mask((6, 4, 4), (3, 1, 1)), (5.0, 1.0, 1.0), 0.0, 10.0,
    ),
    "apart along a thin axis": (
        mask((6, 4, 4), (1, 1, 1)), mask((6, 4, 4), (1, 3, 1)), (5.0, 1.0, 1.0), 0.0, 2.0,
    ),
    "apart along a 3-4-5 diagonal": (
        mask((4, 4, 4), (0, 0, 0)), mask((4, 4, 4), (1, 1, 0)), (3.0, 4.0, 1.0), 0.0, 5.0,
    ),
    # Distances 0 and 0.5 mm both ways; their 95th percentile interpolates to 0.95 * 0.5 mm.
    "two voxels that share one": (
        mask((1, 1, 4), (0, 0, 0), (0, 0, 1)), mask((1, 1, 4), (0, 0, 1), (0, 0, 2)),
        (1.0, 1.0, 0.5), 0.5, 0.475,
    ),
    # 26 surface voxels: 6 at 1, 12 at sqrt 2, 8 at sqrt 3 mm; the centre is 1 mm from them.
    "a cube and its centre": (CUBE, mask((5, 5, 5), (2, 2, 2)), MM, 2 / 28, math.sqrt(3)),
    "in a plane": (
        mask((5, 5), (0, 0), (0, 1)), mask((5, 5), (2, 0), (2, 1)), (1.5, 1.0), 0.0, 3.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_by_hand(name: str) -> None:
    a, b, spacing, dice, hd95 = GOLDEN[name]
    for prediction, truth in ((a, b), (b, a)):
        got = dice_hd95(prediction, truth, spacing=spacing)
        assert got == pytest.approx((dice, hd95), abs=1e-6)


# The volume is 3 x 2 x 1 voxels of 1 x 2 x 12 mm, so its diagonal is |(3, 4, 12)| = 13 mm.
@pytest.mark.parametrize(
    ("policy", "both", "one"),
    [
        (BratsEmpty(), (1.0, 0.0), (0.0, 373.13)),
        (NanEmpty(), (math.nan, math.nan), (0.0, math.nan)),
        (DiagonalEmpty(), (1.0, 0.0), (0.0, 13.0)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_empty_masks(
    policy: EmptyPolicy, both: tuple[float, float], one: tuple[float, float]
) -> None:
    for prediction, truth, expected in (
        (EMPTY, EMPTY, both),
        (EMPTY, FILLED, one),
        (FILLED, EMPTY, one),
    ):
        got = dice_hd95(prediction, truth, spacing=(1.0, 2.0, 12.0), empty=policy)
        assert got == pytest.approx(expected, nan_ok=True)
    assert dice_hd95(FILLED, FILLED, spacing=(1.0, 2.0, 12.0), empty=policy) == (1.0, 0.0)


def test_the_diagonal_is_that_of_the_whole_volume() -> None:
    """For a box of 1 x 2 x 1 voxels of it, too."""
    got = dice_hd95(
        FILLED[:1], EMPTY[:1], spacing=(1.0, 2.0, 12.0), empty=DiagonalEmpty(), shape=FILLED.shape
    )
    assert got == (0.0, 13.0)


def test_brats_is_the_policy_unless_told() -> None:
    assert dice_hd95(FILLED, EMPTY, spacing=MM) == (0.0, 373.13)


@pytest.mark.parametrize("seed", range(6))
def test_the_box_changes_nothing(seed: int) -> None:
    """Blobs that touch the border or not, in a volume larger than they are, against MONAI."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, 14, 17, 12, generator=generator).numpy()
    smooth = torch.from_numpy(gaussian_filter(noise, (0, 2, 2, 2)))
    a, b = (smooth[i] > smooth[i].flatten().quantile(0.9) for i in range(2))
    if seed % 2:
        for blob in (a, b):
            blob[:3], blob[-3:], blob[:, :4] = False, False, False
    spacing = [3.0, 0.9, 1.3]
    full = [x[None, None].float() for x in (a, b)]
    expected = (
        float(compute_dice(full[0], full[1])),
        float(compute_hausdorff_distance(full[0], full[1], percentile=95, spacing=spacing)),
    )
    assert expected[1] > 0
    assert dice_hd95(a, b, spacing=spacing) == pytest.approx(expected, abs=1e-6)


def test_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match=r"prediction: got \(3, 2, 1\), expected the truth's \(2"):
        dice_hd95(EMPTY, EMPTY[:2], spacing=MM)
