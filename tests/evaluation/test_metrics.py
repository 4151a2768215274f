"""Metrics against values worked out by hand, the policies, MONAI itself, and all distances one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.meandice import compute_dice
from monai.metrics.surface_dice import compute_surface_dice
from scipy.ndimage import binary_erosion, gaussian_filter
from scipy.spatial.distance import cdist

from prism_meta.data.cases import Volume
from prism_meta.data.labels import LabelSet
from prism_meta.empty_masks import (
    EMPTY_POLICIES,
    BratsEmpty,
    DiagonalEmpty,
    EmptyPolicy,
    NanEmpty,
    rescored,
)
from prism_meta.evaluation.metrics import TOLERANCE, dice_hd95, overlap
from prism_meta.evaluation.regions import measure
from prism_meta.records import HEADER, Record

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


# Distances of the surfaces of both masks, and the share of them up to 1 mm.
SURFACE_DICE = {
    "the same": 1.0,
    "apart along the thick axis": 0.0,
    "apart along a 3-4-5 diagonal": 0.0,
    "two voxels that share one": 1.0,  # 0 and 0.5 mm, twice
    "a cube and its centre": 7 / 27,  # 6 of 26 surface voxels, and the centre
    "in a plane": 0.0,
}


@pytest.mark.parametrize("name", SURFACE_DICE)
def test_surface_dice_by_hand(name: str) -> None:
    a, b, spacing, *_ = GOLDEN[name]
    for prediction, truth in ((a, b), (b, a)):
        got = overlap(prediction, truth, spacing=spacing).nsd
        assert got == pytest.approx(SURFACE_DICE[name], abs=1e-6)


@pytest.mark.parametrize("mm", [1.0, 1.001])
def test_the_tolerance_is_in_mm_and_counts_itself(mm: float) -> None:
    a, b = mask((2, 1, 1), (0, 0, 0)), mask((2, 1, 1), (1, 0, 0))
    assert overlap(a, b, spacing=(mm, 9.0, 9.0)).nsd == (mm == 1.0)
    assert f"nsd_{TOLERANCE:g}mm" in HEADER


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
        # The surface Dice of an empty mask is its Dice.
        nsd = overlap(prediction, truth, spacing=(1.0, 2.0, 12.0), empty=policy).nsd
        assert nsd == pytest.approx(expected[0], nan_ok=True)
    assert dice_hd95(FILLED, FILLED, spacing=(1.0, 2.0, 12.0), empty=policy) == (1.0, 0.0)


def test_the_diagonal_is_that_of_the_whole_volume() -> None:
    """For a box of 1 x 2 x 1 voxels of it, too."""
    got = dice_hd95(
        FILLED[:1], EMPTY[:1], spacing=(1.0, 2.0, 12.0), empty=DiagonalEmpty(), shape=FILLED.shape
    )
    assert got == (0.0, 13.0)


def test_brats_is_the_policy_unless_told() -> None:
    assert dice_hd95(FILLED, EMPTY, spacing=MM) == (0.0, 373.13)


def blobs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two masks that touch the border or not, in a volume larger than they are."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, 14, 17, 12, generator=generator).numpy()
    smooth = torch.from_numpy(gaussian_filter(noise, (0, 2, 2, 2)))
    a, b = (smooth[i] > smooth[i].flatten().quantile(0.9) for i in range(2))
    if seed % 2:
        for blob in (a, b):
            blob[:3], blob[-3:], blob[:, :4] = False, False, False
    if seed >= 4:  # most of the surface is the same
        b = a.clone()
        b[:, :, ::5] &= b.roll(1, 0)[:, :, ::5]
    return a, b


SPACINGS = [(3.0, 0.9, 1.3), (1.0, 1.0, 1.0), (0.6, 0.8, 5.0)]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("seed", range(6))
def test_monai_gives_the_same_on_the_whole_volume(
    seed: int, spacing: tuple[float, float, float]
) -> None:
    """So the box and the shared distances change nothing."""
    a, b = blobs(seed)
    full = [x[None, None].float() for x in (a, b)]
    options = {"include_background": True, "spacing": list(spacing)}
    expected = (
        float(compute_dice(full[0], full[1])),
        float(compute_hausdorff_distance(full[0], full[1], percentile=95, **options)),
        float(compute_surface_dice(full[0], full[1], [TOLERANCE], **options)),
    )
    assert expected[1] > 0
    assert overlap(a, b, spacing=spacing) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("seed", range(6))
def test_all_distances_one_by_one_give_the_same(
    seed: int, spacing: tuple[float, float, float]
) -> None:
    """Without MONAI and without a distance transform: every surface voxel to every other."""
    a, b = blobs(seed)
    surfaces = [
        np.argwhere(m.numpy() & ~binary_erosion(m.numpy())) * np.array(spacing) for m in (a, b)
    ]
    between = cdist(*surfaces)
    there, back = between.min(1), between.min(0)
    near = (there <= 1 + 1e-6).sum() + (back <= 1 + 1e-6).sum()
    expected = (
        2 * int((a & b).sum()) / int(a.sum() + b.sum()),
        max(np.percentile(there, 95), np.percentile(back, 95)),
        near / (len(there) + len(back)),
    )
    assert overlap(a, b, spacing=spacing) == pytest.approx(expected, abs=1e-5)


#: Voxels of 2 x 1 x 1.5 mm, which are 3 mm^3.
AFFINE = np.array([[2.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1.5, 0], [0, 0, 0, 1]])
LABELS = LabelSet({"core": 1, "oedema": 2}, regions={"WT": ("core", "oedema"), "core": ("core",)})


def measured(
    prediction: torch.Tensor, truth: torch.Tensor, empty: EmptyPolicy
) -> dict[str, Record]:
    volume = Volume({}, affine=AFFINE, shape=tuple(truth.shape))  # type: ignore[arg-type]
    found = measure(prediction, truth, volume, labels=LABELS, empty=empty)
    return {region: Record("p", "t1", region, *scores) for region, scores in found.items()}


@pytest.mark.parametrize(
    "policy", [BratsEmpty(), NanEmpty(), DiagonalEmpty()], ids=lambda p: p.name
)
def test_a_missed_lesion_under_each_policy(policy: EmptyPolicy) -> None:
    """Volumes and lesions do not depend on the policy; Dice, HD95 and surface Dice do."""
    prediction, truth = (torch.zeros(30, 20, 20, dtype=torch.uint8) for _ in range(2))
    truth[2:6, 2:6, 2:6] = 2
    prediction[2:6, 2:6, 2:6] = 2
    truth[20:24, 2:6, 2:6] = 1  # 64 voxels, 192 mm^3
    records = measured(prediction, truth, policy)
    core, whole = records["core"], records["WT"]
    assert (core.dice, core.hd95) == pytest.approx(policy.one(core.diagonal), nan_ok=True)
    assert core.nsd == 0
    assert core.diagonal == pytest.approx(math.hypot(60, 20, 30))
    assert (core.predicted_ml, core.true_ml) == (0.0, pytest.approx(0.192))
    assert (core.true_lesions, core.missed_lesions, core.false_lesions) == (1, 1, 0)
    assert whole.dice == pytest.approx(2 / 3)
    assert (whole.predicted_ml, whole.true_ml) == pytest.approx((0.192, 0.384))
    assert (whole.true_lesions, whole.missed_lesions, whole.false_lesions) == (2, 1, 0)
    # The invented lesion is the same with the masks exchanged, but that it is false instead of missed.
    core = measured(truth, prediction, policy)["core"]
    assert core.dice == 0 and (core.predicted_ml, core.true_ml) == (pytest.approx(0.192), 0.0)
    assert (core.true_lesions, core.missed_lesions, core.false_lesions) == (0, 0, 1)


@pytest.mark.parametrize("policy", EMPTY_POLICIES, ids=lambda p: p.name)
@pytest.mark.parametrize("own", EMPTY_POLICIES, ids=lambda p: p.name)
def test_a_record_under_another_policy_is_what_that_policy_measures(
    own: EmptyPolicy, policy: EmptyPolicy
) -> None:
    nothing, something, other = (torch.zeros(6, 5, 4, dtype=torch.uint8) for _ in range(3))
    something[2, 2:4], other[3, 2:4] = 1, 1
    for prediction in (nothing, something, other):
        for truth in (nothing, something):
            found = measured(prediction, truth, own)["core"]
            expected = measured(prediction, truth, policy)["core"]
            assert repr(rescored(found, policy)) == repr(expected)


def test_volumes_are_those_of_a_sheared_grid() -> None:
    """The size of a voxel along its axes, 1 x 1.41 x 1 mm, is more than its volume, 1 mm^3."""
    affine = np.eye(4)
    affine[0, 1] = 1.0
    truth = torch.ones(2, 2, 2, dtype=torch.uint8)
    volume = Volume({}, affine=affine, shape=(2, 2, 2))
    found = measure(truth, truth, volume, labels=LABELS, empty=BratsEmpty())
    assert found["core"].true_ml == pytest.approx(0.008)


def test_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match=r"prediction: got \(3, 2, 1\), expected the truth's \(2"):
        dice_hd95(EMPTY, EMPTY[:2], spacing=MM)
