"""Schedules of the outer learning rate."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

#: Polynomial decay with the exponent 0.9 (as PASSION and nnU-Net have it), half a cosine, or none.
Schedule = Literal["polynomial", "cosine", "constant"]
#: Name -> factor of the rate by the share of training that is done, in [0, 1].
_FACTORS: Mapping[Schedule, Callable[[float], float]] = MappingProxyType(
    {
        "polynomial": lambda done: (1 - done) ** 0.9,
        "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
        "constant": lambda done: 1.0,
    }
)


def factor(step: int, total: int, *, schedule: Schedule = "polynomial", warmup: int = 0) -> float:
    """The factor of the learning rate in outer step ``step``, counted from 0.

    The rate grows linearly over ``warmup`` steps and reaches its full value with the first step after
    them, where the decay to 0 starts.

    Args:
        step: the outer step.
        total: number of outer steps.
        schedule: its name.
        warmup: number of steps of growth.

    Example:
        >>> [factor(step, 4, schedule="constant", warmup=2) for step in range(4)]
        [0.3333333333333333, 0.6666666666666666, 1.0, 1.0]
        >>> [round(factor(step, 4, schedule="cosine"), 3) for step in range(4)]
        [1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    return _FACTORS[schedule](min(1.0, done))


def scheduled(
    optimizer: Optimizer, total: int, *, schedule: Schedule = "polynomial", warmup: int = 0
) -> LambdaLR:
    """A schedule of ``optimizer``, one step per outer step; see ``factor``."""
    return LambdaLR(optimizer, lambda step: factor(step, total, schedule=schedule, warmup=warmup))


def go_to(scheduler: LRScheduler, step: int, first_lrs: Sequence[float]) -> None:
    """Bring the learning rates to where a schedule of the present length has them at ``step``.

    Args:
        scheduler: a new one.
        step: the outer step.
        first_lrs: the rates of the groups of its optimizer before the first step.
    """
    for group, lr in zip(scheduler.optimizer.param_groups, first_lrs, strict=True):
        group["lr"] = lr
    with warnings.catch_warnings():
        # torch warns because the steps of the optimizer were taken in another process.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for _ in range(step):
            scheduler.step()
