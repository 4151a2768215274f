"""Outer steps on random patches, which show how long a configuration takes and how much memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from prism_meta.bilevel.learner import MetaLearner
from prism_meta.modalities import Batch
from prism_meta.step_batches import StepBatches
from prism_meta.training.build import (
    build_model,
    build_objective,
    build_outer,
    build_strategy,
)
from prism_meta.training.config import Config


def trial_learner(
    config: Config, *, device: torch.device | str = "cpu", model: nn.Module | None = None
) -> MetaLearner:
    """A learner whose outer steps are those of ``config``, apart from schedules and precision.

    Args:
        config: all sizes, the objective and the strategy.
        device: device of the model.
        model: is trained. Defaults to the configured network with fresh weights.
    """
    rates = [0.0] * len(config.data.modalities)
    inner_lr = torch.tensor(config.meta.inner_lr)
    strategy = build_strategy(config.meta, inner_lr, weight_decay=config.training.weight_decay)
    model = (build_model(config) if model is None else model).to(device)
    objective = build_objective(config.objective, rates).to(device)
    outer = build_outer(config, model, objective, strategy, steps=1)
    return MetaLearner(
        model,
        objective,
        strategy,
        outer.optimizer,
        alpha=outer.alpha,
        inner_state=config.meta.inner_state,
        clip_norm=config.training.clip_norm,
    )


def trial_step(
    config: Config, masks: Sequence[Tensor], *, device: torch.device | str = "cpu"
) -> Callable[..., None]:
    """A function that takes one outer step of ``config`` on random patches, with other masks if given.

    Args:
        config: see ``trial_learner``.
        masks: (B, M) bool, one per train batch and one for the meta batch.
        device: device of the model and the patches.
    """
    learner, usual = trial_learner(config, device=device), list(masks)

    def step(masks: Sequence[Tensor] = usual) -> None:
        learner.step_episodes([random_episode(config, masks, device)] * config.meta.episodes)

    return step


def seconds_per_step(
    config: Config, masks: Sequence[Tensor], *, device: torch.device | str = "cpu"
) -> float:
    """Take two outer steps and time the second; see ``trial_step``."""
    step = trial_step(config, masks, device=device)
    step()
    start = time.perf_counter()
    step()  # ends with a check of its results, which waits for the device
    return time.perf_counter() - start


def random_episode(
    config: Config, masks: Sequence[Tensor], device: torch.device | str
) -> tuple[Batch | StepBatches, Batch]:
    """Train batches and a meta batch of noise, see ``random_batch``.

    Args:
        config: see ``random_batch``.
        masks: (B, M) bool, one per train batch and one for the meta batch.
        device: device of the batches.
    """
    *train, meta = (random_batch(config, mask).to(device) for mask in masks)
    return (train[0] if len(train) == 1 else StepBatches(train)), meta


def random_batch(config: Config, mask: Tensor) -> Batch:
    """Patches of noise and random labels; ``mask``, bool (B, M), says which modalities are shown."""
    shape, classes = config.data.patch, len(config.data.labels) + 1
    image = torch.randn(*mask.shape, *shape) * mask.view(*mask.shape, *[1] * len(shape))
    return Batch(image, mask, torch.randint(classes, (len(mask), *shape)))
