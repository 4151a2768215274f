"""From a configuration to objects, one function per object.

Selector strings such as ``"dynamic"`` end here: everything beyond takes objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from prism_meta.bilevel.inner import SGD, AdamW, InnerOptimizer
from prism_meta.bilevel.strategies import MetaStrategy, Objective
from prism_meta.bilevel.strategies.inner_loop import ParameterFilter
from prism_meta.data.augmentation import Augmentation
from prism_meta.data.cache import CachedCase
from prism_meta.data.drawing import DrawnEpisodes
from prism_meta.data.episodes import Episodes
from prism_meta.data.following_masks import GroupDROMask, HardMask
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
from prism_meta.data.subset_masks import OneSubsetMask
from prism_meta.data.tasks import TaskEpisodes
from prism_meta.empty_masks import EMPTY_POLICIES, EmptyPolicy
from prism_meta.errors import ConfigError, PrismError
from prism_meta.evaluation.cleanup import Cleanup
from prism_meta.evaluation.predictor import Predictor
from prism_meta.objective import losses
from prism_meta.objective.meta_losses import MetaLoss, Ranking, SoftWorst
from prism_meta.objective.prism import PrismObjective
from prism_meta.objective.weighting import (
    LearnedSubsetWeights,
    LearnedWeights,
    RelativePreference,
    Weighting,
)
from prism_meta.training.config import Config
from prism_meta.training.config.data import DataConfig
from prism_meta.training.config.keys import ARGUMENT_KEYS
from prism_meta.training.config.meta import MetaConfig
from prism_meta.training.config.schema import (
    EvaluationConfig,
    MaskConfig,
    ObjectiveConfig,
)
from prism_meta.training.devices import build_fabric as build_fabric
from prism_meta.training.networks import build_model as build_model
from prism_meta.training.outer.optimizer import Outer, outer_step
from prism_meta.training.validation.validation import Validation


@contextmanager
def configuration_keys() -> Iterator[None]:
    """Errors of the library that leave the context also name the configuration keys to change."""
    try:
        yield
    except PrismError as error:
        raise error.with_keys(ARGUMENT_KEYS) from error


def build_label_set(data: DataConfig) -> LabelSet:
    """The classes and regions of the label files."""
    regions = data.regions
    if not regions and data.labels == dict(BRATS_LABELS.values):
        regions = dict(BRATS_LABELS.regions)  # type: ignore[arg-type]
    return LabelSet(data.labels, regions)


def build_preprocessing(data: DataConfig) -> Preprocessing:
    """The preprocessing of all cases."""
    return Preprocessing(data.spacing)


def build_masks(
    masks: MaskConfig, rates: Sequence[float], meta_rates: Sequence[float] | None = None
) -> tuple[MaskPolicy, MaskPolicy]:
    """The mask policies of the train and the meta batch.

    Args:
        masks: names of the policies.
        rates: missing rates of the training cases, one per modality.
        meta_rates: those in meta batches. Defaults to ``rates``.
    """
    # One for both batches, which sees the losses once.
    hard = HardMask(len(rates), power=masks.power)
    dro = GroupDROMask(len(rates), step=masks.step)
    policies: Mapping[str, Callable[[Sequence[float]], MaskPolicy]] = {
        "dynamic": lambda _: DynamicMask(),
        "static": lambda _: StaticMask(),
        "full": lambda _: FullMask(),
        "single": lambda _: SingleModalityMask(),
        "balanced": BalancedMask,
        "hard": lambda _: hard,
        "dro": lambda _: dro,
        "one_subset": lambda _: OneSubsetMask(),
    }
    return policies[masks.train](rates), policies[masks.meta](meta_rates or rates)


def build_objective(
    objective: ObjectiveConfig, rates: Sequence[float], *, sample_losses: bool = False
) -> PrismObjective:
    """The objective (E10).

    Args:
        objective: weights and options.
        rates: missing rates of the training cases, one per modality.
        sample_losses: see ``PrismObjective``.
    """
    prototypes = {"l2": losses.prototype_l2, "similarity": losses.prototype_similarity}
    weightings: Mapping[str, Callable[[], Weighting | None]] = {
        "fixed": lambda: None,
        "preference": lambda: RelativePreference(rates, gamma=objective.preference_rate),
        "learned": lambda: LearnedWeights(len(rates), beta=objective.beta, delta=objective.delta),
    }
    meta_losses: Mapping[str, Callable[[], MetaLoss | None]] = {
        "same": lambda: None,
        "soft_worst": lambda: SoftWorst(objective.meta_temperature),
        "ranking": lambda: Ranking(objective.ranking_weight),
    }
    return PrismObjective(
        beta=objective.beta,
        delta=objective.delta,
        temperature=objective.temperature,
        direction=objective.direction,
        scale_decay=objective.scale_decay,
        prototype=prototypes[objective.prototype],
        weighted=objective.weighted,
        unimodal=objective.unimodal,
        weighting=weightings[objective.weighting](),
        subset_weights=(
            LearnedSubsetWeights(len(rates)) if objective.subset_weights == "learned" else None
        ),
        meta_loss=meta_losses[objective.meta_loss](),
        sample_losses=sample_losses,
    )


def build_inner(meta: MetaConfig, inner_lr: Tensor, *, weight_decay: float) -> InnerOptimizer:
    """The inner optimizer.

    Args:
        meta: its name and options.
        inner_lr: its rate, a tensor that the trainer may change.
        weight_decay: used by AdamW only.
    """
    optimizers: Mapping[str, Callable[[], InnerOptimizer]] = {
        "sgd": lambda: SGD(inner_lr, momentum=meta.inner_momentum),
        "adamw": lambda: AdamW(inner_lr, weight_decay=weight_decay),
    }
    return optimizers[meta.inner]()


def build_strategy(meta: MetaConfig, inner_lr: Tensor, *, weight_decay: float) -> MetaStrategy:
    """The strategy that ``meta.strategy`` names in the registry; see ``build_inner``."""
    kind = meta.kind
    if not kind.adapts:
        return kind()
    inner = build_inner(meta, inner_lr, weight_decay=weight_decay)
    options = {name: getattr(meta, name) for name in kind.options}
    patterns = meta.outer_parameters
    if patterns is not None:
        options["adapt"] = lambda name: not _fits(name, patterns)
    # The constructor of a class that adapts takes an inner optimizer and the number of inner steps.
    return kind(inner, meta.inner_steps, **options)  # type: ignore[call-arg]


def build_owner(meta: MetaConfig, model: nn.Module) -> ParameterFilter | None:
    """Which parameters the outer level owns, if ``meta.outer_parameters`` divides them.

    Raises:
        ConfigError: its patterns fit none of the model's parameters, or all of them.
    """
    patterns = meta.outer_parameters
    if patterns is None:
        return None
    names = [name for name, _ in model.named_parameters()]
    found = [name for name in names if _fits(name, patterns)]
    if not found or len(found) == len(names):
        raise ConfigError(
            f"meta.outer_parameters: {', '.join(patterns)} fits {len(found)} of {len(names)} parameters of "
            f"the network ({', '.join(names[:3])}, ...), expected some and not all; correct the patterns"
        )
    return lambda name: _fits(name, patterns)


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def build_outer(
    config: Config, model: nn.Module, objective: Objective, strategy: MetaStrategy, *, steps: int
) -> Outer:
    """The outer optimizer, its schedule and alpha. The model must be on its device already."""
    return outer_step(
        model,
        objective,
        strategy,
        steps=steps,
        alpha=config.meta.alpha,
        lr=config.training.lr,
        weight_decay=config.training.weight_decay,
        hyper_lr=config.objective.weights_lr,
        schedule=config.training.schedule,
        warmup=config.training.warmup,
    )


def build_episodes(
    config: Config, cases: Sequence[CachedCase], *, inner_steps: int | None = None, rank: int = 0
) -> DrawnEpisodes:
    """The episodes of a training run.

    Args:
        config: kind of episodes, patch, masks, batch size and number of steps.
        cases: prepared training cases.
        inner_steps: number of train batches per episode. Defaults to that of the configured strategy.
        rank: of this process; each process draws its own episodes.

    Raises:
        ConfigError: no episode can be drawn.
    """
    if inner_steps is None:
        inner_steps = config.meta.inner_steps if config.meta.kind.adapts else 1
    patch = config.data.patch
    augmentation = Augmentation(len(patch)) if config.training.augment else None
    common: dict[str, Any] = {
        "patch": patch,
        "batch_size": config.data.batch_size,
        "steps": config.training.steps * config.meta.episodes,
        "inner_steps": inner_steps,
        "foreground": config.data.foreground,
        "augmentation": augmentation,
        "seed": config.seed,
        "rank": rank,
    }
    train_mask, meta_mask = build_masks(
        config.masks, missing_rates(cases), missing_rates(cases, meta=True)
    )
    kinds: Mapping[str, Callable[[], DrawnEpisodes]] = {
        "meta_drop": lambda: Episodes(cases, train_mask=train_mask, meta_mask=meta_mask, **common),
        "task": lambda: TaskEpisodes(cases, support=config.episodes.support, **common),
    }
    with configuration_keys():
        return kinds[config.episodes.kind]()


def build_empty_policy(evaluation: EvaluationConfig) -> EmptyPolicy:
    """What an empty mask gives."""
    return {policy.name: policy for policy in EMPTY_POLICIES}[evaluation.empty]


def build_validation(config: Config, cases: Sequence[CachedCase]) -> Validation | None:
    """The validation on prepared cases; None without cases."""
    if not cases:
        return None
    return Validation(
        cases,
        modalities=config.data.modalities,
        labels=build_label_set(config.data),
        patch=config.data.patch,
        overlap=config.evaluation.overlap,
        every=config.validation.every,
        select=config.validation.select,
        patience=config.validation.patience,
    )


def build_predictor(
    config: Config, model: nn.Module, *, cleanup: Cleanup | None = None
) -> Predictor:
    """A predictor that prepares cases as training does, and cleans its labels up with ``cleanup``."""
    return Predictor(
        model,
        modalities=config.data.modalities,
        preprocessing=build_preprocessing(config.data),
        labels=build_label_set(config.data),
        patch=config.data.patch,
        overlap=config.evaluation.overlap,
        empty=build_empty_policy(config.evaluation),
        cleanup=cleanup,
    )


def missing_rates(cases: Sequence[CachedCase], *, meta: bool = False) -> list[float]:
    """The missing rate of each modality, in train or in meta batches; one that no case has counts as 0.99."""
    availability = torch.stack(
        [case.meta_availability if meta else case.availability for case in cases]
    )
    rates: list[float] = (1 - availability.double().mean(0)).clamp(max=0.99).tolist()
    return rates
