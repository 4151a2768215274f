"""Mask policies: a common suite, and the distribution of each."""

from __future__ import annotations

from itertools import product
from math import sqrt

import pytest
import torch
from torch import Generator, Tensor

from prism_meta.data.availability import draw_availability
from prism_meta.data.masking import (
    BalancedMask,
    DynamicMask,
    FullMask,
    MaskPolicy,
    SingleModalityMask,
    StaticMask,
)

PUBLISHED = ((0.2, 0.4, 0.6, 0.8), (0.1, 0.3, 0.7, 0.9))
POLICIES: dict[str, MaskPolicy] = {
    "static": StaticMask(),
    "full": FullMask(),
    "dynamic": DynamicMask(),
    "single": SingleModalityMask(),
    "balanced": BalancedMask(PUBLISHED[0]),
}
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


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


# ---------------------------------------------------------------- one suite for all policies


@pytest.mark.parametrize("rates", PUBLISHED, ids=str)
@every_policy
def test_masks_stay_within_availability_and_are_never_empty(
    policy: MaskPolicy, rates: tuple[float, ...]
) -> None:
    available = draw_availability(300, rates)
    for seed in range(5):
        mask = policy(available, seeded(seed))
        assert mask.dtype == torch.bool
        assert mask.shape == available.shape
        assert not bool((mask & ~available).any())
        assert bool(mask.any(1).all())


@every_policy
def test_the_generator_decides_and_the_global_one_is_left_alone(policy: MaskPolicy) -> None:
    available = draw_availability(200, PUBLISHED[0])
    before = torch.random.get_rng_state()
    one, again, other = (policy(available, seeded(s)) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one, again)
    assert torch.equal(one, other) == isinstance(policy, StaticMask)


@every_policy
def test_a_generator_is_not_needed_and_the_argument_is_not_changed(policy: MaskPolicy) -> None:
    available = draw_availability(20, PUBLISHED[0])
    kept = available.clone()
    mask = policy(available)
    mask[:] = False
    assert torch.equal(available, kept)


@every_policy
def test_no_case_is_no_mask(policy: MaskPolicy) -> None:
    if isinstance(policy, StaticMask | DynamicMask):
        assert policy(torch.zeros(0, 4).bool(), seeded(0)).shape == (0, 4)


@every_policy
def test_eligible_cases(policy: MaskPolicy) -> None:
    available = rows("1111", "1000", "0111", "0000")
    expected = (
        [True, False, False, False] if isinstance(policy, FullMask) else [True, True, True, False]
    )
    assert policy.eligible(available).tolist() == expected


@every_policy
def test_a_case_with_one_modality_shows_it(policy: MaskPolicy) -> None:
    available = torch.eye(4).bool().repeat(50, 1)
    assert torch.equal(policy(available, seeded(0)), available)


# ---------------------------------------------------------------- each policy's distribution


@pytest.mark.parametrize("policy", [StaticMask(), FullMask()])
def test_static_shows_everything(policy: MaskPolicy) -> None:
    available = draw_availability(30, PUBLISHED[0])
    assert torch.equal(policy(available), available)


@pytest.mark.parametrize("case", ["1111", "1011", "0101", "0010", "11", "111111"])
def test_dynamic_is_uniform_over_the_subsets_of_what_is_there(case: str) -> None:
    available = rows(case).expand(20_000, -1)
    choices = [
        row
        for row in product((False, True), repeat=len(case))
        if any(row) and not any(r and c == "0" for r, c in zip(row, case, strict=True))
    ]
    mask = DynamicMask()(available, seeded(4))
    assert_drawn_with(mask, {row: 1 / len(choices) for row in choices})


def test_dynamic_draws_each_case_anew() -> None:
    mask = DynamicMask()(torch.ones(1000, 4).bool(), seeded(5))
    first, second = mask[0::2], mask[1::2]
    same = (first == second).all(1).double().mean().item()
    assert abs(same - 1 / 15) < 4 * sqrt(1 / 15 * 14 / 15 / 500)


@pytest.mark.parametrize("case", ["1111", "1011", "0010"])
def test_single_is_uniform_over_the_modalities_that_are_there(case: str) -> None:
    mask = SingleModalityMask()(rows(case).expand(20_000, -1), seeded(6))
    ones = [tuple(i == m for i in range(4)) for m in range(4) if case[m] == "1"]
    assert_drawn_with(mask, {row: 1 / len(ones) for row in ones})


@pytest.mark.parametrize("case", ["1111", "1110", "1010", "0001"])
def test_balanced_keeps_by_frequency_and_never_shows_nothing(case: str) -> None:
    rates = PUBLISHED[0]
    rarity = (1 / 4, 1 / 3, 1 / 2, 1.0)  # 0.2 / (1 - rate)
    keep = [k if c == "1" else 0.0 for k, c in zip(rarity, case, strict=True)]
    probabilities: dict[tuple[bool, ...], float] = {}
    for row in product((False, True), repeat=4):
        p = 1.0
        for shown, k in zip(row, keep, strict=True):
            p *= k if shown else 1 - k
        probabilities[row] = p
    empty = probabilities.pop((False,) * 4)
    for m in range(4):
        probabilities[tuple(i == m for i in range(4))] += empty * keep[m] / sum(keep)
    mask = BalancedMask(rates)(rows(case).expand(20_000, -1), seeded(7))
    assert_drawn_with(mask, probabilities)


def test_balanced_at_equal_rates_shows_every_modality_each_time() -> None:
    available = draw_availability(100, (0.5, 0.5, 0.5))
    assert torch.equal(BalancedMask((0.5, 0.5, 0.5))(available, seeded(8)), available)


@pytest.mark.parametrize("rates", PUBLISHED, ids=str)
def test_balanced_at_least_halves_the_imbalance_of_the_data(rates: tuple[float, ...]) -> None:
    """Equal is out of reach: most cases lack the rarest modality and must show another."""
    available = draw_availability(10_000, rates)
    mask = BalancedMask(rates)(available, seeded(9))
    shown, exist = mask.sum(0).double(), available.sum(0).double()
    assert shown[3] == exist[3]  # the rarest is never dropped
    assert (shown.max() / shown.min()) < 0.52 * (exist.max() / exist.min())
    dynamic = DynamicMask()(available, seeded(9)).sum(0).double()
    assert (shown.max() / shown.min()) < 0.8 * (dynamic.max() / dynamic.min())


@pytest.mark.parametrize("rates", [(), (1.0, 0.2), (-0.1,)], ids=str)
def test_balanced_refuses_bad_rates(rates: tuple[float, ...]) -> None:
    message = r"expected one missing rate in \[0, 1\) per modality"
    with pytest.raises(ValueError, match=message) as caught:
        BalancedMask(rates)
    assert str(caught.value).startswith(f"rates: got {rates}, ")


def test_balanced_refuses_another_number_of_modalities() -> None:
    with pytest.raises(
        ValueError, match="availability: got 3 modalities, expected 4, one per rate"
    ):
        BalancedMask(PUBLISHED[0])(torch.ones(2, 3).bool())
