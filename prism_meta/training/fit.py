"""Training from objects: a model, an objective, a strategy and cases. No configuration is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from prism_meta.bilevel.learner import Buffers, InnerState, MetaLearner
from prism_meta.bilevel.strategies import MetaStrategy, Objective
from prism_meta.bilevel.strategies.inner_loop import ParameterFilter
from prism_meta.data.cache import CachedCase
from prism_meta.data.drawing import DrawnEpisodes
from prism_meta.data.episodes import Episodes
from prism_meta.evaluation.windows import patch_of
from prism_meta.files import writable_folder
from prism_meta.modalities import Batch
from prism_meta.training.folder.weights import save_weights, weights_file
from prism_meta.training.loggers.following import Loggers
from prism_meta.training.outer.alignment import COSINE_EVERY
from prism_meta.training.outer.averaging import AveragedWeights
from prism_meta.training.outer.optimizer import ALPHA, outer_step
from prism_meta.training.trainer import Trainer
from prism_meta.training.validation.validation import Validation

if TYPE_CHECKING:  # it takes two seconds to import
    from lightning_fabric import Fabric

#: Prepared cases, from which episodes are drawn, or episodes (D_train, D_meta).
Source = Sequence[CachedCase] | Dataset[tuple[Any, Batch]] | Sequence[tuple[Any, Batch]]
#: Called every few steps with the step and the newest line of the log.
OnStep = Callable[[int, dict[str, Any]], None]


def fit(
    model: nn.Module,
    objective: Objective,
    strategy: MetaStrategy,
    cases: Source,
    *,
    steps: int | None = None,
    patch: Sequence[int] | None = None,
    batch_size: int = 8,
    optimizer: Optimizer | None = None,
    scheduler: LRScheduler | None = None,
    alpha: float | None = None,
    inner_lr: Tensor | None = None,
    inner_schedule: Callable[[int], float] | None = None,
    inner_state: InnerState = "fresh",
    buffers: Buffers = "outer",
    outer_parameters: ParameterFilter | None = None,
    clip_norm: float | None = 5.0,
    episodes_per_step: int = 1,
    epoch: int | None = None,
    fabric: Fabric | None = None,
    folder: Path | str | None = None,
    checkpoint_every: int = 100,
    resume: bool = False,
    workers: int | None = None,
    validation: Validation | None = None,
    ema: float = 0.0,
    loggers: Loggers | None = None,
    cosine_every: int = COSINE_EVERY,
    seed: int = 0,
    on_step: OnStep | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[dict[str, Any]]:
    """Train ``model`` in two levels, in place.

    The model is in evaluation mode afterwards.

    Args:
        model: a ``PrismNet``, ``wrap(net)``, or any module that ``objective`` can call.
        objective: ``objective(forward, batch)``, e.g. ``PrismObjective()``.
        strategy: how the meta-gradient is computed, e.g. ``FirstOrder(SGD(0.05))``.
        cases: prepared cases, see ``prepare``; or episodes: a dataset or list whose item t is
            (D_train, D_meta). Build ``Episodes`` yourself to choose masks and augmentation. Each inner
            step of ``strategy`` gets a train batch of its own from cases.
        steps: number of outer steps. Defaults to 1000 for cases, and to all episodes of a dataset.
        patch: size in voxels of the patches drawn from cases. Defaults to (96, 96) or (64, 64, 64),
            whichever fits the model's ``spatial_dims``.
        batch_size: size of each of the two batches drawn from cases.
        optimizer: the outer optimizer. Defaults to the one that the strategy prescribes, otherwise to
            AdamW over the model's parameters and all learned hyper-parameters.
        scheduler: schedule of ``optimizer``, one step per outer step. Defaults to a polynomial decay
            for the default optimizer, and to a constant rate for an optimizer of yours.
        alpha: weight of phi~ - phi in E2. Defaults to 0.5, or to 0 if the strategy prescribes its own
            outer step.
        inner_lr: the tensor that is the inner optimizer's rate, if it is to follow a schedule.
        inner_schedule: factor of ``inner_lr`` in each outer step, counted from 0. Defaults to that of the
            outer rate.
        inner_state: see ``MetaLearner``.
        buffers: see ``MetaLearner``.
        outer_parameters: see ``MetaLearner``.
        clip_norm: largest norm of the meta-gradient; None for no limit. There is none for the optimizer that
            a strategy prescribes, because G is then a way and not a gradient.
        episodes_per_step: number of episodes that an outer step averages over.
        epoch: outer steps per epoch, for objectives that change once per epoch. Defaults to one pass
            over the cases.
        fabric: devices and processes, launched. Defaults to one device.
        folder: folder for ``checkpoint.pt``, ``metrics.jsonl`` and ``weights``. Defaults to no files.
        checkpoint_every: number of outer steps between checkpoints.
        resume: resume from the checkpoint in ``folder``; without one, start at the first step.
        workers: number of additional processes that load data. Defaults to one on a CPU with more than
            two cores and to up to four for a GPU, and to none for a short training or a dataset of yours.
        validation: cases to validate on; the log has the scores, and ``folder`` the best weights.
        ema: decay of a moving average of the weights, in [0, 1), e.g. 0.99; 0 keeps none. It is validated
            beside the model, and ``folder`` gets it in the end. The model itself keeps its own weights.
        loggers: get the lines of the log and pictures of validations, in the first process.
        cosine_every: outer steps between measurements of the cosine of the meta-gradient with that of L_meta
            at phi, which the log has as ``cosine``; 0 measures none. Training is the same with and without.
        seed: seed of episodes and dropout.
        on_step: called every few steps with the step and the newest line of the log.
        should_stop: asked after every step, e.g. a ``StopRequest``.

    Returns:
        The log, one dictionary per step: losses, terms, gradient norm and learning rate.

    Raises:
        PrismError: a loss is not finite, no episode can be drawn, or a checkpoint cannot be used.
        TrainingStopped: ``should_stop`` was true; with ``folder`` the state is saved.
        ValueError: an argument is out of range; see ``MetaLearner``.

    Example:
        >>> import torch
        >>> from prism_meta.bilevel.inner import SGD
        >>> from prism_meta.bilevel.strategies import FirstOrder
        >>> from prism_meta.networks.wrapped import wrap
        >>> from prism_meta.objective.prism import PrismObjective
        >>> model = wrap(nn.Conv2d(2, 3, 1), modalities=("t1", "t2"))
        >>> batch = Batch(torch.randn(2, 2, 8, 8), torch.ones(2, 2).bool(), torch.ones(2, 8, 8).long())
        >>> log = fit(model, PrismObjective(), FirstOrder(SGD(0.05)), [(batch, batch)] * 2)
        >>> [line["step"] for line in log]
        [1, 2]
    """
    if fabric is None:
        from lightning_fabric import Fabric

        fabric = Fabric(devices=1)
        fabric.launch()
    episodes = cases
    if _are_cases(cases):
        episodes = Episodes(
            cases,  # type: ignore[arg-type]
            patch=patch_of(model, patch),
            batch_size=batch_size,
            steps=(steps or 1000) * episodes_per_step,
            inner_steps=inner_steps(strategy),
            seed=seed,
            rank=fabric.global_rank,
        )
    available = len(episodes) // episodes_per_step  # type: ignore[arg-type]
    steps = available if steps is None else steps
    if not 1 <= steps <= available:
        raise ValueError(
            f"steps: got {steps}, expected 1 to {available}: {len(episodes)} episodes, "  # type: ignore[arg-type]
            f"{episodes_per_step} per step; give more episodes or fewer steps"
        )
    fabric.to_device(model)
    if isinstance(objective, nn.Module):
        objective.to(fabric.device)
    if optimizer is None:
        outer = outer_step(model, objective, strategy, steps=steps, alpha=_given(alpha))
        optimizer, alpha = outer.optimizer, outer.alpha if alpha is None else alpha
        scheduler = scheduler or outer.scheduler
        clip_norm = None if outer.prescribed else clip_norm
    folder = None if folder is None else writable_folder(folder)
    averaged = AveragedWeights(model, ema) if ema else None
    trainer = Trainer(
        MetaLearner(
            model,
            objective,
            strategy,
            optimizer,
            alpha=_given(alpha),
            inner_state=inner_state,
            buffers=buffers,
            outer_parameters=outer_parameters,
            clip_norm=clip_norm,
            scaler=getattr(fabric.strategy.precision, "scaler", None),  # of float16 only
        ),
        episodes,  # type: ignore[arg-type]
        fabric=fabric,
        scheduler=scheduler,
        folder=folder,
        inner_lr=inner_lr,
        inner_schedule=inner_schedule,
        episodes_per_step=episodes_per_step,
        epoch=epoch or _epoch(episodes, episodes_per_step * fabric.world_size),
        checkpoint_every=checkpoint_every,
        workers=workers if workers is not None or isinstance(episodes, DrawnEpisodes) else 0,
        validation=validation,
        averaged=averaged,
        loggers=loggers,
        cosine_every=cosine_every,
        seed=seed,
    )
    try:
        history = trainer.fit(steps=steps, resume=resume, on_step=on_step, should_stop=should_stop)
    finally:
        model.eval()
    with trainer.processes.together():
        if folder is not None and fabric.is_global_zero:
            if averaged is not None:
                save_weights(weights_file(folder, "ema"), averaged.model)
            save_weights(
                weights_file(folder, "last"), model
            )  # it tells that the training has ended
    return history


def inner_steps(strategy: MetaStrategy) -> int:
    """The number of train batches that ``strategy`` uses: one for each inner step."""
    return int(getattr(strategy, "steps", 1)) if strategy.adapts else 1


def _given(alpha: float | None) -> float:
    return ALPHA if alpha is None else alpha


def _are_cases(cases: Source) -> bool:
    return isinstance(cases, Sequence) and all(isinstance(case, CachedCase) for case in cases)


def _epoch(episodes: object, episodes_per_step: int) -> int | None:
    """Outer steps in which as many cases are drawn as there are."""
    if not isinstance(episodes, DrawnEpisodes):
        return None
    drawn = (episodes.inner_steps + 1) * episodes.batch_size * episodes_per_step
    return math.ceil(len(episodes.cases) / drawn)
