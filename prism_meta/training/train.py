"""``train``: from cases and a configuration to a predictor, in Python or from the command."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn
from torch.utils.data import Dataset

from prism_meta.bilevel.strategies import MetaStrategy, Objective
from prism_meta.data.cache import CachedCase
from prism_meta.data.cases import Case
from prism_meta.errors import ConfigError, PrismError
from prism_meta.evaluation.cleanup import Cleanup
from prism_meta.evaluation.predictor import Predictor
from prism_meta.modalities import Batch
from prism_meta.training.build import build_fabric, build_predictor, build_validation
from prism_meta.training.cleanup.choice import choose_cleanup, keep_cleanup
from prism_meta.training.config import Config
from prism_meta.training.fit import OnStep
from prism_meta.training.folder.places import cache_folder, own_folder
from prism_meta.training.folder.weights import load_weights, weights_file, written_kinds
from prism_meta.training.initial import load_initial
from prism_meta.training.loggers.following import LOGGERS, following
from prism_meta.training.loggers.kinds import check_loggers
from prism_meta.training.parts import Own, build_parts, only
from prism_meta.training.processes.agreement import Processes
from prism_meta.training.progress import progress_bars
from prism_meta.training.run import Run
from prism_meta.training.setup.cases import load_configured, prepare_configured
from prism_meta.training.setup.check import check_configuration
from prism_meta.training.setup.splitting import Split, split

if TYPE_CHECKING:  # it takes two seconds to import
    from lightning_fabric import Fabric

#: Tells what was taken from another run; the commands print it on standard error.
_log = logging.getLogger(__name__)
_T = TypeVar("_T")
#: A folder of cases, cases, prepared cases, or a dataset of episodes (D_train, D_meta).
Cases = Path | str | Sequence[Case] | Sequence[CachedCase] | Dataset[tuple[Batch, Batch]]


@dataclass(frozen=True)
class Trained:
    """The result of ``train``.

    Args:
        predictor: the trained model, ready to predict and evaluate cases. With validation it has the
            weights and the clean-up that were best there, otherwise the averages of ``training.ema``.
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
    extend: int = 0,
    progress: bool = True,
    on_step: OnStep | None = None,
    should_stop: Callable[[], bool] | None = None,
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
        resume: resume the interrupted run in ``out``; the result equals that of an uninterrupted one.
        extend: with ``resume``, train this many outer steps more than the run was started for.
        progress: show progress bars on standard error.
        on_step: called every few steps with the step and the newest line of the log.
        should_stop: asked after every step, e.g. a ``StopRequest``.

    Returns:
        The predictor, the log, the held-out cases and the run folder.

    Raises:
        PrismError: cases or configuration cannot be used, ``out`` holds a run already or another process
            trains in it, or training diverged. Before the first step, nothing is left in ``out`` then.
        TrainingStopped: ``should_stop`` was true; with ``out`` the run can be resumed.
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
    run = _resumed(out, config, extend) if resume else None
    if run is None and out is not None:
        Run.check_new(out)
    config = run.config if run is not None else config or Config()
    own = Own(model, objective, strategy)
    if model is not None:
        build_predictor(config, model)  # refuses a model that does not fit before any work is done
    if isinstance(cases, (Path, str)) or only(cases, (Case, CachedCase)):
        # A dataset of episodes has patches of its own.
        check_configuration(config, model=model)
    if config.training.loggers and out is None:
        raise ConfigError("training.loggers: need a run folder; give out, or leave them out")
    check_loggers(config.training.loggers)
    initial = None
    if config.training.init is not None and not (run is not None and run.checkpoint.exists()):
        initial = Run.open(config.training.init)
        initial.existing_weights()  # before any work is done
        if model is not None and initial.config.data.modalities != config.data.modalities:
            raise ConfigError(
                "training.init: a model of your own starts from a run with the same modalities in the same "
                f"order ({', '.join(initial.config.data.modalities)} there); load its weights yourself"
            )
    fabric = fabric or build_fabric(config.fabric)
    root = Path(cases) if isinstance(cases, (Path, str)) else None
    sets = _split(config, cases)
    training: Any = sets.training
    if run is not None:
        run.check_cases(only(training, Case), sets.validation)
    fabric.launch()
    processes = Processes(fabric)
    with ExitStack() as stack:
        if out is not None:
            with processes.together():
                if fabric.is_global_zero:
                    stack.enter_context(own_folder(Path(out)))
        quiet = not (progress and fabric.is_global_zero)
        advance = stack.enter_context(progress_bars("prepare", "train", quiet=quiet))
        source, watched = training, []
        if only(training, Case):
            prepared = prepare_configured(
                config,
                [*training, *sets.validation],
                cache_folder(config, out, stack),
                meta=[*(sets.meta or training), *sets.validation],
                processes=processes,
                on_case=advance,
                should_stop=should_stop,
            )
            source, watched = prepared[: len(training)], prepared[len(training) :]
        parts = build_parts(config, source, own, fabric=fabric)
        if initial is not None:
            taken = load_initial(parts.model, config, initial)
            if fabric.is_global_zero:
                _log.info("%s", "\n".join(taken.lines()))
        if out is not None:
            with processes.together():
                if fabric.is_global_zero:
                    run = (
                        run.resumed(root)
                        if run
                        else Run.create(
                            out,
                            config,
                            root=root,
                            train=only(training, Case),
                            test=sets.test,
                            validation=sets.validation,
                            own=own.names(),
                            folds=sets.folds,
                        )
                    )
            run = processes.gather(run)[0]

        def report(step: int, line: dict[str, Any]) -> None:
            advance(step, config.training.steps, _note(line), task="train")
            if on_step is not None:
                on_step(step, line)

        loggers = None
        if run is not None and config.training.loggers and fabric.is_global_zero:
            loggers = stack.enter_context(
                following(
                    config.training.loggers,
                    run.folder / LOGGERS,
                    run=run.folder.resolve().name,
                    config=config.model_dump(mode="json"),
                    resume=resume,
                )
            )
        kind = written_kinds(config)[0]
        folder = None if run is None else run.folder
        if folder is None and kind != "last":
            folder = Path(stack.enter_context(TemporaryDirectory()))
        validation = build_validation(config, watched)
        history = parts.fit(
            config,
            fabric=fabric,
            folder=folder,
            resume=resume,
            validation=validation,
            loggers=loggers,
            on_step=report,
            should_stop=should_stop,
        )
        if folder is not None and kind != "last":
            _use_weights(weights_file(folder, kind), parts.model, processes)
        cleanup = Cleanup()
        if validation is not None:
            voxel = math.prod(config.data.spacing)
            chosen = choose_cleanup(validation, parts.model, voxel=voxel, processes=processes)
            place = None if run is None else run.folder
            cleanup = keep_cleanup(chosen, validation, processes, place)
    predictor = build_predictor(config, parts.model, cleanup=cleanup)
    return Trained(predictor, history, tuple(sets.test), run)


def _split(config: Config, cases: Cases) -> Split:
    """How the cases are used. Prepared cases and episodes are all for training."""
    if isinstance(cases, (Path, str)):
        cases = load_configured(config, cases)
    files = only(cases, Case)
    if not files:
        if config.validation.is_on:
            raise ConfigError(
                "validation.cases: draws from cases with files, and got prepared ones or episodes; leave "
                "it out, or call prism_meta.fit with validation=..."
            )
        return Split(cases, [])  # type: ignore[arg-type]
    wrong = [case for case in files if case.modalities != config.data.modalities]
    if wrong:
        raise ConfigError(
            f"cases: case {wrong[0].id} has the modalities {', '.join(wrong[0].modalities)}, but "
            f"data.modalities is {', '.join(config.data.modalities)}; make them equal"
        )
    return split(config, files)


def _resumed(out: Path | str | None, config: Config | None, extend: int) -> Run:
    """The run to resume, which keeps its configuration but for ``extend`` more steps."""
    if out is None:
        raise PrismError("resume: needs out, the folder of the run to resume")
    run = Run.open(out)
    run.check_resumable()
    if config not in (None, run.config):
        raise ConfigError(
            f"config: differs from that of the run in {run.folder}; a resumed run keeps its own, leave "
            "it out"
        )
    return run.extended(extend) if extend else run


def _use_weights(path: Path, model: nn.Module, processes: Processes) -> None:
    """Load the weights that the first process wrote, in all processes."""
    first = processes.fabric.is_global_zero
    with processes.together():
        if first:
            load_weights(path, model)
    if processes.fabric.world_size > 1:
        state = {name: value.cpu() for name, value in model.state_dict().items()} if first else None
        model.load_state_dict(processes.gather(state)[0])  # type: ignore[arg-type]


def _note(line: dict[str, Any]) -> str:
    """What stands beside the progress bar."""
    losses = f"train {line['train_loss']:.3f}  meta {line['meta_loss']:.3f}"
    if "validation" not in line:
        return losses
    best = line["validation"]["best"]
    return f"{losses}  best Dice {best['dice']:.3f} at {best['step']}"
