"""What a configuration may say: sections and keys, their defaults, and what does not go together.

The classes hold data only. ``prism_meta.training.build`` turns them into objects.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tomlkit
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from prism_meta.bilevel.strategies import FirstOrder, MetaStrategy
from prism_meta.bilevel.strategies.registry import ALL_STRATEGIES, strategy_named
from prism_meta.data.episodes import DEFAULT_FOREGROUND
from prism_meta.data.labels import BRATS_LABELS, LabelSet
from prism_meta.data.preprocessing import DEFAULT_SPACING
from prism_meta.errors import PrismError
from prism_meta.evaluation.windows import OVERLAP, PATCHES
from prism_meta.modalities import BRATS
from prism_meta.objective import losses
from prism_meta.objective.weighting import BETA, DELTA
from prism_meta.training.config.baselines import read_baseline
from prism_meta.training.config.file import read_config
from prism_meta.training.outer import ALPHA, HYPER_LR, LR, WEIGHT_DECAY

Rate = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Mask = Literal["dynamic", "static", "full", "single", "balanced"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(_Section):
    """Cases, their labels, and the patches drawn from them."""

    modalities: tuple[str, ...] = BRATS
    label: str = "seg"
    labels: dict[str, int] = dict(BRATS_LABELS.values)
    #: Region -> classes. Defaults to WT, TC and ET for the BraTS labels, otherwise to one per class.
    regions: dict[str, tuple[str, ...]] = {}
    #: Voxel size of the model's grid in mm.
    spacing: tuple[Positive, Positive, Positive] = DEFAULT_SPACING
    #: Voxels; two numbers train on slices, three on volumes.
    patch: Annotated[tuple[Count, ...], Field(min_length=2, max_length=3)] = PATCHES[2]
    batch_size: Count = 8
    #: Share of patches centred on a foreground class.
    foreground: Share = DEFAULT_FOREGROUND
    #: CSV that says which modalities to use, see ``read_availability``.
    availability: Path | None = None
    #: Rates at which modalities are made missing in the training cases, instead of a table.
    missing_rates: tuple[Rate, ...] | None = None
    #: Cases that are held out for ``evaluate``, by name; or their number, drawn with the seed.
    test_cases: tuple[str, ...] = ()
    holdout: Annotated[int, Field(ge=0)] = 0
    #: Folder of prepared volumes. Defaults to a folder beside the run folder.
    cache: Path | None = None
    #: Number of additional processes that load data.
    workers: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if len(set(self.modalities)) != len(self.modalities) or not self.modalities:
            raise ValueError("modalities: give different names, at least one")
        if self.missing_rates is not None and len(self.missing_rates) != len(self.modalities):
            raise ValueError(f"missing_rates: give {len(self.modalities)} rates, one per modality")
        if self.missing_rates is not None and self.availability is not None:
            raise ValueError("missing_rates, availability: give one of the two")
        if self.test_cases and self.holdout:
            raise ValueError("test_cases, holdout: give one of the two")
        try:
            LabelSet(self.labels, self.regions)
        except PrismError as error:
            raise ValueError("; ".join(error.faults)) from error
        return self


class MaskConfig(_Section):
    """The mask policies of the two batches of an episode."""

    train: Mask = "dynamic"
    meta: Mask = "dynamic"


class ModelConfig(_Section):
    """The network and its size."""

    #: PRISM's network, or MONAI's U-Net with residual units and InstanceNorm, wrapped by ``wrap``.
    network: Literal["prism", "unet"] = "prism"
    #: How PRISM's network weights the shown modalities; a U-Net has no fusion.
    fusion: Literal["region_aware", "mean", "attention"] = "region_aware"
    #: Channels at full resolution; they double at each of the ``depth`` scales.
    width: Count = 8
    depth: Annotated[int, Field(ge=2)] = 4

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.network != "prism" and self.fusion != "region_aware":
            raise ValueError(
                f"fusion: {self.fusion} needs network = prism, because a U-Net has no fusion; leave it out"
            )
        return self


class ObjectiveConfig(_Section):
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
        if not self.unimodal and self.weighting != "fixed":
            raise ValueError(
                f"weighting: {self.weighting} has nothing to weigh without unimodal; use fixed"
            )
        if self.weighting == "learned" and not all(
            weight > 0
            for weights in (self.beta, self.delta)
            for weight in (weights if isinstance(weights, tuple) else (weights,))
        ):
            raise ValueError(
                "beta, delta: learned weights start at numbers > 0, because softplus is never 0"
            )
        return self


class MetaConfig(_Section):
    """The two levels: the strategy, its inner steps, and the pull of E2."""

    #: Name of a registered strategy, see ``register_strategy``.
    strategy: str = FirstOrder.name
    inner: Literal["sgd", "adamw"] = "sgd"
    inner_lr: NotNegative = 0.05
    inner_momentum: Share = 0.0
    #: Let the inner rate decay with the outer one.
    inner_decay: bool = True
    inner_steps: Count = 1
    #: State of the inner optimizer between outer steps: fresh, carried, or shared with the outer AdamW.
    inner_state: Literal["fresh", "carried", "shared"] = "fresh"
    #: Weight of phi~ - phi in E2; 0 for a strategy that prescribes its own outer step.
    alpha: Share = ALPHA
    #: Episodes that an outer step averages over.
    episodes: Count = 1
    #: Lambda and the number of conjugate-gradient steps of ``implicit``.
    proximal: Positive = 1.0
    cg_steps: Count = 5

    @property
    def kind(self) -> type[MetaStrategy]:
        """The class that ``strategy`` names."""
        return strategy_named(self.strategy)

    @property
    def prescribes_outer(self) -> bool:
        """Whether the strategy brings an outer optimizer of its own."""
        return self.kind.outer_optimizer is not MetaStrategy.outer_optimizer

    @field_validator("strategy")
    @classmethod
    def _registered(cls, name: str) -> str:
        known = [kind.name for kind in ALL_STRATEGIES]
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"got {name!r}, expected one of {', '.join(known)}; did you mean {nearest}?"
            )
        return name

    @model_validator(mode="after")
    def _consistent(self) -> MetaConfig:
        if self.inner_state == "shared" and self.inner != "adamw":
            raise ValueError(
                "inner_state: shared needs inner = adamw, the optimizer of the outer step"
            )
        if self.inner_state == "shared" and (not self.kind.adapts or self.prescribes_outer):
            raise ValueError(
                f"inner_state: shared does not go with {self.strategy}; use fresh or carried"
            )
        unknown = [name for name in self.kind.options if name not in type(self).model_fields]
        if unknown:
            raise ValueError(
                f"strategy: {self.strategy} has the options {', '.join(unknown)}, which are no keys of "
                "a configuration; pass the strategy as an object to prism_meta.train"
            )
        return self


class TrainingConfig(_Section):
    """The outer optimizer (AdamW with a polynomial decay to 0) and the length of training."""

    steps: Count = 1000
    lr: Positive = LR
    weight_decay: NotNegative = WEIGHT_DECAY
    #: Largest norm of the meta-gradient; a longer one is scaled down.
    clip_norm: Positive = 5.0
    augment: bool = True
    checkpoint_every: Count = 100


class FabricConfig(_Section):
    """Devices and precision, as Lightning Fabric names them."""

    accelerator: str = "auto"
    devices: int | str = 1
    nodes: Count = 1
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"


class EvaluationConfig(_Section):
    """The sliding window, and what an empty mask gives."""

    overlap: Annotated[float, Field(ge=0, lt=1)] = OVERLAP
    empty: Literal["brats", "nan", "diagonal"] = "brats"


class Config(_Section):
    """A whole configuration; every key has a default.

    Example:
        >>> Config().data.patch
        (96, 96)
        >>> load_config(overrides=["data.pach=[64, 64]"])
        Traceback (most recent call last):
        ...
        prism_meta.errors.ConfigError: data.pach: unknown key; did you mean data.patch?
    """

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    data: DataConfig = DataConfig()
    masks: MaskConfig = MaskConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    meta: MetaConfig = MetaConfig()
    training: TrainingConfig = TrainingConfig()
    fabric: FabricConfig = FabricConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        for name, weights in (("beta", self.objective.beta), ("delta", self.objective.delta)):
            if isinstance(weights, tuple) and len(weights) != len(self.data.modalities):
                raise ValueError(
                    f"objective.{name}: give one weight, or {len(self.data.modalities)}, one per modality"
                )
        if self.objective.weighting == "learned" and not self.meta.kind.has_meta_gradient:
            raise ValueError(
                f"objective.weighting: learned weights follow the gradient of the meta loss through "
                f"the inner steps, and meta.strategy {self.meta.strategy} has none; use first_order or "
                "second_order, or weighting fixed or preference"
            )
        factor, patch = 2 ** (self.model.depth - 1), self.data.patch
        if self.model.network == "unet" and (
            any(n % factor for n in patch) or max(patch) == factor
        ):
            raise ValueError(
                f"data.patch: the U-Net halves it {self.model.depth - 1} times; give multiples of "
                f"{factor}, one of them larger, or a smaller model.depth"
            )
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

    Raises:
        ConfigError: all faults together, each with its key.
    """
    start = {} if baseline is None else read_baseline(baseline)
    return read_config(Config, path, overrides, start=start)
