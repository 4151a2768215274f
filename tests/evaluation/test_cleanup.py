"""Clean-up of labels, against volumes drawn by hand and a slow oracle that follows the rule word by word."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from prism_meta.data.cases import Case, Volume
from prism_meta.data.labels import BRATS_LABELS, LabelSet
from prism_meta.empty_masks import NanEmpty
from prism_meta.evaluation.cleaned import CleanedRecords
from prism_meta.evaluation.cleanup import (
    BRATS_CLEANUP,
    Cleanup,
    Components,
    RegionRule,
    outer_first,
    replacement,
)
from prism_meta.evaluation.predictor import Predictor
from prism_meta.evaluation.regions import measure, voxel_volume
from prism_meta.networks.prism import PrismNet
from prism_meta.records import Record

LARGEST = RegionRule(largest=True)


def volume(
    *boxes: tuple[int, tuple[int, ...]], shape: tuple[int, int, int] = (12, 12, 12)
) -> Tensor:
    """Class indices: each box is a class and its first and last + 1 voxel along the axes."""
    classes = torch.zeros(shape, dtype=torch.uint8)
    for k, (a, b, c, d, e, f) in boxes:
        classes[a:b, c:d, e:f] = k
    return classes


def test_a_far_blob_goes_and_the_tumour_stays() -> None:
    tumour = volume((2, (1, 6, 1, 6, 1, 6)), (1, (2, 5, 2, 5, 2, 5)), (3, (3, 4, 3, 4, 3, 4)))
    far = tumour.clone()
    far[9:11, 9:11, 9:11] = torch.tensor([1, 2, 3, 3, 1, 2, 2, 3], dtype=torch.uint8).view(2, 2, 2)
    kept = far.clone()
    cleaned = Cleanup({"WT": LARGEST})(far, BRATS_LABELS, voxel=1.0)
    assert torch.equal(cleaned, tumour)
    assert torch.equal(far, kept)  # the input is not changed


def test_nothing_to_remove_gives_the_same_object() -> None:
    classes = volume((2, (1, 6, 1, 6, 1, 6)))
    for cleanup in (Cleanup(), Cleanup({"WT": LARGEST, "ET": RegionRule(total_ml=9.0)})):
        assert cleanup(classes, BRATS_LABELS, voxel=1.0) is classes


def test_an_empty_prediction_stays_empty() -> None:
    nothing = volume()
    every = RegionRule(largest=True, component_ml=1.0, total_ml=1.0)
    assert (
        Cleanup({"WT": every, "TC": every, "ET": every})(nothing, BRATS_LABELS, voxel=1.0)
        is nothing
    )
    assert every.removed([], voxel=1.0).tolist() == []


def test_components_of_the_same_size_all_stay() -> None:
    """Nothing tells which is right, and flipping the volume must not decide."""
    classes = volume(
        (2, (0, 2, 0, 2, 0, 2)), (2, (5, 7, 5, 7, 5, 7)), (2, (10, 11, 10, 11, 10, 11))
    )
    cleaned = Cleanup({"WT": LARGEST})(classes, BRATS_LABELS, voxel=1.0)
    assert torch.equal(cleaned, volume((2, (0, 2, 0, 2, 0, 2)), (2, (5, 7, 5, 7, 5, 7))))
    mirrored = Cleanup({"WT": LARGEST})(classes.flip(0, 2), BRATS_LABELS, voxel=1.0)
    assert torch.equal(mirrored, cleaned.flip(0, 2))


def test_voxels_that_share_a_corner_are_one_component() -> None:
    classes = volume((3, (0, 2, 0, 2, 0, 2)), (3, (2, 3, 2, 3, 2, 3)))
    assert Components.of(classes > 0).voxels.tolist() == [9]


@pytest.mark.parametrize(
    ("region", "becomes"), [("WT", [0, 0, 0]), ("TC", [2, 2, 2]), ("ET", [1, 2, 1])]
)
def test_what_removed_voxels_become(region: str, becomes: list[int]) -> None:
    """A row of necrosis, oedema and enhancing tumour, in which the region is removed as a whole."""
    classes = torch.tensor([1, 2, 3], dtype=torch.uint8).view(3, 1, 1)
    cleaned = Cleanup({region: RegionRule(total_ml=1.0)})(classes, BRATS_LABELS, voxel=1.0)
    assert cleaned.flatten().tolist() == becomes


def test_outer_regions_come_first() -> None:
    """The larger ET lies in the far tumour, which WT removes: the smaller ET is then the largest."""
    classes = volume((2, (0, 6, 0, 6, 0, 6)), (3, (0, 1, 0, 1, 0, 1)), (3, (9, 12, 9, 12, 9, 12)))
    rules = {"ET": LARGEST, "WT": LARGEST}
    cleaned = Cleanup(rules)(classes, BRATS_LABELS, voxel=1.0)
    assert torch.equal(cleaned, volume((2, (0, 6, 0, 6, 0, 6)), (3, (0, 1, 0, 1, 0, 1))))


@pytest.mark.parametrize(
    ("regions", "expected"),
    [
        ({"whole": ("a", "b", "c"), "c": ("c",)}, {"whole": 0, "c": 1}),
        # b is a region of its own, which a removed c must not enlarge.
        ({"whole": ("b", "a", "c"), "c": ("c",), "b": ("b",)}, {"whole": 0, "c": 1, "b": 1}),
        ({"ab": ("a", "b"), "bc": ("b", "c")}, {"ab": 0, "bc": 0}),
        ({"abc": ("c", "b", "a"), "ab": ("a", "b"), "a": ("a",)}, {"abc": 0, "ab": 3, "a": 2}),
    ],
)
def test_the_rule_for_any_regions(
    regions: dict[str, tuple[str, ...]], expected: dict[str, int]
) -> None:
    labels = LabelSet({"a": 1, "b": 2, "c": 3}, regions)
    assert {name: replacement(labels, name) for name in regions} == expected


def test_volumes_do_not_depend_on_the_spacing() -> None:
    """The same 0.5 ml as 500 voxels of 1 mm, and as 20 voxels of 2.5 x 2 x 5 mm."""
    for count, voxel in ((500, 1.0), (20, 25.0)):
        for extra, is_none in ((0, False), (-1, True)):
            classes = torch.zeros(10, 10, 10, dtype=torch.uint8)
            classes.view(-1)[: count + extra] = 3
            cleaned = BRATS_CLEANUP(classes, BRATS_LABELS, voxel=voxel)
            assert bool((cleaned == 3).any()) != is_none
            assert int((cleaned == 1).sum()) == (count + extra) * is_none
    assert voxel_volume(np.diag([2.5, -2.0, 5.0, 1.0])) == 25.0
    # The affine of a file in float32 is not quite 1 mm^3.
    assert RegionRule(total_ml=0.5).removed([500], voxel=0.99999994).tolist() == [False]


def oracle(
    classes: NDArray[np.uint8], rule: RegionRule, region: str, voxel: float
) -> NDArray[np.uint8]:
    """Flood fill, voxel by voxel, for the regions of BraTS."""
    wanted = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}[region]
    todo = {tuple(map(int, v)) for v in np.argwhere(np.isin(classes, wanted))}
    parts = []
    while todo:
        part, front = set(), [todo.pop()]
        while front:
            at = front.pop()
            part.add(at)
            near = {
                (at[0] + x, at[1] + y, at[2] + z) for x, y, z in product((-1, 0, 1), repeat=3)
            } & todo
            todo -= near
            front += near
        parts.append(part)
    most = max((len(p) for p in parts), default=0)
    kept = [
        p for p in parts
        if (len(p) == most or not rule.largest) and len(p) * voxel >= rule.component_ml * 1000
    ]  # fmt: skip
    if sum(map(len, kept)) * voxel < rule.total_ml * 1000:
        kept = []
    result = classes.copy()
    for part in parts:
        if part not in kept:
            for at in part:
                result[at] = {"WT": 0, "TC": 2, "ET": 1}[region]
    return result


@pytest.mark.parametrize("seed", range(6))
def test_it_equals_the_oracle(seed: int) -> None:
    random = np.random.default_rng(seed)
    voxel = float(random.choice([0.5, 1.0, 6.0]))
    share = random.uniform(0.02, 0.12)
    classes = random.choice(
        np.arange(4, dtype=np.uint8), (9, 8, 7), p=[1 - 3 * share, share, share, share]
    )
    rules, expected = {}, classes
    for region in ("WT", "TC", "ET"):
        rules[region] = RegionRule(
            bool(random.integers(2)), *(float(ml) for ml in random.choice([0, 0.002, 0.01], 2))
        )
        expected = oracle(expected, rules[region], region, voxel)
    cleaned = Cleanup(rules)(torch.from_numpy(classes), BRATS_LABELS, voxel=voxel)
    np.testing.assert_array_equal(cleaned.numpy(), expected)
    # Regions stay nested, and a second time nothing is left to do.
    assert outer_first(BRATS_LABELS) == ["WT", "TC", "ET"]
    np.testing.assert_array_equal(
        Cleanup(rules)(cleaned, BRATS_LABELS, voxel=voxel).numpy(), expected
    )


def test_what_several_runs_chose() -> None:
    one = Cleanup({"WT": LARGEST, "ET": RegionRule(component_ml=0.5, total_ml=1.0)})
    two = Cleanup({"WT": RegionRule(component_ml=1.0), "ET": RegionRule(component_ml=0.2)})
    assert Cleanup.common([one, two]) == Cleanup({"ET": RegionRule(component_ml=0.2)})
    assert Cleanup.common([one]) == one
    assert not Cleanup.common([one, Cleanup()]).is_on
    assert (
        str(one)
        == "WT: only the largest component; ET: no component under 0.5 ml, none if under 1 ml"
    )


def test_records_after_the_cleanup() -> None:
    truth = volume((2, (1, 5, 1, 5, 1, 5)))
    spotted = volume((2, (1, 5, 1, 5, 1, 5)), (2, (10, 11, 10, 11, 10, 11)))
    case = Case("p", ("t1",), files={})
    grid = Volume({}, affine=np.diag([1.0, 2.0, 3.0, 1.0]), shape=(12, 12, 12))
    predictor = Predictor(
        PrismNet(num_modalities=1, spatial_dims=2, width=1),
        empty=NanEmpty(),
        cleanup=Cleanup({"WT": LARGEST}),
    )

    def records(prediction: Tensor, subset: str) -> list[Record]:
        found = measure(prediction, truth, grid, labels=BRATS_LABELS, empty=NanEmpty())
        return [Record("p", subset, region, *scores) for region, scores in found.items()]

    again = CleanedRecords(predictor)
    again(case, grid, "a", truth, truth)
    again(case, grid, "b", truth, spotted)
    raw = [*records(truth, "a"), *records(spotted, "b")]
    cleaned = again.records(raw)
    assert cleaned[0] is raw[0]
    assert raw[3].dice == pytest.approx(128 / 129) and raw[3].false_lesions == 1
    assert cleaned[3].dice == 1.0 and cleaned[3].hd95 == 0.0 and cleaned[3].false_lesions == 0
    assert [(r.subset, r.region) for r in cleaned] == [(r.subset, r.region) for r in raw]
