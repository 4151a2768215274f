"""The words all modules share: subsets, their names, and the batch."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from prism_meta.modalities import BRATS, Batch, subset, subset_name, subsets


def test_the_fifteen_subsets_of_four_by_size_then_order() -> None:
    names = [subset_name(row, BRATS) for row in subsets(4)]
    assert names == [
        "flair",
        "t1ce",
        "t1",
        "t2",
        "flair+t1ce",
        "flair+t1",
        "flair+t2",
        "t1ce+t1",
        "t1ce+t2",
        "t1+t2",
        "flair+t1ce+t1",
        "flair+t1ce+t2",
        "flair+t1+t2",
        "t1ce+t1+t2",
        "flair+t1ce+t1+t2",
    ]


@pytest.mark.parametrize("m", [1, 2, 3, 6])
def test_subsets_are_all_different_and_not_empty(m: int) -> None:
    rows = subsets(m)
    assert rows.dtype == torch.bool
    assert rows.shape == (2**m - 1, m)
    assert len({tuple(r) for r in rows.tolist()}) == len(rows)
    assert bool(rows.any(1).all())


@pytest.mark.parametrize("m", [0, -1])
def test_no_modalities_have_no_subsets(m: int) -> None:
    with pytest.raises(ValueError, match=f"num_modalities: got {m}, expected at least 1"):
        subsets(m)


def test_a_name_for_every_modality_is_needed() -> None:
    with pytest.raises(ValueError, match="zip"):
        subset_name([True, False], BRATS)


def test_a_batch_moves_whole() -> None:
    image, mask = torch.rand(2, 3, 4, 5), torch.tensor([[True, False, True], [False, True, True]])
    target = torch.ones(2, 4, 5).long()
    batch = Batch(image, mask, target, ("a", "b")).to("cpu")
    assert torch.equal(batch.image, image)
    assert torch.equal(batch.mask, mask)
    assert torch.equal(batch.target, target)
    assert batch.case_ids == ("a", "b")
    assert Batch(image, mask, target).to("meta").image.device.type == "meta"


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 3), r"mask: got torch.float32 \(2, 3\), expected torch.bool \(2, 3\), "),
        (torch.ones(2, 4).bool(), r"mask: got torch.bool \(2, 4\), expected torch.bool \(2, 3\), "),
        (torch.ones(1, 3).bool(), r"mask: got torch.bool \(1, 3\), expected torch.bool \(2, 3\), "),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message + "the first two sizes of the image"):
        Batch(torch.zeros(2, 3, 4, 5), mask, torch.zeros(2, 4, 5).long())


@pytest.mark.parametrize("size", [(2, 5, 4), (2, 1, 4, 5), (1, 4, 5)])
def test_a_target_that_does_not_fit_is_refused(size: tuple[int, ...]) -> None:
    got = str(size).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(
        ValueError,
        match=rf"target: got {got}, expected \(B, \*S\) = \(2, 4, 5\) for image \(2, 3, 4, 5\)",
    ):
        Batch(torch.zeros(2, 3, 4, 5), torch.ones(2, 3).bool(), torch.zeros(size).long())


def test_a_subset_by_name_is_the_inverse_of_its_name() -> None:
    for row in subsets(4):
        assert torch.equal(subset(subset_name(row, BRATS)), row)
    assert torch.equal(subset(["t2", "t1"]), torch.tensor([False, False, True, True]))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            "flair+t1c",
            "subset: unknown modality 't1c', expected some of flair, t1ce, t1, t2; did you mean t1ce?",
        ),
        ("t1+t1", "subset: got 't1+t1', expected different names, at least one"),
        ([], "subset: got [], expected different names, at least one"),
        ("", "subset: unknown modality '', expected some of flair, t1ce, t1, t2"),
    ],
)
def test_names_that_are_no_subset_are_refused(names: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        subset(names)
