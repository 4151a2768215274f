"""The parts of a training: what the caller passed, and what the configuration builds beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from prism_meta.bilevel.strategies import MetaStrategy, Objective
from prism_meta.data.cache import CachedCase
from prism_meta.data.drawing import DrawnEpisodes
from prism_meta.errors import ConfigError
from prism_meta.training.build import (
    build_episodes,
    build_model,
    build_objective,
    build_outer,
    build_owner,
    build_strategy,
    missing_rates,
)
from prism_meta.training.config import Config
from prism_meta.training.fit import OnStep, fit, inner_steps
from prism_meta.training.loggers.following import Loggers
from prism_meta.training.outer.optimizer import Outer
from prism_meta.training.validation.validation import Validation

if TYPE_CHECKING:  # it takes two seconds to import
    from lightning_fabric import Fabric

_T = TypeVar("_T")


@dataclass(frozen=True)
class Own:
    """The objects that a caller passed instead of configuring them."""

    model: nn.Module | None
    objective: Objective | None
    strategy: MetaStrategy | None

    def names(self) -> dict[str, str]:
        """What was passed, by the names of the classes, for ``run.json``."""
        return {
            name: type(value).__name__ for name, value in vars(self).items() if value is not None
        }


@dataclass(frozen=True)
class Parts:
    """What a training is made of."""

    model: nn.Module
    objective: Objective
    strategy: MetaStrategy
    episodes: Any
    outer: Outer
    inner_lr: Tensor | None

    def fit(
        self,
        config: Config,
        *,
        fabric: Fabric,
        folder: Path | None,
        resume: bool,
        validation: Validation | None,
        loggers: Loggers | None,
        on_step: OnStep,
        should_stop: Callable[[], bool] | None,
    ) -> list[dict[str, Any]]:
        """Train, and return the log; see ``fit``."""
        return fit(
            self.model,
            self.objective,
            self.strategy,
            self.episodes,
            optimizer=self.outer.optimizer,
            scheduler=self.outer.scheduler,
            alpha=self.outer.alpha,
            inner_lr=self.inner_lr,
            inner_schedule=self.outer.inner_schedule,
            inner_state=config.meta.inner_state,
            outer_parameters=build_owner(config.meta, self.model),
            clip_norm=None if self.outer.prescribed else config.training.clip_norm,
            episodes_per_step=config.meta.episodes,
            fabric=fabric,
            folder=folder,
            checkpoint_every=config.training.checkpoint_every,
            resume=resume,
            workers=config.data.workers,
            validation=validation,
            ema=config.training.ema,
            loggers=loggers,
            cosine_every=config.training.cosine_every,
            seed=config.seed,
            on_step=on_step,
            should_stop=should_stop,
        )


def build_parts(config: Config, source: Any, own: Own, *, fabric: Fabric) -> Parts:
    """Build what the caller did not pass."""
    meta = config.meta
    prepared = only(source, CachedCase)
    rates = _rates(source, config, own)
    inner_lr = torch.tensor(meta.inner_lr)
    strategy = own.strategy or build_strategy(
        meta, inner_lr, weight_decay=config.training.weight_decay
    )
    episodes = (
        build_episodes(config, prepared, inner_steps=inner_steps(strategy), rank=fabric.global_rank)
        if prepared
        else source
    )
    torch.manual_seed(config.seed)  # gives every process the same initial weights
    model = own.model or build_model(config)
    build_owner(meta, model)  # raises if its patterns do not fit
    fabric.to_device(model)
    objective = own.objective or build_objective(
        config.objective, rates, sample_losses=config.masks.follow_losses
    )
    if isinstance(objective, nn.Module):
        objective.to(fabric.device)
    steps = len(episodes) // meta.episodes
    outer = build_outer(config, model, objective, strategy, steps=steps)
    decays = meta.inner_decay and own.strategy is None
    return Parts(model, objective, strategy, episodes, outer, inner_lr if decays else None)


def only(cases: Any, kind: type[_T] | tuple[type[_T], ...]) -> list[_T]:
    """The cases as a list if all of them are of this kind, otherwise an empty list."""
    if isinstance(cases, Sequence) and all(isinstance(case, kind) for case in cases):
        return list(cases)
    return []


def _rates(source: Any, config: Config, own: Own) -> Sequence[float]:
    """The missing rates of the training cases, as far as they are known."""
    cases = source.cases if isinstance(source, DrawnEpisodes) else only(source, CachedCase)
    if cases:
        return missing_rates(cases)
    if own.objective is None and config.objective.weighting == "preference":
        raise ConfigError(
            "objective.weighting: preference depends on the cases and their epochs, which a dataset of "
            "episodes does not tell; give cases, or call prism_meta.fit with epoch=..."
        )
    return config.data.missing_rates or [0.0] * len(config.data.modalities)
