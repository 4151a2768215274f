"""The prototype losses (E9) and the distance of E11 by hand and by loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers import F64, labels, randn
from torch import Tensor

from prism_meta.objective import losses


def prototypes_by_loops(features: Tensor, target: Tensor, k: int) -> list[list[float] | None]:
    """c_k of one sample, (C, V) and (V,); None for a class that it lacks."""
    columns, y = features.T.tolist(), target.tolist()
    found: list[list[float] | None] = []
    for label in range(k):
        own = [c for c, other in zip(columns, y, strict=True) if other == label]
        mean = [sum(values) / len(own) for values in zip(*own, strict=True)]
        found.append(mean if own else None)
    return found


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


@pytest.fixture(params=[(6, 5), (3, 4, 2)], ids=["2-D", "3-D"])
def sample_set(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor]:
    """Five samples of five channels; class 3 of four is in the last one only."""
    size = request.param
    target = labels(5, *size, classes=3, seed=21)
    target[0] = 2
    target[4].flatten()[:4] = 3
    return randn(5, 5, *size, seed=22), randn(5, 5, *size, seed=23), target


def test_prototype_l2_by_hand() -> None:
    student = torch.tensor([[[1.0, 3.0, 5.0], [0.0, 0.0, 2.0]]], dtype=F64)
    teacher = torch.tensor([[[0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]], dtype=F64)
    # Class 0: (2, 0) against (0, 1); class 2: (5, 2) against (1, 0); class 1 is absent.
    actual = losses.prototype_l2(student, teacher, torch.tensor([[0, 0, 2]]), 3)
    assert actual.item() == pytest.approx((4 + 1) + (16 + 4), rel=1e-12)


def test_prototype_l2_equals_loops(sample_set: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, target = sample_set
    for n, value in enumerate(losses.prototype_l2(*sample_set, 4).tolist()):
        s, t = (
            prototypes_by_loops(z[n].flatten(1), target[n].flatten(), 4) for z in (student, teacher)
        )
        expected = sum(
            (a - b) ** 2
            for c, d in zip(s, t, strict=True)
            if c is not None and d is not None
            for a, b in zip(c, d, strict=True)
        )
        assert value == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("loss", "power"), [(losses.prototype_similarity, 2), (losses.prototype_distance, 1)]
)
def test_similarities_equal_loops(
    sample_set: tuple[Tensor, Tensor, Tensor], loss: Callable[..., Tensor], power: int
) -> None:
    student, teacher, target = sample_set
    for n, value in enumerate(loss(*sample_set, 4).tolist()):
        z, w = student[n].flatten(1), teacher[n].flatten(1)
        y = target[n].flatten()
        terms = [
            abs(cosine(a, c) - cosine(b, d)) ** power
            for c, d in zip(prototypes_by_loops(z, y, 4), prototypes_by_loops(w, y, 4), strict=True)
            if c is not None and d is not None
            for a, b in zip(z.T.tolist(), w.T.tolist(), strict=True)
        ]
        assert value == pytest.approx(sum(terms) / len(terms), rel=1e-10)


def test_prototype_similarity_by_hand() -> None:
    # One class: c = (1, 1) / 2 for the student, both voxels at 45 degrees; (1, 0) for the teacher,
    # both voxels on it. (sqrt(1/2) - 1)^2 per voxel.
    student = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], dtype=F64)
    teacher = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]], dtype=F64)
    target = torch.tensor([[0, 0]])
    actual = losses.prototype_similarity(student, teacher, target, 4)
    assert actual.item() == pytest.approx((math.sqrt(0.5) - 1) ** 2, rel=1e-12)
    distance = losses.prototype_distance(student, teacher, target, 4)
    assert distance.item() == pytest.approx(1 - math.sqrt(0.5), rel=1e-12)


@pytest.mark.parametrize(
    "loss", [losses.prototype_l2, losses.prototype_similarity, losses.prototype_distance]
)
def test_more_absent_classes_change_nothing(loss: Callable[..., Tensor]) -> None:
    student, teacher = randn(2, 5, 6, seed=24), randn(2, 5, 6, seed=25)
    target = labels(2, 6, classes=2, seed=26)
    few, many = (loss(student, teacher, target, k) for k in (2, 9))
    torch.testing.assert_close(few, many, rtol=1e-12, atol=0)
