"""What a configuration may say: sections and keys, their defaults, and what does not go together.

The classes hold data only. ``prism_meta.training.build`` turns them into objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tomlkit
from pydantic import Field, model_validator

from prism_meta.errors import ConfigError, raise_faults
from prism_meta.evaluation.windows import OVERLAP
from prism_meta.objective import losses
from prism_meta.objective.weighting import BETA, DELTA
from prism_meta.training.config.baselines import read_baseline
from prism_meta.training.config.data import DataConfig
from prism_meta.training.config.file import is_set, read_config
from prism_meta.training.config.meta import MetaConfig
from prism_meta.training.config.model import ModelConfig
from prism_meta.training.config.training import TrainingConfig, ValidationConfig
from prism_meta.training.config.types import (
    NotNegative,
    Positive,
    Rate,
    Repeats,
    Section,
)
from prism_meta.training.outer.optimizer import HYPER_LR

Mask = Literal["dynamic", "static", "full", "single", "balanced", "hard", "dro", "one_subset"]
#: Policies that follow the losses, and the option that only one of them has.
_FOLLOWING = {"hard": "power", "dro": "step"}
#: Policies that seldom or never show some of the subsets.
_FEW_SUBSETS = ("static", "full", "single")


class MaskConfig(Section):
    """The mask policies of the two batches of an episode."""

    train: Mask = "dynamic"
    meta: Mask = "dynamic"
    #: Hard masks show a subset in proportion to this power of its running loss in meta batches.
    power: Annotated[float, Field(strict=True, ge=0, le=100)] = 4.0
    #: Step size of group DRO (dro), which raises the chance of subsets with a large running loss.
    step: Annotated[float, Field(strict=True, ge=0, le=100)] = 0.01

    @property
    def follow_losses(self) -> bool:
        """Whether a policy needs the losses of the samples."""
        return bool(_FOLLOWING.keys() & {self.train, self.meta})

    @model_validator(mode="after")
    def _consistent(self) -> MaskConfig:
        faults = []
        if self.follow_losses and self.meta in _FEW_SUBSETS:
            faults.append(
                f"meta: {self.train} masks follow the losses of the meta batches, and {self.meta} ones show "
                f"few subsets there; use dynamic, balanced, one_subset or {self.train}"
            )
        faults += [
            f"{option}: only {name} masks have one; leave it out, or use {name} for train"
            for name, option in _FOLLOWING.items()
            if getattr(self, option) != MaskConfig.model_fields[option].default
            and name not in (self.train, self.meta)
        ]
        raise_faults(ConfigError, faults)
        return self


class EpisodesConfig(Section):
    """What an episode is."""

    #: Meta-Drop's episodes, whose two batches have masks of their own; or tasks: support and query from one
    #: site (if the cases name theirs) and with one subset.
    kind: Literal["meta_drop", "task"] = "meta_drop"
    #: Number of support cases of a task.
    support: Repeats = 1

    @model_validator(mode="after")
    def _consistent(self) -> EpisodesConfig:
        if self.kind != "task" and self.support != 1:
            raise ValueError(
                f"support: {self.support} support cases need kind = task; set it, or leave support out"
            )
        return self


class ObjectiveConfig(Section):
    """Weights and options of the objective (E10)."""

    beta: NotNegative | tuple[NotNegative, ...] = BETA
    delta: NotNegative | tuple[NotNegative, ...] = DELTA
    #: Fixed weights; weights scaled by relative preference (E11); or learned weights, which start at
    #: these values (E12).
    weighting: Literal["fixed", "preference", "learned"] = "fixed"
    #: Step size gamma of E11, one step per epoch.
    preference_rate: NotNegative = 0.01
    #: Initial outer learning rate of learned weights; it decays like training.lr.
    weights_lr: Positive = HYPER_LR
    #: Weights of the samples' losses by subset: equal, or learned by the gradient of L_meta (E12).
    subset_weights: Literal["equal", "learned"] = "equal"
    #: What the outer level minimises: the same objective as the inner one; the soft worst over subsets of
    #: L_fuse, with its temperature; or a penalty where more modalities are worse than fewer, with its weight.
    meta_loss: Literal["same", "soft_worst", "ranking"] = "same"
    meta_temperature: Positive = 0.1
    ranking_weight: Positive = 1.0
    temperature: Positive = 4.0
    direction: losses.Direction = "student_teacher"
    #: Weight prm maps (coarse-scale outputs of the fused decoder) by 2^-s in E8, as in the published code.
    scale_decay: bool = False
    prototype: Literal["l2", "similarity"] = "l2"
    #: Class weights in the cross-entropy (E5). Off by default: a patch without foreground gives its
    #: only class the weight 0, and most slices of a brain have no tumour.
    weighted: bool = False
    #: False trains on L_fuse + L_prm only: no unimodal branch, no distillation.
    unimodal: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> ObjectiveConfig:
        faults = []
        faults += [
            f"{key}: only meta_loss = {name} has one; set it, or leave {key} out"
            for key, name in (("meta_temperature", "soft_worst"), ("ranking_weight", "ranking"))
            if getattr(self, key) != type(self).model_fields[key].default and self.meta_loss != name
        ]
        if not self.unimodal and self.weighting != "fixed":
            faults.append(
                f"weighting: {self.weighting} has nothing to weigh without unimodal; use fixed"
            )
        if self.weighting == "learned" and not all(
            weight > 0
            for weights in (self.beta, self.delta)
            for weight in (weights if isinstance(weights, tuple) else (weights,))
        ):
            faults.append(
                "beta, delta: learned weights start at numbers > 0, because softplus is never 0; "
                "use larger ones"
            )
        raise_faults(ConfigError, faults)
        return self


class FabricConfig(Section):
    """Devices and precision, as Lightning Fabric names them."""

    accelerator: str = "auto"
    #: A number of devices, -1 or "auto" for all, or a list of their indices such as "0,2".
    devices: Annotated[int, Field(strict=True, ge=-1, le=1024)] | str = 1
    nodes: Repeats = 1
    #: 16-mixed is half precision with a scaler, on GPUs only.
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"


class EvaluationConfig(Section):
    """The sliding window, and what an empty mask gives."""

    overlap: Rate = OVERLAP
    empty: Literal["brats", "nan", "diagonal"] = "brats"


class Config(Section):
    """A whole configuration; every key has a default.

    Example:
        >>> Config().data.patch
        (96, 96)
        >>> load_config(overrides=["data.pach=[64, 64]"])
        Traceback (most recent call last):
        ...
        prism_meta.errors.ConfigError: data.pach: unknown key; did you mean data.patch?
    """

    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = 0
    data: DataConfig = DataConfig()
    masks: MaskConfig = MaskConfig()
    episodes: EpisodesConfig = EpisodesConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    meta: MetaConfig = MetaConfig()
    training: TrainingConfig = TrainingConfig()
    validation: ValidationConfig = ValidationConfig()
    fabric: FabricConfig = FabricConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        modalities, faults = len(self.data.modalities), []
        for name, weights in (("beta", self.objective.beta), ("delta", self.objective.delta)):
            if isinstance(weights, tuple) and len(weights) != modalities:
                faults.append(
                    f"objective.{name}: got {len(weights)} weights for {modalities} modalities; give one "
                    "for all, or one for each"
                )
        if self.objective.weighting == "learned" and not self.meta.kind.has_meta_gradient:
            faults.append(
                f"objective.weighting: learned weights follow the gradient of the meta loss through "
                f"the inner steps, and meta.strategy {self.meta.strategy} has none; use first_order or "
                "second_order, or weighting fixed or preference"
            )
        if self.objective.subset_weights == "learned" and not self.meta.kind.has_meta_gradient:
            faults.append(
                f"objective.subset_weights: learned weights follow the gradient of the meta loss through "
                f"the inner steps, and meta.strategy {self.meta.strategy} has none; use first_order or "
                "second_order, or subset_weights equal"
            )
        if self.objective.meta_loss != "same" and not self.meta.kind.learns_from_meta:
            faults.append(
                f"objective.meta_loss: meta.strategy {self.meta.strategy} only measures the meta loss; use "
                "first_order, second_order or joint, or meta_loss same"
            )
        if self.episodes.kind == "task" and self.masks != MaskConfig():
            faults.append(
                "masks, episodes.kind: all samples of a task show one subset, without masks of their own; "
                "leave masks out, or use episodes.kind meta_drop"
            )
        factor, patch = 2 ** (self.model.depth - 1), self.data.patch
        if self.model.network in ("unet", "conditioned_unet") and (
            any(n % factor for n in patch) or max(patch) == factor
        ):
            faults.append(
                f"data.patch: the U-Net halves it {self.model.depth - 1} times; give multiples of "
                f"{factor}, one of them larger, or a smaller model.depth"
            )
        raise_faults(ConfigError, faults)
        return self

    def to_toml(self) -> str:
        """The configuration with all its keys as TOML; ``load_config`` reads it back."""
        return tomlkit.dumps(self.model_dump(mode="json", exclude_none=True))


def load_config(
    path: Path | str | None = None, overrides: Sequence[str] = (), *, baseline: str | None = None
) -> Config:
    """Read a TOML file and apply ``section.key=value`` overrides to it.

    Args:
        path: TOML file. Defaults to no file.
        overrides: values are TOML (``[64, 64]``, ``true``, ``0.1``); a bare word is a string.
        baseline: name of a baseline, see ``BASELINES``. Settings apply in order: baseline, file,
            overrides.

    Returns:
        The configuration, with defaults for all other keys.

    Raises:
        ConfigError: all faults together, each with its key.
    """
    start = {} if baseline is None else read_baseline(baseline)
    if is_set("data.availability", path, overrides):
        start.get("data", {}).pop("missing_rates", None)  # a table of one's own replaces its rates
    return read_config(Config, path, overrides, start=start)
