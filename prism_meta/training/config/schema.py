"""The configuration: what a TOML file may say, and the objects that it stands for.

Selector strings live here and nowhere else: ``build`` turns those of a section into objects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tomlkit
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from prism_meta.bilevel import strategies
from prism_meta.bilevel.inner import SGD, AdamW, InnerOptimizer
from prism_meta.data.labels import BRATS_LABELS, LabelSet
from prism_meta.data.masking import (
    BalancedMask,
    DynamicMask,
    FullMask,
    MaskPolicy,
    SingleModalityMask,
    StaticMask,
)
from prism_meta.data.preprocessing import Preprocessing
from prism_meta.errors import PrismError
from prism_meta.evaluation.metrics import BratsEmpty, DiagonalEmpty, EmptyPolicy, NanEmpty
from prism_meta.modalities import BRATS
from prism_meta.networks.fusion import AttentionFusion, Fusion, MeanFusion, RegionAwareFusion
from prism_meta.networks.prism import PrismNet
from prism_meta.networks.wrapped import wrap
from prism_meta.objective import losses
from prism_meta.objective.prism import PrismObjective
from prism_meta.objective.weighting import (
    BETA,
    DELTA,
    LearnedWeights,
    RelativePreference,
    Weighting,
)
from prism_meta.training.config.baselines import read_baseline
from prism_meta.training.config.file import read_config

Rate = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Mask = Literal["dynamic", "static", "full", "single", "balanced"]

#: Strategies that look at the meta loss and do not differentiate it.
_WITHOUT_META_GRADIENT = ("single_level", "reptile")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(_Section):
    """Cases, their labels, and the patches drawn from them."""

    modalities: tuple[str, ...] = BRATS
    label: str = "seg"
    labels: dict[str, int] = dict(BRATS_LABELS.values)
    #: Region -> classes. Unless given: WT, TC and ET for the BraTS labels, else one per class.
    regions: dict[str, tuple[str, ...]] = {}
    #: Of the model's grid, mm.
    spacing: tuple[Positive, Positive, Positive] = (2.0, 2.0, 2.0)
    #: Voxels; two numbers train on axial slices, three on volumes.
    patch: Annotated[tuple[Count, ...], Field(min_length=2, max_length=3)] = (96, 96)
    batch_size: Count = 8
    #: Share of patches centred on a foreground class.
    foreground: Share = 0.5
    #: CSV of which modalities to use, see ``cases.read_availability``.
    availability: Path | None = None
    #: Instead of a table: make modalities missing in the training cases at these rates.
    missing_rates: tuple[Rate, ...] | None = None
    #: Cases kept for ``evaluate``: by name, or so many drawn with the seed.
    test_cases: tuple[str, ...] = ()
    holdout: Annotated[int, Field(ge=0)] = 0
    #: Folder of prepared volumes; beside the run folder unless given.
    cache: Path | None = None
    #: Processes that load data beside the training one.
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
        return self

    def label_set(self) -> LabelSet:
        """What the label files hold."""
        regions = self.regions
        if not regions and self.labels == dict(BRATS_LABELS.values):
            regions = dict(BRATS_LABELS.regions)  # type: ignore[arg-type]
        return LabelSet(self.labels, regions)

    def preprocessing(self) -> Preprocessing:
        """How cases come to the model's grid."""
        return Preprocessing(self.spacing)


class MaskConfig(_Section):
    """What the model is shown of each batch of an episode."""

    train: Mask = "dynamic"
    meta: Mask = "dynamic"

    def build(self, rates: Sequence[float]) -> tuple[MaskPolicy, MaskPolicy]:
        """The policies of the train and the meta batch, for cases with these missing rates."""
        policies: Mapping[str, Callable[[], MaskPolicy]] = {
            "dynamic": DynamicMask,
            "static": StaticMask,
            "full": FullMask,
            "single": SingleModalityMask,
            "balanced": lambda: BalancedMask(rates),
        }
        return policies[self.train](), policies[self.meta]()


class ModelConfig(_Section):
    """The network and its size."""

    #: PRISM's own, or a U-Net (MONAI's, with residual units and InstanceNorm) behind ``wrap``.
    network: Literal["prism", "unet"] = "prism"
    #: Of PRISM's network alone: where the weights of the shown modalities come from.
    fusion: Literal["region_aware", "mean", "attention"] = "region_aware"
    #: Channels at full resolution; they double at each of the ``depth`` scales.
    width: Count = 8
    depth: Annotated[int, Field(ge=2)] = 4

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.network != "prism" and self.fusion != "region_aware":
            raise ValueError(
                f"fusion: {self.fusion} needs network = prism, for a U-Net has no fusion; leave it out"
            )
        return self

    def build(self, modalities: Sequence[str], *, num_classes: int, spatial_dims: int) -> nn.Module:
        """The network, for images of these modalities in 2 or 3 dimensions."""
        sizes = len(modalities), num_classes, spatial_dims
        fusions: Mapping[str, type[Fusion]] = {
            "region_aware": RegionAwareFusion,
            "mean": MeanFusion,
            "attention": AttentionFusion,
        }
        fusion = fusions[self.fusion]
        networks: Mapping[str, Callable[[], nn.Module]] = {
            "prism": lambda: PrismNet(*sizes, self.width, depth=self.depth, fusion=fusion),
            "unet": lambda: wrap(self._unet(*sizes), modalities),
        }
        return networks[self.network]()

    def _unet(self, ins: int, outs: int, spatial_dims: int) -> nn.Module:
        from monai.networks.nets.unet import UNet

        channels = [self.width * 2**scale for scale in range(self.depth)]
        strides = [2] * (self.depth - 1)
        net: nn.Module = UNet(
            spatial_dims, ins, outs, channels, strides, num_res_units=2, norm="instance"
        )
        # torch's CPU conv3d takes a slow path for small batches in the default layout.
        return net.to(memory_format=torch.channels_last_3d) if spatial_dims == 3 else net


class ObjectiveConfig(_Section):
    """Weights and options of E10."""

    beta: NotNegative | tuple[NotNegative, ...] = BETA
    delta: NotNegative | tuple[NotNegative, ...] = DELTA
    #: Fixed weights; times E and omega by relative preference (E11); or learned from these on (E12).
    weighting: Literal["fixed", "preference", "learned"] = "fixed"
    #: Gamma of E11, per epoch.
    preference_rate: NotNegative = 0.01
    #: Outer rate of learned weights, at first; it decays as training.lr does.
    weights_lr: Positive = 1e-2
    temperature: Positive = 4.0
    direction: losses.Direction = "student_teacher"
    #: Prm scale s counts 2^-s in E8, as in the published code.
    scale_decay: bool = False
    prototype: Literal["l2", "similarity"] = "l2"
    #: Class weights in the cross-entropy (E5). They are off here: a patch without foreground has the
    #: weight 0 for its only class, and axial slices without tumour are most of a brain.
    weighted: bool = False
    #: False leaves L_fuse + L_prm: no unimodal branch, no distillation.
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
                "beta, delta: learned weights start at numbers > 0, for softplus is never 0"
            )
        return self

    def build(self, rates: Sequence[float]) -> PrismObjective:
        """The objective, for training cases with these missing rates, one per modality."""
        prototypes = {"l2": losses.prototype_l2, "similarity": losses.prototype_similarity}
        weightings: Mapping[str, Callable[[], Weighting | None]] = {
            "fixed": lambda: None,
            "preference": lambda: RelativePreference(rates, gamma=self.preference_rate),
            "learned": lambda: LearnedWeights(len(rates), beta=self.beta, delta=self.delta),
        }
        return PrismObjective(
            beta=self.beta,
            delta=self.delta,
            temperature=self.temperature,
            direction=self.direction,
            scale_decay=self.scale_decay,
            prototype=prototypes[self.prototype],
            weighted=self.weighted,
            unimodal=self.unimodal,
            weighting=weightings[self.weighting](),
        )


class MetaConfig(_Section):
    """The two levels: strategy, inner steps, and the pull of E2."""

    strategy: Literal[
        "single_level", "first_order", "second_order", "reptile", "finite_difference", "implicit"
    ] = "first_order"
    inner: Literal["sgd", "adamw"] = "sgd"
    inner_lr: NotNegative = 0.05
    inner_momentum: Share = 0.0
    #: The inner rate decays with the outer one.
    inner_decay: bool = True
    inner_steps: Count = 1
    #: Of the inner optimizer between outer steps: fresh, carried, or shared with the outer AdamW.
    inner_state: Literal["fresh", "carried", "shared"] = "fresh"
    #: Weight of phi~ - phi in E2. Reptile has its own epsilon, from 0.1 to 1 over training.
    alpha: Share = 0.5
    #: Episodes that an outer step averages over.
    episodes: Count = 1
    #: Lambda and conjugate-gradient steps of ``implicit``.
    proximal: Positive = 1.0
    cg_steps: Count = 5

    @model_validator(mode="after")
    def _consistent(self) -> MetaConfig:
        if self.inner_state == "shared" and self.inner != "adamw":
            raise ValueError(
                "inner_state: shared needs inner = adamw, the optimizer of the outer step"
            )
        if self.inner_state == "shared" and self.strategy in ("single_level", "reptile"):
            raise ValueError(
                f"inner_state: shared does not go with {self.strategy}; use fresh or carried"
            )
        return self

    def build(self, inner_lr: Tensor, *, weight_decay: float) -> strategies.MetaStrategy:
        """The strategy, with an inner rate that the trainer may change; decay is AdamW's alone."""
        inner: InnerOptimizer
        if self.inner == "adamw":
            inner = AdamW(inner_lr, weight_decay=weight_decay)
        else:
            inner = SGD(inner_lr, momentum=self.inner_momentum)
        choices: Mapping[str, Callable[[], strategies.MetaStrategy]] = {
            "single_level": strategies.SingleLevel,
            "first_order": lambda: strategies.FirstOrder(inner, self.inner_steps),
            "second_order": lambda: strategies.SecondOrder(inner, self.inner_steps),
            "reptile": lambda: strategies.Reptile(inner, self.inner_steps),
            "finite_difference": lambda: strategies.FiniteDifference(inner, self.inner_steps),
            "implicit": lambda: strategies.ImplicitMAML(
                inner, self.inner_steps, proximal=self.proximal, cg_steps=self.cg_steps
            ),
        }
        return choices[self.strategy]()


class TrainingConfig(_Section):
    """The outer optimizer (AdamW with a polynomial decay to 0) and the length of training."""

    steps: Count = 1000
    lr: Positive = 1e-2
    weight_decay: NotNegative = 1e-4
    #: The meta-gradient is scaled down to this norm.
    clip_norm: Positive = 5.0
    augment: bool = True
    checkpoint_every: Count = 100


class FabricConfig(_Section):
    """Where training runs: passed to Lightning Fabric."""

    accelerator: str = "auto"
    devices: int | str = 1
    nodes: Count = 1
    precision: Literal["32-true", "bf16-mixed"] = "32-true"


class EvaluationConfig(_Section):
    """Sliding windows and what an empty mask gives."""

    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    empty: Literal["brats", "nan", "diagonal"] = "brats"

    def policy(self) -> EmptyPolicy:
        """The policy for empty masks."""
        policies: Mapping[str, Callable[[], EmptyPolicy]] = {
            "brats": BratsEmpty,
            "nan": NanEmpty,
            "diagonal": DiagonalEmpty,
        }
        return policies[self.empty]()


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
        if self.objective.weighting == "learned" and self.meta.strategy in _WITHOUT_META_GRADIENT:
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
        try:
            self.data.label_set()
        except PrismError as error:
            raise ValueError("; ".join(error.faults)) from error
        return self

    def build_model(self) -> nn.Module:
        """The network."""
        return self.model.build(
            self.data.modalities,
            num_classes=len(self.data.labels) + 1,
            spatial_dims=len(self.data.patch),
        )

    def to_toml(self) -> str:
        """The resolved configuration; ``load_config`` reads it back."""
        return tomlkit.dumps(self.model_dump(mode="json", exclude_none=True))


def load_config(
    path: Path | str | None = None, overrides: Sequence[str] = (), *, baseline: str | None = None
) -> Config:
    """Read a TOML file and apply ``section.key=value`` overrides to it.

    Args:
        path: TOML file; None for the defaults.
        overrides: values are TOML (``[64, 64]``, ``true``, ``0.1``); a bare word is a string.
        baseline: one of ``BASELINES`` to start from instead of the defaults; the file's keys and the
            overrides come after it.

    Raises:
        ConfigError: all faults together, each with its key.
    """
    start = {} if baseline is None else read_baseline(baseline)
    return read_config(Config, path, overrides, start=start)
