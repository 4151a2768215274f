"""Mask policies: a common suite, and the distribution of each."""

from __future__ import annotations

from itertools import product
from math import sqrt

import pytest
import torch
from masks import assert_drawn_with, rows, seeded
from torch import Tensor

from prism_meta.data.availability import draw_availability
from prism_meta.data.following_masks import GroupDROMask, HardMask
from prism_meta.data.masking import (
    BalancedMask,
    DynamicMask,
    FullMask,
    MaskPolicy,
    SingleModalityMask,
    StaticMask,
)
from prism_meta.data.subset_masks import OneSubsetMask
from prism_meta.modalities import subsets

PUBLISHED = ((0.2, 0.4, 0.6, 0.8), (0.1, 0.3, 0.7, 0.9))
POLICIES: dict[str, MaskPolicy] = {
    "static": StaticMask(),
    "full": FullMask(),
    "dynamic": DynamicMask(),
    "single": SingleModalityMask(),
    "balanced": BalancedMask(PUBLISHED[0]),
    "hard": HardMask(4),
    "dro": GroupDROMask(4),
}
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


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
    if isinstance(policy, StaticMask | DynamicMask | HardMask | GroupDROMask):
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


# ---------------------------------------------------------------- one subset per batch


def walks(available: Tensor, count: int, seed: int) -> list[tuple[bool, ...]]:
    """The subset of each batch; the batches are checked."""
    found = []
    shown = OneSubsetMask().walk(available, 0, count, seed=(seed,))
    for chosen, mask in OneSubsetMask().batches(available, 5, shown, seeded(seed)):
        assert chosen.shape == (5,) and mask.shape == (5, available.shape[1])
        assert (mask == mask[0]).all() and mask[0].any()
        assert not bool((mask & ~available[chosen]).any())
        found.append(tuple(mask[0].tolist()))
    return found


def test_batches_walk_through_all_subsets_in_a_new_order() -> None:
    available = rows("1111", "1010", "0100", "0111")
    every = {tuple(row) for row in subsets(4).tolist()}
    orders = [walks(available, 15, seed) for seed in range(6)]
    for order in orders:
        assert set(order) == every
    assert len({tuple(order) for order in orders}) == 6
    assert walks(available, 15, 0) == orders[0], "the generator decides"
    twice = walks(available, 30, 1)
    assert twice[:15] == orders[1] != twice[15:] and set(twice[15:]) == every
    assert walks(available, 4, 2) == orders[2][:4]
    for start in (0, 3, 14, 15, 22):  # any part of it is found without what came before
        part = OneSubsetMask().walk(available, start, 8, seed=(1,)).tolist()
        assert [tuple(row) for row in part] == twice[start : start + 8]


def test_only_subsets_that_a_case_has_are_walked_through() -> None:
    available = rows("1010", "0100")
    expected = {(True, False, False, False), (False, False, True, False), (True, False, True, False),
                (False, True, False, False)}  # fmt: skip
    assert set(walks(available, 4, 3)) == expected


def test_a_batch_has_every_case_of_its_subset_before_one_comes_again() -> None:
    available = rows("11", "11", "11", "10", "01")
    for chosen, mask in OneSubsetMask().batches(available, 4, subsets(2), seeded(4)):
        holders = int((~(mask[0] & ~available).any(1)).sum())
        assert len(set(chosen.tolist())) == min(4, holders)


def test_a_subset_that_nobody_has_is_replaced_by_one_that_somebody_has() -> None:
    available, wanted = rows("110", "010"), rows("001").expand(300, -1)
    masks = [mask[0] for _, mask in OneSubsetMask().batches(available, 2, wanted, seeded(5))]
    there = [(True, False, False), (False, True, False), (True, True, False)]
    assert_drawn_with(torch.stack(masks), dict.fromkeys(there, 1 / 3))


def test_one_subset_of_given_cases_is_one_that_all_have() -> None:
    available = rows("1110", "0111").repeat(3, 1)
    drawn = {
        tuple(row) for s in range(40) for row in OneSubsetMask()(available, seeded(s)).tolist()
    }
    assert drawn == {
        (False, True, False, False),
        (False, False, True, False),
        (False, True, True, False),
    }
    with pytest.raises(ValueError, match="the cases have no modality in common"):
        OneSubsetMask()(rows("10", "01"))
    assert OneSubsetMask()(torch.zeros(0, 4).bool()).shape == (0, 4)
