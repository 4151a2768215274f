"""Mask policies that follow losses: hard subsets, and group DRO."""

from __future__ import annotations

import pytest
import torch
from masks import assert_drawn_with, rows, seeded

from prism_meta.data.availability import draw_availability
from prism_meta.data.following_masks import GroupDROMask, HardMask
from prism_meta.modalities import subset_index, subsets

PUBLISHED = ((0.2, 0.4, 0.6, 0.8), (0.1, 0.3, 0.7, 0.9))


@pytest.mark.parametrize("case", ["1111", "1011", "0010"])
def test_hard_without_a_loss_is_uniform(case: str) -> None:
    available = rows(case)
    held = ~(subsets(4) & ~available).any(1)
    expected = held.double() / held.sum()
    assert torch.equal(HardMask(4).probabilities(available)[0], expected)


@pytest.mark.parametrize("power", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("case", ["1111", "1011", "0101"])
def test_hard_is_in_proportion_to_a_power_of_the_running_loss(case: str, power: float) -> None:
    policy = HardMask(4, power=power)
    losses = torch.linspace(0.4, 1.2, 15, dtype=torch.float64)
    policy.observe(subsets(4), losses)
    held = [
        not (s and c == "0") for row in subsets(4).tolist() for s, c in zip(row, case, strict=True)
    ]
    within = torch.tensor(held).view(15, 4).all(1)
    weights = losses**power * within
    chances = zip(subsets(4).tolist(), (weights / weights.sum()).tolist(), strict=True)
    mask = policy(rows(case).expand(20_000, -1), seeded(10))
    assert_drawn_with(mask, {tuple(row): p for row, p in chances})


def test_hard_keeps_a_moving_average_of_each_subset() -> None:
    policy = HardMask(2, decay=0.75)
    first, second = rows("10"), rows("01")
    for mask, loss in ((first, 2.0), (second, 1.0), (first, 4.0), (first, 0.0)):
        policy.observe(mask, torch.tensor([loss]))
    assert policy.losses[:2].tolist() == [0.75 * (0.75 * 2 + 0.25 * 4), 1.0]
    assert policy.losses[2].isnan()
    # A subset that was never seen counts like the mean of the others.
    powers = [value**4 for value in (1.875, 1.0, (1.875 + 1.0) / 2)]
    expected = [p / sum(powers) for p in powers]
    assert policy.probabilities(rows("11"))[0].tolist() == pytest.approx(expected)
    # One batch or three: the order of the samples decides.
    again = HardMask(2, decay=0.75)
    again.observe(torch.cat([first, second, first, first]), torch.tensor([2.0, 1.0, 4.0, 0.0]))
    assert torch.equal(again.losses[:2], policy.losses[:2])


def test_hard_continues_from_its_state() -> None:
    policy, again = HardMask(4), HardMask(4)
    policy.observe(subsets(4)[:9], torch.rand(9, generator=seeded(1)))
    again.load_state_dict(policy.state_dict())
    available = draw_availability(200, PUBLISHED[0])
    assert torch.equal(policy(available, seeded(2)), again(available, seeded(2)))
    kept = again.state_dict()
    policy.observe(subsets(4), torch.rand(15, generator=seeded(3)))
    for name, value in again.state_dict().items():
        assert torch.equal(value.nan_to_num(-1), kept[name].nan_to_num(-1)), "a copy"
    with pytest.raises(ValueError, match="losses: got those of 15 subsets, expected 7"):
        HardMask(3).load_state_dict(kept)


@pytest.mark.parametrize("losses", [[0.0, 0.0, 0.0], [1e9, 1e-9, 0.0]])
def test_hard_draws_from_any_losses(losses: list[float]) -> None:
    policy = HardMask(2, power=100.0)
    policy.observe(subsets(2), torch.tensor(losses))
    chances = policy.probabilities(rows("11", "01"))
    assert chances.isfinite().all() and torch.allclose(chances.sum(1), torch.ones(2).double())
    assert policy(rows("11", "01"), seeded(0)).any(1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": -1.0}, "power: got -1.0, expected a number >= 0"),
        ({"decay": 1.0}, "decay: got 1.0, expected a number in"),
        ({"decay": -0.1}, "decay: got -0.1, expected a number in"),
    ],
)
def test_hard_refuses_bad_numbers(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HardMask(4, **options)


def test_hard_refuses_another_number_of_modalities() -> None:
    with pytest.raises(ValueError, match=r"availability: got shape \(2, 3\), expected \(N, 4\)"):
        HardMask(4)(torch.ones(2, 3).bool())
    with pytest.raises(ValueError, match=r"mask: got shape \(1, 3\), expected \(N, 4\)"):
        HardMask(4).observe(torch.ones(1, 3).bool(), torch.ones(1))


# ---------------------------------------------------------------- group DRO


def test_dro_multiplies_by_the_exponential_of_the_running_loss() -> None:
    policy = GroupDROMask(2, step=0.5, decay=0.75)
    assert policy.weights().tolist() == pytest.approx([1 / 3] * 3)
    q = torch.full((3,), 1 / 3, dtype=torch.float64)
    running = [2.0, 1.0, 1.5]  # a subset without a loss counts like the mean of the others
    policy.observe(rows("10", "01"), torch.tensor([2.0, 1.0]))
    q = q * (0.5 * torch.tensor(running, dtype=torch.float64)).exp()
    assert policy.weights().tolist() == pytest.approx((q / q.sum()).tolist(), rel=1e-12)
    policy.observe(rows("11", "10"), torch.tensor([4.0, 0.0]))
    running = [0.75 * 2, 1.0, 4.0]
    q = q * (0.5 * torch.tensor(running, dtype=torch.float64)).exp()
    assert policy.weights().tolist() == pytest.approx((q / q.sum()).tolist(), rel=1e-12)


def test_dro_draws_in_proportion_to_q_among_the_subsets_of_a_case() -> None:
    policy = GroupDROMask(4, step=1.0)
    policy.observe(subsets(4), torch.linspace(0.0, 2.0, 15))
    available = rows("1011")
    within = ~(subsets(4) & ~available).any(1)
    chances = policy.weights() * within
    expected = zip(subsets(4).tolist(), (chances / chances.sum()).tolist(), strict=True)
    mask = policy(available.expand(20_000, -1), seeded(10))
    assert_drawn_with(mask, {tuple(row): p for row, p in expected})


def test_dro_does_not_favour_what_is_seen_often() -> None:
    policy = GroupDROMask(2, step=1.0)
    for _ in range(5):
        policy.observe(rows("10", "10", "10", "01", "11"), torch.ones(5))
    assert policy.weights().tolist() == pytest.approx([1 / 3] * 3, rel=1e-12)


def test_dro_survives_a_long_training() -> None:
    policy = GroupDROMask(2, step=50.0)
    for _ in range(200):
        policy.observe(rows("10", "01", "11"), torch.tensor([0.0, 1.0, 9.0]))
    chances = policy.probabilities(rows("11", "10"))
    assert chances[0].tolist() == pytest.approx([0, 0, 1], abs=1e-9)
    assert chances[1].tolist() == [1, 0, 0], "a case that has only easy subsets"


def test_dro_continues_from_its_state() -> None:
    policy, again = GroupDROMask(4, step=1.0), GroupDROMask(4, step=1.0)
    policy.observe(subsets(4)[:9], torch.rand(9, generator=seeded(1)))
    again.load_state_dict(policy.state_dict())
    available = draw_availability(200, PUBLISHED[0])
    assert torch.equal(policy(available, seeded(2)), again(available, seeded(2)))
    kept = again.state_dict()
    policy.observe(subsets(4), torch.rand(15, generator=seeded(3)))
    assert torch.equal(again.log_q, kept["log_q"]), "a copy"
    with pytest.raises(ValueError, match="log_q: got those of 15 subsets, expected 7"):
        GroupDROMask(3).load_state_dict({**GroupDROMask(3).state_dict(), "log_q": kept["log_q"]})


def test_dro_refuses_bad_numbers() -> None:
    with pytest.raises(ValueError, match=r"^step: got -1\.0, expected a number >= 0$"):
        GroupDROMask(4, step=-1.0)
    with pytest.raises(ValueError, match=r"^decay: got 1\.0, expected a number in"):
        GroupDROMask(4, decay=1.0)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_the_index_of_a_subset(count: int) -> None:
    order = torch.randperm(2**count - 1, generator=seeded(0))
    assert torch.equal(subset_index(subsets(count)[order]), order)
