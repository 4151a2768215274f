"""The sections ``training`` and ``validation`` of a configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from prism_meta.errors import ConfigError, raise_faults
from prism_meta.modalities import composed
from prism_meta.training.config.types import (
    NotNegative,
    Positive,
    Rate,
    Repeats,
    Section,
    Select,
    Steps,
    UserPath,
    listed,
)
from prism_meta.training.outer.alignment import COSINE_EVERY
from prism_meta.training.outer.optimizer import LR, WEIGHT_DECAY
from prism_meta.training.outer.schedules import Schedule

#: Loggers of Lightning, see ``prism_meta.training.loggers``.
LoggerName = Literal["tensorboard", "mlflow", "wandb"]


class TrainingConfig(Section):
    """The outer optimizer (AdamW with a schedule) and the length of training."""

    steps: Steps = 1000
    lr: Positive = LR
    #: Decay of the rate to 0, or a constant rate; and the steps over which it grows first.
    schedule: Schedule = "polynomial"
    warmup: Annotated[int, Field(strict=True, ge=0, le=10**8)] = 0
    weight_decay: NotNegative = WEIGHT_DECAY
    #: Largest norm of the meta-gradient; a longer one is scaled down. The way of ``reptile`` is no gradient
    #: and never scaled.
    clip_norm: Positive = 5.0
    #: Run folder with the weights to start from; modalities are matched by name. Defaults to random weights.
    init: UserPath | None = None
    #: Decay of a moving average of the weights, e.g. 0.99; 0 keeps none.
    ema: Rate = 0.99
    augment: bool = True
    checkpoint_every: Steps = 100
    #: Outer steps between measurements of the cosine of the meta-gradient with the single-level one; 0 for
    #: none.
    cosine_every: Annotated[int, Field(strict=True, ge=0, le=10**8)] = COSINE_EVERY
    #: What gets the numbers of metrics.jsonl and pictures of validations, too; see docs/training.md.
    loggers: Annotated[tuple[LoggerName, ...], BeforeValidator(listed)] = ()

    @model_validator(mode="after")
    def _consistent(self) -> TrainingConfig:
        if self.warmup >= self.steps:
            raise ValueError(
                f"warmup: got {self.warmup} steps of {self.steps}, expected fewer than all; use fewer"
            )
        if len(set(self.loggers)) < len(self.loggers):
            raise ValueError("loggers: one of them occurs twice; give each name once")
        return self


class ValidationConfig(Section):
    """Cases that are not trained on, and are predicted now and then during training."""

    #: Their number, drawn with the seed from the cases that are not held out, whole patients, stratified by
    #: availability; or their names. 0 means no validation.
    cases: (
        Annotated[int, Field(strict=True, ge=0, le=10**6)]
        | tuple[Annotated[str, AfterValidator(composed)], ...]
    ) = 0
    #: Outer steps between validations; the last step is always followed by one.
    every: Steps = 100
    #: Which Dice the best weights have: the mean over all subsets of modalities, or that of the worst one.
    select: Select = "mean"
    #: Training ends after this many validations in a row without a better one. Defaults to no early end.
    patience: Repeats | None = None

    @property
    def is_on(self) -> bool:
        """Whether there is a validation."""
        return bool(self.cases)

    @model_validator(mode="after")
    def _consistent(self) -> ValidationConfig:
        faults = []
        if self.patience is not None and not self.is_on:
            faults.append("patience: needs validation; set cases, or leave patience out")
        if isinstance(self.cases, tuple) and len(set(self.cases)) < len(self.cases):
            faults.append("cases: a case occurs twice; give each name once")
        raise_faults(ConfigError, faults)
        return self
