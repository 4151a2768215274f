"""Entropy and disagreement, against their formulas in float64 and hand-made probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from prism_meta.evaluation.uncertainty import mutual_information, normalized_entropy


def drawn(count: int, classes: int = 4) -> list[torch.Tensor]:
    torch.manual_seed(classes)
    return [(5 * torch.randn(classes, 3, 4, 5)).softmax(0) for _ in range(count)]


@pytest.mark.parametrize("classes", [2, 4, 9])
def test_the_entropy_is_that_of_the_formula(classes: int) -> None:
    (p,) = drawn(1, classes)
    exact = p.double().numpy()
    expected = -(exact * np.log(exact)).sum(0) / np.log(classes)
    np.testing.assert_allclose(normalized_entropy(p).numpy(), expected, atol=1e-6)


def test_certain_and_undecided_voxels() -> None:
    p = torch.zeros(3, 1, 1, 2)
    p[1, ..., 0] = 1.0
    p[..., 1] = 1 / 3
    assert normalized_entropy(p).flatten().tolist() == [0.0, 1.0]


def test_mutual_information_is_the_mean_divergence_from_the_mean() -> None:
    """Another formula of the same: the mean of KL(p_r || mean), divided by ln K."""
    members = drawn(3)
    exact = np.stack([p.double().numpy() for p in members])
    mean = exact.mean(0)
    expected = (exact * np.log(exact / mean)).sum(1).mean(0) / math.log(4)
    found = mutual_information(iter(members))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    assert bool((found <= normalized_entropy(sum(members) / 3)).all())  # type: ignore[arg-type]


def test_models_that_agree_have_none_however_unsure_they_are() -> None:
    undecided = torch.full((4, 2, 2, 2), 0.25)
    assert mutual_information([undecided, undecided]).abs().max() < 1e-6
    before = undecided.clone()
    mutual_information([undecided, *drawn(0)])
    assert torch.equal(before, undecided)  # the input is not changed
    with pytest.raises(ValueError, match=r"^members: got no model, expected at least one$"):
        mutual_information([])
