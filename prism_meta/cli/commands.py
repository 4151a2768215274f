"""The command line: prism-meta demo | cases | plan | train | evaluate | predict | compare."""

from __future__ import annotations

import signal
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from prism_meta.cli import demo, plan_command, survey_command, workflow
from prism_meta.cli.ending import Commands
from prism_meta.cli.options import CASES_HELP, ConfigFile, Overrides, RunFolder, Weights
from prism_meta.cli.usage import path, print_any_character, tell
from prism_meta.errors import CaseError, PrismError, raise_faults
from prism_meta.files import writable_folder
from prism_meta.report import compare
from prism_meta.report.tables import comparison_table, results_table
from prism_meta.training.build import build_fabric
from prism_meta.training.config import Config, load_config
from prism_meta.training.config.baselines import BASELINES
from prism_meta.training.facts import command_line
from prism_meta.training.progress import progress_bars
from prism_meta.training.run import Run
from prism_meta.training.stopping import StopRequest, TrainingStopped, duration
from prism_meta.training.train import train
from prism_meta.training.weights import Kind

console = Console()

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Train one segmentation network for every subset of modalities, and evaluate it on each.",
)


@app.command(
    "demo",
    epilog="[bold]Examples[/bold]  prism-meta demo  ·  prism-meta demo --out results/demo --quick",
)
def run_demo(
    out: Annotated[
        Path,
        typer.Option(
            parser=path, help="Folder for the phantoms, the run, the report and the labels."
        ),
    ] = Path("demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Use tiny phantoms and finish in under a minute.")
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Random seed of phantoms and training.")
    ] = 0,
) -> None:
    """Draw phantoms with missing modalities, train on them, evaluate, and predict labels."""
    size = demo.QUICK if quick else demo.FULL
    run_folder = out / "run"
    if (run_folder / "run.json").exists():
        raise PrismError(f"{out}: holds a demo already; give another --out, or remove it")
    writable_folder(out)
    total = size.train + size.test
    with progress_bars("phantoms") as advance:
        train_root, test_root = size.write(
            out / "phantoms", seed=seed, on_case=lambda done: advance(done, total, "")
        )
    _train(train_root, size.config(seed), run_folder, stop=StopRequest())
    run = Run.open(run_folder)
    _evaluate(run, root=test_root)
    with progress_bars("predict") as advance:
        written = workflow.predict_folder(run, test_root, out / "predictions", advance)
    console.print(f"{len(written)} label volumes in {out / 'predictions'}", soft_wrap=True)


app.command("cases", epilog=survey_command.EXAMPLES)(survey_command.run_cases)
app.command("plan", epilog=plan_command.EXAMPLES)(plan_command.run_plan)


@app.command(
    "train",
    epilog="[bold]Examples[/bold]  prism-meta train cases --out runs/a  ·  "
    "prism-meta train cases -c config.toml -s meta.strategy=second_order -s data.holdout=4 --out runs/b  ·  "
    "prism-meta train cases --baseline zero_fill --out runs/c  ·  prism-meta train --resume runs/a  ·  "
    "prism-meta train --resume runs/a --extend 500 --time-limit 11h30m",
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
) -> None:
    """Train on a folder of cases and write a run folder.

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
        settings = load_config(config, overrides or [], baseline=baseline)
        out = out or Path("runs/prism")
        if not (config or baseline or plan_command.sets_sizes(overrides or [])):
            Run.check_new(out)  # before anything that takes time
            settings = plan_command.planned_by_train(settings, root)
        _train(root, settings, out, stop=stop)
        return
    if config or baseline or overrides or out:
        raise PrismError(
            "train --resume: uses the run's own folder and config; leave --out, --config, --baseline and "
            "--set out"
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
    _train(root, run.config, resume, stop=stop, resume=True, extend=extend)


@app.command(
    "evaluate",
    epilog="[bold]Examples[/bold]  prism-meta evaluate runs/a  ·  "
    "prism-meta evaluate runs/a other_hospital --out eval",
)
def run_evaluate(
    run: RunFolder,
    root: Annotated[
        Path | None,
        typer.Argument(
            parser=path,
            metavar="[CASES]",
            help="Folder of cases. Defaults to the held-out cases of the run.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            parser=path,
            help="Folder for the report. Defaults to RUN/evaluation.",
        ),
    ] = None,
    weights: Weights = None,
) -> None:
    """Evaluate a run on every subset of modalities and write a table, CSV, JSON and an HTML report."""
    _evaluate(Run.open(run), root=root, out=out, weights=weights)


@app.command(
    "predict",
    epilog="[bold]Examples[/bold]  prism-meta predict runs/a new_cases labels  ·  "
    "prism-meta predict runs/a new_cases labels --subset flair+t1",
)
def run_predict(
    run: RunFolder,
    root: Annotated[
        Path,
        typer.Argument(parser=path, metavar="CASES", help="Folder of cases with any modalities."),
    ],
    out: Annotated[
        Path, typer.Argument(parser=path, metavar="OUT", help="Folder for the label volumes.")
    ],
    subset: Annotated[
        str,
        typer.Option(
            help="Use only these modalities, separated by + or commas. Defaults to all of a case."
        ),
    ] = "",
    grid: Annotated[
        str | None,
        typer.Option(
            metavar="MODALITY",
            help="Write labels on the grid of this modality's file, if the files of a case have several.",
        ),
    ] = None,
    weights: Weights = None,
) -> None:
    """Write one label volume per case, on the grid of its files, and a table of the volumes of regions."""
    names = [name.strip() for name in subset.replace("+", ",").split(",") if name.strip()]
    with progress_bars("predict") as advance:
        written = workflow.predict_folder(
            Run.open(run), root, out, advance, subset=names, grid=grid, weights=weights
        )
    console.print(f"{len(written)} label volumes in {out}", soft_wrap=True)


@app.command("compare", epilog="[bold]Examples[/bold]  prism-meta compare runs/first runs/second")
def run_compare(
    first: Annotated[
        Path,
        typer.Argument(
            parser=path, metavar="A", help="Run folder that was evaluated, or its records.csv."
        ),
    ],
    second: Annotated[
        Path, typer.Argument(parser=path, metavar="B", help="Another one, on the same cases.")
    ],
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Random seed for the bootstrap.")
    ] = 0,
) -> None:
    """Show paired differences B - A over cases with a 95 % bootstrap interval."""
    comparison = compare(workflow.load_records(first), workflow.load_records(second), seed=seed)
    console.print(comparison_table(comparison, names=(str(first), str(second))))


def main() -> None:
    """Entry point of the ``prism-meta`` script."""
    print_any_character()
    # Deprecation warnings inside MONAI would only break up the progress bars.
    warnings.filterwarnings("ignore", module=r"monai\..*")
    app()


def _train(
    root: Path,
    config: Config,
    out: Path,
    *,
    stop: StopRequest,
    resume: bool = False,
    extend: int = 0,
) -> None:
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
        console.print(f"run in {out}", soft_wrap=True)


def _evaluate(
    run: Run, *, root: Path | None = None, out: Path | None = None, weights: Kind | None = None
) -> None:
    with progress_bars("evaluate") as advance:
        result = workflow.evaluate_run(
            run, advance, root=root, out=out, weights=weights, command=command_line()
        )
    console.print(
        results_table(
            result.summary,
            title=f"{run.folder}: every subset of modalities",
            policy=result.policy,
            modalities=run.config.data.modalities,
            faults=result.faults,
        )
    )
    console.print(f"report in {result.report}", soft_wrap=True)
    raise_faults(CaseError, result.faults)  # the cases that were left out
