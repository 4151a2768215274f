"""Metrics on shared cases equal those of MONAI and of SimpleITK; docs/evaluation.md says what others give."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from metric_cases import PAIRS, Mask, MaskPair, ellipsoids
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.meandice import compute_dice
from monai.metrics.surface_dice import compute_surface_dice

from prism_meta.data.cases import Volume
from prism_meta.data.labels import LabelSet
from prism_meta.empty_masks import EMPTY_POLICIES, EmptyPolicy
from prism_meta.evaluation.lesions import count_lesions
from prism_meta.evaluation.metrics import TOLERANCE, Overlap, overlap
from prism_meta.evaluation.regions import Scores, measure

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
TUMOUR = LabelSet({"tumour": 1}, regions={"tumour": ("tumour",)})


def ours(pair: MaskPair) -> Overlap:
    prediction, truth = map(torch.from_numpy, (pair.prediction, pair.truth))
    return overlap(prediction, truth, spacing=pair.spacing)


def by_monai(pair: MaskPair) -> tuple[float, float, float]:
    masks = [torch.from_numpy(m)[None, None].float() for m in (pair.prediction, pair.truth)]
    options = {"include_background": True, "spacing": list(pair.spacing)}
    return (
        float(compute_dice(*masks)),
        float(compute_hausdorff_distance(*masks, percentile=95, **options)),
        float(compute_surface_dice(*masks, [TOLERANCE], **options)),
    )


@pytest.mark.parametrize("name", PAIRS)
def test_monai_and_simple_itk_give_the_same(name: str) -> None:
    itk = pytest.importorskip("simple_itk", reason="SimpleITK is not installed")
    pair = PAIRS[name]
    found = tuple(ours(pair))
    assert found == pytest.approx(by_monai(pair), abs=1e-5)
    assert found == pytest.approx(tuple(itk.measured(pair, tolerance=TOLERANCE))[:3], abs=1e-5)


def scores(pair: MaskPair, policy: EmptyPolicy) -> Scores:
    """As an evaluation measures a volume."""
    affine = np.diag([*pair.spacing, 1.0])
    volume = Volume({}, affine=affine, shape=tuple(pair.truth.shape))  # type: ignore[arg-type]
    masks = (torch.from_numpy(m.astype(np.uint8)) for m in (pair.prediction, pair.truth))
    return measure(*masks, volume, labels=TUMOUR, empty=policy)["tumour"]


@pytest.mark.parametrize("name", [name for name in PAIRS if "plane" not in name])
def test_simple_itk_gives_the_same_volumes_and_volume_error(name: str) -> None:
    itk = pytest.importorskip("simple_itk", reason="SimpleITK is not installed")
    pair = PAIRS[name]
    found, expected = scores(pair, EMPTY_POLICIES[0]), itk.measured(pair, tolerance=TOLERANCE)
    assert found.predicted_ml == pytest.approx(expected.predicted / 1000, rel=1e-6)
    assert found.true_ml == pytest.approx(expected.true / 1000, rel=1e-6)
    error = found.predicted_ml - found.true_ml
    assert error == pytest.approx((expected.predicted - expected.true) / 1000, abs=1e-9)
    relative = 2 * error / (found.predicted_ml + found.true_ml)
    assert relative == pytest.approx(itk.similarity(pair), abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_simple_itk_counts_the_same_lesions(seed: int) -> None:
    itk = pytest.importorskip("simple_itk", reason="SimpleITK is not installed")
    prediction, truth = ellipsoids(seed)
    expected = itk.lesions(prediction, truth, voxel=1.3)
    assert min(expected) > 0
    assert tuple(count_lesions(prediction, truth, voxel=1.3)) == expected


def test_the_pairs_show_what_they_are_for() -> None:
    """Some have shared surfaces, some none; some touch the border, and the metrics take many values."""
    values = np.array([tuple(ours(pair)) for pair in PAIRS.values()])
    assert len(PAIRS) > 30 and len({round(v, 4) for v in values[:, 1]}) > 15
    assert (values[:, 0] == 0).any() and (values[:, 2] == 1).any()
    assert ((values[:, 2] > 0.3) & (values[:, 2] < 0.9)).any()
    assert {len(pair.spacing) for pair in PAIRS.values()} == {2, 3}


NOTHING = np.zeros((20, 20, 20), dtype=bool)
LESION = NOTHING.copy()
LESION[4:8, 4:8, 4:8] = True  # 64 mm^3
#: Rows of the table in the docs: what is empty -> prediction and truth.
EMPTY_CASES = {
    "the prediction: a missed tumour": (NOTHING, LESION),
    "the truth: an invented tumour": (LESION, NOTHING),
    "both: a tumour that is not there": (NOTHING, NOTHING),
}


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading of the docs."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", DOCS, re.DOTALL | re.MULTILINE)
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def shown(value: float, unit: str = "") -> str:
    if math.isnan(value):
        return "left out"
    return f"{value:g}{unit}"


def test_the_table_of_empty_masks_is_what_is_measured() -> None:
    expected = []
    for name, (prediction, truth) in EMPTY_CASES.items():
        for policy in EMPTY_POLICIES:
            found = scores(MaskPair(prediction, truth, (1.0, 1.0, 1.0)), policy)
            distance = "the diagonal" if found.hd95 == found.diagonal else shown(found.hd95, " mm")
            lesions = (found.true_lesions, found.missed_lesions, found.false_lesions)
            counts = " / ".join(map(shown, lesions))
            row = [name, f"`{policy.name}`", shown(found.dice), distance, shown(found.nsd), counts]
            expected.append(row)
    assert rows("Empty masks") == expected


def quiet_dice(prediction: Mask, truth: Mask, *, ignore_empty: bool) -> float:
    masks = [torch.from_numpy(m)[None, None].float() for m in (prediction, truth)]
    return float(compute_dice(*masks, ignore_empty=ignore_empty))


def test_what_monai_gives_for_empty_masks() -> None:
    """``ignore_empty=False`` is the Dice of ``brats`` and ``diagonal``; by default an empty truth is NaN."""
    for prediction, truth in EMPTY_CASES.values():
        pair = MaskPair(prediction, truth, (1.0, 1.0, 1.0))
        by_policy = {policy.name: scores(pair, policy) for policy in EMPTY_POLICIES}
        found = quiet_dice(prediction, truth, ignore_empty=False)
        assert found == by_policy["brats"].dice == by_policy["diagonal"].dice
        default = quiet_dice(prediction, truth, ignore_empty=True)
        assert math.isnan(default) == (not truth.any())
        masks = [torch.from_numpy(m)[None, None].float() for m in (prediction, truth)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            distance = float(
                compute_hausdorff_distance(*masks, percentile=95, include_background=True)
            )
        assert not math.isfinite(distance)


#: What the docs call a metric, by its name in the results of the benchmark.
METRICS = {"dice": "Dice", "hd95": "HD95", "nsd": "surface Dice"}


def test_the_table_of_libraries_is_the_result_of_the_benchmark() -> None:
    """Each row has a metric, the libraries that agree on every pair, and the others with differences."""
    path = ROOT / "benchmarks" / "results" / "metric_libraries.json"
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    told = {row[0]: row[2:] for row in rows("Other libraries")}
    for metric, name in METRICS.items():
        found = {library: each[metric] for library, each in results.items() if metric in each}
        assert all(each["pairs"] == len(PAIRS) and not each["failed"] for each in found.values())
        agree = [library for library, each in found.items() if each["same"] == each["pairs"]]
        unit = " mm" if metric == "hd95" else ""
        differ = [
            f"{library} on {each['pairs'] - each['same']} of {each['pairs']} pairs by up to "
            f"{each['largest']:.2g}{unit}"
            for library, each in found.items()
            if library not in agree
        ]
        cells = told[name]
        assert cells[0] == ", ".join(agree)
        assert all(part in cells[1] for part in differ) and bool(differ) == (cells[1] != "none")
