"""Averaged weights, and schedules of the learning rate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from prism_meta.training.outer.averaging import AveragedWeights
from prism_meta.training.outer.schedules import factor, scheduled


def test_the_average_is_that_of_its_recursion() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    averaged = AveragedWeights(model, 0.3)
    expected: dict[str, Tensor] = {}
    for n in range(6):
        for value in (*model.parameters(), *model.buffers()):
            value.data = (
                torch.randn(value.shape).double() if value.is_floating_point() else value + 1
            )
        decay = min(0.3, (1 + n) / (10 + n)) if n else 0.0
        for name, value in model.state_dict().items():
            old = expected.get(name, value)
            mixed = decay * old + (1 - decay) * value if value.is_floating_point() else value
            expected[name] = mixed.clone()
        averaged.update(model)
    for name, value in averaged.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=0)
    again = AveragedWeights(model, 0.3)
    again.load_state_dict(averaged.state_dict())
    for one in (averaged, again):
        one.update(model)
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, averaged.model.state_dict()[name])


def test_schedules_follow_their_formulas() -> None:
    for step in range(10):
        assert factor(step, 10) == pytest.approx((1 - step / 10) ** 0.9, abs=1e-15)
        cosine = factor(step, 10, schedule="cosine")
        assert cosine == pytest.approx(0.5 * (1 + math.cos(math.pi * step / 10)), abs=1e-15)
        assert factor(step, 10, schedule="constant") == 1.0
    warm = [factor(step, 10, warmup=4) for step in range(10)]
    assert warm[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert warm[4:] == pytest.approx([(1 - k / 6) ** 0.9 for k in range(6)])
    assert factor(10, 10) == factor(12, 10) == 0.0
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = scheduled(optimizer, 3, schedule="constant", warmup=1)
    rates = []
    for _ in range(3):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == [0.25, 0.5, 0.5]
