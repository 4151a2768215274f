"""What an adapted run says of itself: its configuration, and how it was adapted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prism_meta.bilevel.strategies import SingleLevel
from prism_meta.errors import PrismError, one_line
from prism_meta.training.adaptation.choice import Choice, Setting
from prism_meta.training.adaptation.fine_tuning import AVERAGE
from prism_meta.training.config import Config
from prism_meta.training.config.meta import MetaConfig
from prism_meta.training.config.schema import (
    EpisodesConfig,
    FabricConfig,
    MaskConfig,
    ObjectiveConfig,
)
from prism_meta.training.config.training import ValidationConfig
from prism_meta.training.folder.weights import Kind
from prism_meta.training.run import Run

#: How a setting was found: on held-out cases, the default for one patient, or what the user said.
By = Literal["leave_one_out", "default", "user"]
_Dice = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Tried(_Strict):
    """The Dice of held-out cases with one setting."""

    lr: float
    steps: int
    dice: _Dice


class HeldOutFacts(_Strict):
    """Held-out cases: their Dice before and after, at the setting that is best on all others."""

    cases: list[str]
    before: _Dice
    after: _Dice
    lr: float
    steps: int
    tried: list[Tried]


class AdaptationFacts(_Strict):
    """What ``run.json`` says of an adaptation.

    Attributes:
        run: folder of the run that was adapted.
        weights: kind of its weights.
        subset: the modalities that were shown, e.g. ``flair+t1``.
        cases: names of the support cases.
        lr: the rate; 0 if the weights were kept.
        steps: number of steps; 0 if the weights were kept.
        by: how they were found.
        reason: why they were chosen, one sentence.
        held_out: what leave-one-out found; empty without.
    """

    run: str
    weights: Kind
    subset: str
    cases: list[str]
    lr: float
    steps: int
    by: By
    reason: str
    held_out: list[HeldOutFacts] = []

    @classmethod
    def of(
        cls, choice: Choice, *, by: By, run: Path, weights: Kind, subset: str, cases: Sequence[str]
    ) -> AdaptationFacts:
        """Collect the facts of an adaptation."""
        lr, steps = choice.setting or (0.0, 0)
        return cls(
            run=str(run.resolve()),
            weights=weights,
            subset=subset,
            cases=list(cases),
            lr=lr,
            steps=steps,
            by=by,
            reason=choice.reason,
            held_out=[
                HeldOutFacts(
                    cases=list(one.cases),
                    before=one.before,
                    after=one.after,
                    lr=one.setting.lr,
                    steps=one.setting.steps,
                    tried=[
                        Tried(lr=setting.lr, steps=setting.steps, dice=dice)
                        for setting, dice in tried.after.items()
                    ],
                )
                for one, tried in zip(choice.compared, choice.held_out, strict=True)
            ],
        )

    def sentence(self) -> str:
        """What was done, for messages and reports."""
        done = (
            f"adapted in {Setting(self.lr, self.steps)}"
            if self.steps
            else "the weights were kept as they are"
        )
        return f"{done}: {self.reason}"


def adaptation_of(run: Run) -> AdaptationFacts | None:
    """How a run was adapted; None if it was not.

    Raises:
        PrismError: ``run.json`` has another form.
    """
    stored = run.facts.get("adaptation")
    if not stored:
        return None
    try:
        return AdaptationFacts.model_validate(stored)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in ("adaptation", *first["loc"]))
        reason = one_line(f"{where}: {first['msg'].lower()}")
        raise PrismError(
            f"{run.folder / 'run.json'}: is damaged ({reason}); restore it, or adapt again"
        ) from error


def adapted_config(config: Config, setting: Setting | None, *, parent: Path, seed: int) -> Config:
    """The configuration of an adapted run.

    Args:
        config: of the run that was adapted. Its network, labels, patch and preprocessing stay.
        setting: the rate and the length; with None the sections of the training stay, too.
        parent: folder of that run.
        seed: of the adaptation.
    """
    nothing_held_out: Mapping[str, Any] = {
        "availability": None, "missing_rates": None, "meta_missing_rates": None, "test_cases": (),
        "holdout": 0, "folds": None, "fold": None,
    }  # fmt: skip
    training: dict[str, Any] = {"init": parent.resolve(), "loggers": (), "ema": 0.0}
    changed: dict[str, Any] = {
        "seed": seed,
        "data": config.data.model_copy(update=nothing_held_out),
        "validation": ValidationConfig(),
        "fabric": FabricConfig(),
    }
    if setting is not None:
        training |= {
            "steps": setting.steps,
            "lr": setting.lr,
            "schedule": "constant",
            "warmup": 0,
            "weight_decay": 0.0,
            "ema": AVERAGE,
            "cosine_every": 0,
        }
        changed |= {
            "masks": MaskConfig(),
            "episodes": EpisodesConfig(),
            "meta": MetaConfig(strategy=SingleLevel.name),
            "objective": adapted_objective(config),
        }
    changed["training"] = config.training.model_copy(update=training)
    return config.model_copy(update=changed)


def adapted_objective(config: Config) -> ObjectiveConfig:
    """The section ``objective`` of an adaptation: only the fused output is trained, since it is deployed."""
    return config.objective.model_copy(update={"unimodal": False, "weighting": "fixed"})
