"""The command ``prism-meta train``."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tomlkit
import typer

from prism_meta.cli import plan_command
from prism_meta.cli.folds import (
    existing_fold,
    fold_folder,
    fold_overrides,
    is_range,
    parse_folds,
    train_folds,
    with_sizes_of,
)
from prism_meta.cli.options import CASES_HELP, ConfigFile, Overrides, run_path
from prism_meta.cli.output import add_result, is_quiet, show, wants_json
from prism_meta.cli.usage import path, tell
from prism_meta.errors import PrismError
from prism_meta.training.build import build_fabric
from prism_meta.training.config import Config, load_config
from prism_meta.training.config.baselines import BASELINES
from prism_meta.training.initial import settings_of
from prism_meta.training.run import Run
from prism_meta.training.stopping import StopRequest, TrainingStopped, duration
from prism_meta.training.train import train

EXAMPLES = (
    "[bold]Examples[/bold]  prism-meta train cases --out runs/a  ·  "
    "prism-meta train cases -c config.toml -s meta.strategy=second_order -s data.holdout=4 --out runs/b  ·  "
    "prism-meta train cases --baseline zero_fill --out runs/c  ·  prism-meta train cases --fold 0..4 --out "
    "runs/folds  ·  prism-meta train cases --init runs/a --out "
    "runs/d  ·  prism-meta train --resume runs/a  ·  "
    "prism-meta train --resume runs/a --extend 500 --time-limit 11h30m"
)


def run_train(
    root: Annotated[
        Path | None,
        typer.Argument(
            parser=path,
            metavar="CASES",
            help=CASES_HELP,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", parser=path, help="Run folder to create. Defaults to runs/prism."
        ),
    ] = None,
    config: ConfigFile = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            "-b",
            metavar="NAME",
            help=f"Start from a baseline method: {', '.join(BASELINES)}. Settings apply in order: "
            "baseline, --config, --set.",
        ),
    ] = None,
    overrides: Overrides = None,
    init: Annotated[
        Path | None,
        typer.Option(
            parser=run_path,
            metavar="RUN",
            help="Start from the weights of this run, or of hf://owner/name. Modalities are matched by name. "
            "Without --config, --baseline and sizes, the network, the patch and the voxels are those of that "
            "run.",
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            metavar="RUN",
            help="Resume the interrupted run in this folder. Give CASES only if they were moved.",
        ),
    ] = None,
    extend: Annotated[
        int,
        typer.Option(
            metavar="STEPS", min=0, help="With --resume: train this many steps more than planned."
        ),
    ] = 0,
    time_limit: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Save and end with code 143 after this time, e.g. 11h30m, so that --resume can go on.",
        ),
    ] = None,
    fold: Annotated[
        str | None,
        typer.Option(
            metavar="K|A..B",
            help="Hold out fold K of a cross-validation. A range such as 0..4 trains each in OUT/foldK, one "
            "after the other; folds that are trained already are skipped, and an interrupted one goes on.",
        ),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Number of folds. Defaults to data.folds, otherwise to 5.",
        ),
    ] = None,
) -> None:
    """Train on a folder of cases and write a run folder.

    Train with one level: no second level was better at equal time in the studies of this project. Use
    meta.strategy=first_order to reproduce Meta-Drop, and second_order where a gradient has to pass through
    the inner steps, e.g. for learned rates.

    Ctrl-C or SIGTERM ends the training after the present step and saves it; a second one ends it at once.
    """
    stop = StopRequest(None if time_limit is None else duration(time_limit))
    if resume is None:
        if root is None:
            raise PrismError(
                "train: got no cases; give a folder of cases, or --resume with a run folder"
            )
        if extend:
            raise PrismError(
                "train --extend: works on a run; give --resume RUN, or set training.steps"
            )
        if folds is not None and fold is None:
            raise PrismError("train --folds: needs the fold to hold out; give --fold, e.g. 0..4")
        own_sizes = bool(config or baseline or plan_command.sets_sizes(overrides or []))
        given = list(overrides or [])
        if init is not None:
            given.append(f"training.init={tomlkit.string(str(init)).as_string()}")
            given = given if own_sizes else [*settings_of(Run.open(init)), *given]

        def load(more: Sequence[str]) -> Config:
            return load_config(config, [*given, *more], baseline=baseline)

        planned = not own_sizes and init is None
        _start(
            root,
            out or Path("runs/prism"),
            load,
            fold=fold,
            folds=folds,
            planned=planned,
            stop=stop,
        )
        return
    if config or baseline or overrides or out or init or fold or folds:
        raise PrismError(
            "train --resume: uses the run's own folder and config; leave --out, --config, --baseline, --set, "
            "--init, --fold and --folds out"
        )
    run = Run.open(resume)
    if (run.facts["data"] is None and root is None) or run.facts["own"]:
        raise PrismError(
            f"{resume}: was trained in Python with cases or objects of its own; resume it there with "
            "prism_meta.train(..., out=..., resume=True)"
        )
    if root is None:
        root = Path(str(run.facts["data"]))
        if not root.exists():
            raise PrismError(
                f"{resume}: its cases are no longer in {root}; give the folder that they moved to: "
                f"prism-meta train --resume {resume} CASES"
            )
    train_and_tell(root, run.config, resume, stop=stop, resume=True, extend=extend)
    add_runs([resume])


def _start(
    root: Path,
    out: Path,
    load: Callable[[Sequence[str]], Config],
    *,
    fold: str | None,
    folds: int | None,
    planned: bool,
    stop: StopRequest,
) -> None:
    """Train a new run, or a range of folds.

    Args:
        root: folder of cases.
        out: run folder, or the folder of several.
        load: makes the configuration with further overrides.
        fold: what ``--fold`` says.
        folds: number of folds.
        planned: whether the sizes are planned from the data.
        stop: when to stop.
    """
    numbers = [] if fold is None else parse_folds(fold)
    if fold is None or not is_range(fold):
        settings = load([o for n in numbers for o in fold_overrides(load, n, folds)])
        if planned:
            Run.check_new(out)  # before anything that takes time
            settings = plan_command.planned_by_train(settings, root)
        train_and_tell(root, settings, out, stop=stop)
        add_runs([out])
        return
    each = {n: load(fold_overrides(load, n, folds)) for n in numbers}
    if planned:
        begun = existing_fold(out, numbers)
        made = begun.config if begun else plan_command.planned_by_train(each[numbers[0]], root)
        each = {n: with_sizes_of(settings, made) for n, settings in each.items()}

    def train_one(settings: Config, folder: Path, resumed: bool) -> None:
        train_and_tell(root, settings, folder, stop=stop, resume=resumed)

    train_folds(each, out, train_one)
    add_runs([fold_folder(out, number) for number in numbers])


def train_and_tell(
    root: Path,
    config: Config,
    out: Path,
    *,
    stop: StopRequest,
    resume: bool = False,
    extend: int = 0,
) -> None:
    """Train, and say where the run is, or how a stopped one goes on."""
    fabric = build_fabric(config.fabric)
    try:
        with stop.listening():
            train(
                root,
                None if resume else config,
                out=out,
                fabric=fabric,
                resume=resume,
                extend=extend,
                progress=not is_quiet(),
                should_stop=stop,
            )
    except TrainingStopped as stopped:
        if fabric.is_global_zero:
            again = f"--resume {out}" if (out / "run.json").exists() else f"{root} --out {out}"
            tell(
                f"stopped by {stop.reason or 'another process'} after step {stopped.step} of "
                f"{stopped.total}, all is saved; go on with: prism-meta train {again}"
            )
        number = stop.signal or signal.SIGTERM
        raise SystemExit(128 + number) from stopped
    if fabric.is_global_zero:
        show(f"run in {out}")


def _run_facts(folder: Path) -> dict[str, Any]:
    """What is reported of a run folder whose training has ended."""
    run = Run.open(folder)
    last = (run.history() or [{}])[-1]  # the file may be deleted to do without the curves
    return {
        "run": folder,
        "strategy": run.config.meta.strategy,
        "steps": last.get("step"),
        "train_loss": last.get("train_loss"),
        "meta_loss": last.get("meta_loss"),
        "weights": {kind: run.weights(kind) for kind in run.kinds},
        "training_cases": len(run.facts["train"]),
        "held_out": run.facts["test"],
    }


def add_runs(folders: Sequence[Path]) -> None:
    """Report run folders as JSON; their logs are not read for anything else."""
    if wants_json():
        add_result(runs=[_run_facts(folder) for folder in folders])
