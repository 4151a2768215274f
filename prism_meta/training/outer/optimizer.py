"""The outer optimizer with its schedule, for any strategy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from prism_meta.bilevel.strategies import LearnedObjective, MetaStrategy, Objective
from prism_meta.training.outer.schedules import Schedule, factor, scheduled

#: Default weight of phi~ - phi in E2.
ALPHA = 0.5
#: Default learning rate of the model's parameters.
LR = 1e-2
#: Default learning rate of learned weights and learned inner rates.
HYPER_LR = 1e-2
#: Default weight decay of the model's parameters.
WEIGHT_DECAY = 1e-4


@dataclass(frozen=True)
class Outer:
    """What the outer step (E2) is made of.

    Args:
        optimizer: holds the model's parameters and all learned hyper-parameters.
        scheduler: its schedule, one step per outer step.
        alpha: weight of phi~ - phi.
        prescribed: whether the strategy chose all of them.
        inner_schedule: factor of the inner rate in an outer step, counted from 0, if it follows the
            schedule: that of the outer rate, or what it would be if the strategy had not chosen its own.
    """

    optimizer: Optimizer
    scheduler: LRScheduler
    alpha: float
    prescribed: bool
    inner_schedule: Callable[[int], float]


def outer_step(
    model: nn.Module,
    objective: Objective,
    strategy: MetaStrategy,
    *,
    steps: int,
    alpha: float = ALPHA,
    lr: float = LR,
    weight_decay: float = WEIGHT_DECAY,
    hyper_lr: float = HYPER_LR,
    schedule: Schedule = "polynomial",
    warmup: int = 0,
) -> Outer:
    """What the strategy prescribes; otherwise AdamW with a schedule of its rate.

    Args:
        model: on its device.
        objective: a ``LearnedObjective`` gets a parameter group for its weights.
        strategy: learned hyper-parameters of its inner optimizer are in the same group.
        steps: number of outer steps.
        alpha: weight of phi~ - phi; a strategy that prescribes its outer step uses 0.
        lr: learning rate of the model's parameters.
        weight_decay: weight decay of the model's parameters.
        hyper_lr: learning rate of what is learned beside them, which has no weight decay.
        schedule: of both rates.
        warmup: number of outer steps over which they grow first.

    Example:
        >>> from prism_meta.bilevel.inner import SGD
        >>> from prism_meta.bilevel.strategies import FirstOrder, Reptile
        >>> model, mse = nn.Linear(1, 1), lambda forward, batch: forward(batch).mean()
        >>> outer = outer_step(model, mse, Reptile(SGD(0.1)), steps=10)
        >>> type(outer.optimizer).__name__, outer.alpha
        ('SGD', 0.0)
        >>> outer = outer_step(model, mse, FirstOrder(SGD(0.1)), steps=10)
        >>> type(outer.optimizer).__name__, outer.alpha
        ('AdamW', 0.5)
    """
    params = list(model.parameters())
    inner_schedule = partial(factor, total=steps, schedule=schedule, warmup=warmup)
    prescribed = strategy.outer_optimizer(params, steps)
    if prescribed is not None:
        return Outer(*prescribed, alpha=0.0, prescribed=True, inner_schedule=inner_schedule)
    groups: list[dict[str, Any]] = [{"params": params}]
    learned = _learned(objective, strategy)
    if learned:
        # Weight decay would pull a free parameter to 0, which is a weight of log 2.
        groups.append({"params": learned, "lr": hyper_lr, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)
    scheduler = scheduled(optimizer, steps, schedule=schedule, warmup=warmup)
    return Outer(optimizer, scheduler, alpha, prescribed=False, inner_schedule=inner_schedule)


def _learned(objective: Objective, strategy: MetaStrategy) -> list[Tensor]:
    inner = getattr(strategy, "inner", None)
    learned = [] if inner is None else list(inner.hyper_parameters().values())
    if isinstance(objective, LearnedObjective):
        learned += objective.hyper_parameters().values()
    return learned
