"""``train``: from cases and a configuration to a predictor, in Python or from the command."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.utils.data import Dataset

from prism_meta.bilevel.strategies import MetaStrategy, Objective
from prism_meta.data.cache import CachedCase
from prism_meta.data.cases import Case
from prism_meta.data.episodes import Episodes
from prism_meta.errors import ConfigError, PrismError
from prism_meta.evaluation.predictor import Predictor
from prism_meta.modalities import Batch
from prism_meta.training.build import (
    build_episodes,
    build_fabric,
    build_model,
    build_objective,
    build_outer,
    build_predictor,
    build_strategy,
    missing_rates,
)
from prism_meta.training.cases import load_configured, prepare_configured, split
from prism_meta.training.config import Config
from prism_meta.training.fit import OnStep, fit
from prism_meta.training.progress import progress_bars
from prism_meta.training.run import Run

if TYPE_CHECKING:  # it takes two seconds to import
    from lightning_fabric import Fabric

_T = TypeVar("_T")
#: A folder of cases, cases, prepared cases, or a dataset of episodes (D_train, D_meta).
Cases = Path | str | Sequence[Case] | Sequence[CachedCase] | Dataset[tuple[Batch, Batch]]


@dataclass(frozen=True)
class Trained:
    """The result of ``train``.

    Args:
        predictor: the trained model, ready to predict and evaluate cases.
        history: the log of this training, one dictionary per step.
        test: the cases that were held out; empty if the configuration holds none out.
        run: the run folder; None without ``out``.
    """

    predictor: Predictor
    history: list[dict[str, Any]]
    test: tuple[Case, ...] = ()
    run: Run | None = None

    @property
    def model(self) -> nn.Module:
        """The trained model, in evaluation mode."""
        return self.predictor.model


def train(
    cases: Cases,
    config: Config | None = None,
    *,
    out: Path | str | None = None,
    model: nn.Module | None = None,
    objective: Objective | None = None,
    strategy: MetaStrategy | None = None,
    fabric: Fabric | None = None,
    resume: bool = False,
    progress: bool = True,
    on_step: OnStep | None = None,
) -> Trained:
    """Train on a folder of cases, as the command ``prism-meta train`` does.

    A model, an objective or a strategy of your own replaces what the configuration would build. Their
    sections of the configuration are not used then.

    Args:
        cases: folder with one folder of NIfTI files per case; a list of cases (``load_cases``) or of
            prepared cases; or a dataset whose item t is (D_train, D_meta). Held-out cases and missing
            rates of the configuration apply to the first two.
        config: see ``load_config``. Defaults to ``Config()``.
        out: run folder to write. Defaults to a temporary folder that is deleted after training.
        model: a ``PrismNet`` or ``wrap(net)``; it is trained in place.
        objective: ``objective(forward, batch)``.
        strategy: e.g. ``SecondOrder(SGD(0.05))``. Its inner rate stays constant.
        fabric: devices and processes, not launched yet. Defaults to the configuration's.
        resume: resume the interrupted run in ``out``.
        progress: show progress bars on standard error.
        on_step: called every few steps with the step and the newest line of the log.

    Returns:
        The predictor, the log, the held-out cases and the run folder.

    Raises:
        PrismError: cases or configuration cannot be used, ``out`` holds a run already, or training
            diverged.
        TypeError: ``model`` is a bare net; use ``wrap(net)``.
        ValueError: ``config.data.patch`` has another number of axes than ``model``.

    Example:
        >>> import tempfile
        >>> import prism_meta as pm
        >>> from monai.networks.nets import UNet
        >>> from prism_meta.data.phantom import write_phantoms
        >>> folder = tempfile.mkdtemp()
        >>> _ = write_phantoms(folder, pm.subsets(4)[[14, 13, 5]], shape=(40, 48, 36), spacing=4.0)
        >>> net = UNet(spatial_dims=2, in_channels=4, out_channels=4, channels=(4, 8), strides=(2,))
        >>> config = pm.load_config(overrides=[
        ...     "data.spacing=[4, 4, 4]", "data.patch=[32, 32]", "data.batch_size=2",
        ...     "data.holdout=1", "training.steps=2", "training.augment=false",
        ... ])
        >>> trained = pm.train(folder, config, model=pm.wrap(net), progress=False)
        >>> [line["step"] for line in trained.history]
        [1, 2]
        >>> trained.predictor.predict(trained.test[0]).shape
        (40, 48, 36)
    """
    run = _resumed(out, config) if resume else None
    config = run.config if run is not None else config or Config()
    own = _Own(model, objective, strategy)
    if model is not None:
        build_predictor(config, model)  # refuses a model that does not fit before any work is done
    training, test = _split(config, cases)
    if out is not None and run is None:
        Run.new_folder(out)
    fabric = fabric or build_fabric(config.fabric)
    fabric.launch()
    if out is not None:
        root = Path(cases) if isinstance(cases, (Path, str)) else None
        run = run or _started(out, config, root, training, test, own=own, fabric=fabric)
        run.check_cases(_only(training, Case))
    quiet = not (progress and fabric.is_global_zero)
    with progress_bars("prepare", "train", quiet=quiet) as advance, ExitStack() as stack:
        source: Any = training
        if _only(training, Case):
            cache = config.data.cache or (run and run.folder.parent / ".prism-meta-cache")
            cache = cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            source = prepare_configured(config, source, cache, fabric=fabric, on_case=advance)

        def report(step: int, line: dict[str, Any]) -> None:
            losses = f"train {line['train_loss']:.3f}  meta {line['meta_loss']:.3f}"
            advance(step, config.training.steps, losses, task="train")
            if on_step is not None:
                on_step(step, line)

        folder = None if run is None else run.folder
        model, history = _fit(
            config, source, own, fabric=fabric, folder=folder, resume=resume, on_step=report
        )
    if run is not None and fabric.is_global_zero:
        run.save_weights(model)
    return Trained(build_predictor(config, model), history, tuple(test), run)


@dataclass(frozen=True)
class _Own:
    """The objects that a caller passed instead of configuring them."""

    model: nn.Module | None
    objective: Objective | None
    strategy: MetaStrategy | None

    def names(self) -> dict[str, str]:
        """What was passed, by the names of the classes, for ``run.json``."""
        return {
            name: type(value).__name__ for name, value in vars(self).items() if value is not None
        }


def _fit(
    config: Config,
    source: Any,
    own: _Own,
    *,
    fabric: Fabric,
    folder: Path | None,
    resume: bool,
    on_step: OnStep,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Build what the caller did not pass, and train."""
    meta = config.meta
    prepared = _only(source, CachedCase)
    rates = _rates(source, config, own)
    episodes = build_episodes(config, prepared, rank=fabric.global_rank) if prepared else source
    torch.manual_seed(config.seed)  # gives every process the same initial weights
    model = own.model or build_model(config)
    fabric.to_device(model)
    objective = own.objective or build_objective(config.objective, rates)
    if isinstance(objective, nn.Module):
        objective.to(fabric.device)
    inner_lr = torch.tensor(meta.inner_lr)
    strategy = own.strategy or build_strategy(
        meta, inner_lr, weight_decay=config.training.weight_decay
    )
    steps = len(episodes) // meta.episodes
    outer = build_outer(config, model, objective, strategy, steps=steps)
    decays = meta.inner_decay and own.strategy is None and not outer.prescribed
    history = fit(
        model,
        objective,
        strategy,
        episodes,
        optimizer=outer.optimizer,
        scheduler=outer.scheduler,
        alpha=outer.alpha,
        inner_lr=inner_lr if decays else None,
        inner_state=meta.inner_state,
        clip_norm=config.training.clip_norm,
        episodes_per_step=meta.episodes,
        fabric=fabric,
        folder=folder,
        checkpoint_every=config.training.checkpoint_every,
        resume=resume,
        workers=config.data.workers,
        seed=config.seed,
        on_step=on_step,
    )
    return model, history


def _split(config: Config, cases: Cases) -> tuple[Any, list[Case]]:
    """What to train on, and the cases that are held out."""
    if isinstance(cases, (Path, str)):
        cases = load_configured(config, cases)
    files = _only(cases, Case)
    if not files:
        return cases, []
    wrong = [case for case in files if case.modalities != config.data.modalities]
    if wrong:
        raise ConfigError(
            f"cases: case {wrong[0].id} has the modalities {', '.join(wrong[0].modalities)}, but "
            f"data.modalities is {', '.join(config.data.modalities)}; make them equal"
        )
    return split(config, files)


def _only(cases: Any, kind: type[_T]) -> list[_T]:
    """The cases as a list if all of them are of this kind, otherwise an empty list."""
    if isinstance(cases, Sequence) and all(isinstance(case, kind) for case in cases):
        return list(cases)
    return []


def _rates(source: Any, config: Config, own: _Own) -> Sequence[float]:
    """The missing rates of the training cases, as far as they are known."""
    cases = source.cases if isinstance(source, Episodes) else _only(source, CachedCase)
    if cases:
        return missing_rates(cases)
    if own.objective is None and config.objective.weighting == "preference":
        raise ConfigError(
            "objective.weighting: preference depends on the cases and their epochs, which a dataset of "
            "episodes does not tell; give cases, or call prism_meta.fit with epoch=..."
        )
    return config.data.missing_rates or [0.0] * len(config.data.modalities)


def _resumed(out: Path | str | None, config: Config | None) -> Run:
    """The run to resume, which keeps its configuration."""
    if out is None:
        raise PrismError("resume: needs out, the folder of the run to resume")
    run = Run.open(out)
    if config not in (None, run.config):
        raise ConfigError(
            f"config: differs from that of the run in {run.folder}; a resumed run keeps its own, leave "
            "it out"
        )
    return run


def _started(
    out: Path | str,
    config: Config,
    root: Path | None,
    training: Any,
    test: Sequence[Case],
    *,
    own: _Own,
    fabric: Fabric,
) -> Run:
    """A new run, whose folder the first process makes."""
    with fabric.rank_zero_first():
        if not fabric.is_global_zero:
            return Run.open(out)
        train = _only(training, Case)
        return Run.create(out, config, root=root, train=train, test=test, own=own.names())
