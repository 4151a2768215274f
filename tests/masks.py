"""Helpers of the tests of mask policies."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Generator, Tensor


def seeded(seed: int) -> Generator:
    return torch.Generator().manual_seed(seed)


def rows(*text: str) -> Tensor:
    """rows("1010") is one case with the first and the third modality."""
    return torch.tensor([[c == "1" for c in row] for row in text])


def counts(masks: Tensor) -> dict[tuple[bool, ...], int]:
    found: dict[tuple[bool, ...], int] = {}
    for row in masks.tolist():
        found[tuple(row)] = found.get(tuple(row), 0) + 1
    return found


def assert_drawn_with(masks: Tensor, probabilities: dict[tuple[bool, ...], float]) -> None:
    """Each pattern as often as its probability says, to 4 standard deviations."""
    found, n = counts(masks), len(masks)
    assert set(found) <= {row for row, p in probabilities.items() if p > 0}
    for row, p in probabilities.items():
        assert abs(found.get(row, 0) - n * p) <= 4 * sqrt(n * p * (1 - p)) + 1e-9, row
