"""Scores of single cases, the worst of them in three planes, availability, and the cosine's curve."""

from __future__ import annotations

import base64
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pages import (
    BRATS,
    CASES,
    measured,
    records,
    report_page,
    seen_case,
    volume,
    worst_cases,
)

from prism_meta.data.cases import Volume
from prism_meta.records import Record
from prism_meta.report.cases import group_row, score_cases
from prism_meta.report.figures.availability import availability_chart
from prism_meta.report.figures.curves import cosine_curve
from prism_meta.report.figures.slices import draw_outlines
from prism_meta.report.overlays import Overlay
from prism_meta.report.worst import WorstCases, cut_planes

NAN = math.nan


def test_scores_of_a_case_by_hand() -> None:
    (found,) = score_cases(
        [
            Record("p", "t1", "WT", 0.2, 10.0), Record("p", "t1", "ET", 0.4, NAN),
            Record("p", "t2", "WT", 0.9, 2.0), Record("p", "t2", "ET", NAN, NAN),
            Record("p", "t1+t2", "WT", 0.8, 4.0), Record("p", "t1+t2", "ET", 0.6, 6.0),
        ]
    )  # fmt: skip
    assert (found.subset, found.modalities, found.worst) == ("t1+t2", ("t1", "t2"), "t1")
    assert found.regions == {"WT": 0.8, "ET": 0.6}
    assert (found.dice, found.hd95, found.worst_dice) == pytest.approx((0.7, 5.0, 0.3))
    assert found.mean == pytest.approx((0.3 + 0.9 + 0.7) / 3)


def test_a_case_that_lacks_a_modality_has_fewer_subsets() -> None:
    by_name = {row.case: row for row in score_cases(records())}
    assert list(by_name) == sorted(CASES)
    assert by_name["p10"].subset == "flair+t1ce+t1" and by_name["p10"].modalities == BRATS[:3]
    assert by_name["p9"].modalities == BRATS
    # 0.1 per modality, 0.02 per region, 0.03 per case.
    assert by_name["p10"].dice == pytest.approx(0.32)
    assert by_name["p1"].dice == pytest.approx(0.42 + 0.09)


def test_a_case_without_any_dice() -> None:
    (found,) = score_cases([Record("p", "t1", "WT", NAN, NAN)])
    assert math.isnan(found.dice) and math.isnan(found.mean) and math.isnan(found.worst_dice)
    assert not WorstCases().wants([Record("p", "t1", "WT", NAN, NAN)])


def test_the_worst_cases_are_kept_the_worst_first() -> None:
    found = worst_cases().found()
    assert [(kept.scores.case, kept.scores.subset) for kept in found] == [
        ("p10", "flair+t1ce+t1"), ("p9", "flair+t1ce+t1+t2"),
    ]  # fmt: skip
    assert all([p.plane for p in k.planes] == ["axial", "coronal", "sagittal"] for k in found)
    assert all(plane.case == kept.scores.case for kept in found for plane in kept.planes)


@pytest.mark.parametrize("order", [CASES, CASES[::-1], (CASES[2], CASES[0], CASES[3], CASES[1])])
def test_the_order_of_the_cases_does_not_matter(order: tuple[str, ...]) -> None:
    worst = WorstCases(2)
    for case in order:
        worst.add(measured(case, shift=0.1 * CASES.index(case)), planes=())
    assert [kept.scores.case for kept in worst.found()] == ["p10", "p9"]


def test_of_equally_bad_cases_the_first_stay() -> None:
    worst = WorstCases(2)
    kept = [worst.add(measured(case), planes=()) for case in CASES]
    assert kept == [(), (), None, None]
    assert [found.scores.case for found in worst.found()] == ["p10", "p9"]


def test_the_planes_are_never_those_of_another_case() -> None:
    worst = WorstCases()
    image, labels = volume()
    worst(seen_case("p1"), image, "+".join(BRATS), labels, labels)
    assert worst.add(measured("p2")) == ()
    worst(seen_case("p1"), image, "flair", labels, labels)  # not all that it has
    assert [plane.plane for plane in worst.add(measured("p1")) or ()] == [
        "axial", "coronal", "sagittal",
    ]  # fmt: skip


def test_planes_of_a_volume() -> None:
    image, labels = volume()
    axial, coronal, sagittal = cut_planes("p", image, "flair", labels, labels.roll(1, 1))
    # (height, width) by patient: rows from front to back or from head to feet.
    assert [plane.truth.shape for plane in (axial, coronal, sagittal)] == [
        (16, 12), (8, 12), (8, 16),
    ]  # fmt: skip
    assert [p.pixel for p in (axial, coronal, sagittal)] == [(1.0, 1.0), (2.5, 1.0), (2.5, 1.0)]
    assert [(p.truth > 0).sum() for p in (axial, coronal, sagittal)] == [5 * 7, 5 * 4, 7 * 4]
    assert axial.predictions["flair"].shape == axial.truth.shape
    # The labels were shifted by one voxel to the front, which is up in an axial slice.
    np.testing.assert_array_equal(np.roll(axial.truth, -1, 0), axial.predictions["flair"])


def test_without_a_truth_the_prediction_chooses_the_slices() -> None:
    image, labels = volume()
    for plane in cut_planes("p", image, "flair", torch.zeros_like(labels), labels):
        assert plane.truth.sum() == 0 and plane.predictions["flair"].max() == 2
    nothing = torch.zeros_like(labels)
    axial = cut_planes("p", image, "flair", nothing, nothing)[0]
    np.testing.assert_array_equal(
        np.sort(axial.background.ravel()), image.images["flair"][..., 4].ravel()
    )


@pytest.mark.parametrize("thin", [0, 1, 2])
def test_a_single_slice_has_one_plane(thin: int) -> None:
    shape: Any = tuple(1 if axis == thin else 9 for axis in range(3))
    image = Volume({"t1": np.ones(shape, np.float32)}, affine=np.eye(4), shape=shape)
    labels = torch.ones(shape, dtype=torch.int64)
    (plane,) = cut_planes("p", image, "t1", labels, labels)
    assert plane.truth.shape == (9, 9)
    assert plane.plane == ("sagittal", "coronal", "axial")[thin]


def test_planes_come_back_from_json() -> None:
    image, labels = volume()
    for plane in cut_planes("p", image, "flair", labels, labels):
        back = Overlay.from_dict(plane.to_dict())
        assert (back.plane, back.pixel, back.case) == (plane.plane, plane.pixel, plane.case)
        np.testing.assert_array_equal(back.predictions["flair"], plane.predictions["flair"])


def test_pictures_have_the_proportions_of_the_patient() -> None:
    image, labels = volume()
    for plane in cut_planes("p", image, "flair", labels, labels):
        data = base64.b64decode(draw_outlines(plane).split(",")[1])
        width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
        tall, wide = (n * mm for n, mm in zip(plane.truth.shape, plane.pixel, strict=True))
        assert height / width == pytest.approx(tall / wide, rel=0.02)


def test_counts_of_a_group() -> None:
    cases = {"a": ("t1", "t2"), "b": ("t2",), "c": ("t2", "pet")}
    found = group_row("training", cases, ("t1", "t2"))
    assert (found.counts, found.complete, found.cases) == ((1, 3), 1, ("a", "b", "c"))


@pytest.mark.parametrize("count", [1, 41, 300])
def test_the_chart_names_few_cases_and_counts_many(count: int) -> None:
    cases = {f"$case{i}": BRATS[i % 3 :] for i in range(count)}
    uri = availability_chart({"training": cases, "validation": {}}, BRATS)
    texts = set(re.findall(r"<!-- (.*?) -->", base64.b64decode(uri.split(",")[1]).decode()))
    assert {f"training, {count}", *BRATS} <= texts
    assert ("$case0" in texts) == (count <= 40) and "validation, 0" not in texts


def test_the_cosine_is_drawn_where_it_is_known() -> None:
    rows = [{"step": i, "cosine": value} for i, value in enumerate((0.5, None, -0.25, NAN))]
    assert cosine_curve(rows) is not None
    assert cosine_curve(rows) == cosine_curve([rows[0], rows[2]])
    for old in ([], [{"step": 1, "train_loss": 1.0}], [{"step": 1, "cosine": None}], ["text", 3]):
        assert cosine_curve(old) is None  # type: ignore[arg-type]


def test_the_page_shows_them(tmp_path: Path) -> None:
    html = report_page(tmp_path).read_text(encoding="utf-8")
    words = " ".join(re.sub(r"<(style|script)>.*?</\1>|<[^>]*>", " ", html, flags=re.S).split())
    assert "p10 ● ● ● ○ 30.0 32.0 34.0 32.0 8.0 19.1 12.0 flair" in words
    assert (
        "Dice WT 30.0 %, TC 32.0 %, ET 34.0 %, mean 32.0 %, HD95 8.0 mm, from flair+t1ce+t1."
        in words
    )
    assert "training 6 2 4 6 6 2 q0, q1, q2, q3, q4, q5" in words
    assert "test 4 4 4 4 3 3 p1, p10, p2, p9" in words
    assert "Agreement of the meta-gradient" in words
    assert "Trained with: prism-meta train cases --out run Evaluated with: a b" in words
    assert list(re.findall(r'alt="(p10, [a-z]+: [^"]*)"', html)) == [
        f"p10, {plane}: flair with outlines of the truth and the prediction"
        for plane in ("axial", "coronal", "sagittal")
    ]
