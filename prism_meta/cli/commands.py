"""The command line: prism-meta demo | train | evaluate | predict | compare."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from lightning_fabric import Fabric
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from typer.core import TyperGroup

from prism_meta.cli import demo as demos
from prism_meta.cli import workflow
from prism_meta.errors import PrismError
from prism_meta.files import writable_folder
from prism_meta.report import compare as compare_records
from prism_meta.report.tables import comparison_table, results_table
from prism_meta.training.config import load_config
from prism_meta.training.config.baselines import BASELINES
from prism_meta.training.config.keys import ARGUMENT_KEYS
from prism_meta.training.run import Run, command_line

console = Console()


class _Commands(TyperGroup):
    """Every command ends a ``PrismError`` the same way: a line per fault, exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PrismError as error:
            for fault in error.with_keys(ARGUMENT_KEYS).faults:
                typer.echo(f"error: {fault}", err=True)
            raise SystemExit(2) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Train one segmentation network for every subset of modalities, and measure it on each.",
)

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder that train wrote.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", metavar="KEY=VALUE", help="Override a key of the config; repeatable."
    ),
]


@app.command(
    epilog="[bold]Examples[/bold]  prism-meta demo  ·  prism-meta demo --out /tmp/demo --quick"
)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for phantoms, run, report and labels.")] = Path(
        "demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="The same path in under a minute, to test it.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of phantoms and training.")] = 0,
) -> None:
    """The whole path on phantoms: NIfTI files with missing modalities, training, report, labels."""
    size = demos.QUICK if quick else demos.FULL
    run_folder = out / "run"
    if (run_folder / "run.json").exists():
        raise PrismError(f"{out}: holds a demo already; give another --out, or remove it")
    writable_folder(out)
    total = size.train + size.test
    with _bar("phantoms") as advance:
        train_root, test_root = size.write(
            out / "phantoms", seed=seed, on_case=lambda done: advance(done, total, "")
        )
    run, fabric = workflow.start_run(size.config(seed), train_root, run_folder)
    _train(run, fabric)
    _evaluate(run, root=test_root)
    with _bar("predict") as advance:
        written = workflow.predict_folder(run, test_root, out / "predictions", advance)
    console.print(f"{len(written)} label volumes in {out / 'predictions'}", soft_wrap=True)


@app.command(
    epilog="[bold]Examples[/bold]  prism-meta train cases --out runs/a  ·  "
    "prism-meta train cases -c config.toml -s meta.strategy=second_order -s data.holdout=4 --out runs/b  ·  "
    "prism-meta train cases --baseline zero_fill --out runs/c  ·  prism-meta train --resume runs/a"
)
def train(
    root: Annotated[
        Path | None,
        typer.Argument(metavar="CASES", help="Folder with one folder of NIfTI files per case."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder to make.")] = Path(
        "runs/prism"
    ),
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="TOML file; defaults without it.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            "-b",
            metavar="NAME",
            help=f"Start from a known method, one of {', '.join(BASELINES)}; "
            "--config and --set come after it.",
        ),
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Continue this run; give no CASES then.")
    ] = None,
) -> None:
    """Train on a folder of cases and write a run folder."""
    if (root is None) == (resume is None):
        raise PrismError(
            "train: give a folder of cases, or --resume with a run folder, and not both"
        )
    if resume is not None:
        if config or baseline or overrides:
            raise PrismError(
                "train --resume: goes on with the run's own config; leave --config, --baseline and "
                "--set out"
            )
        run = Run.open(resume)
        fabric = workflow.launch(run.config)
    else:
        settings = load_config(config, overrides or [], baseline=baseline)
        run, fabric = workflow.start_run(settings, Path(str(root)), out)
    _train(run, fabric, resume=resume is not None)


@app.command(
    epilog="[bold]Examples[/bold]  prism-meta evaluate runs/a  ·  "
    "prism-meta evaluate runs/a other_hospital --out eval"
)
def evaluate(
    run: RunFolder,
    root: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CASES]", help="Folder of cases; those that the run held out without it."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the report.")] = None,
) -> None:
    """Measure a run on every subset of modalities: table, CSV, JSON and an HTML report."""
    _evaluate(Run.open(run), root=root, out=out)


@app.command(
    epilog="[bold]Examples[/bold]  prism-meta predict runs/a new_cases labels  ·  "
    "prism-meta predict runs/a new_cases labels --subset flair,t1"
)
def predict(
    run: RunFolder,
    root: Annotated[
        Path, typer.Argument(metavar="CASES", help="Folder of cases with any modalities.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the label volumes.")],
    subset: Annotated[
        str, typer.Option(help="Use only these modalities, separated by commas or +.")
    ] = "",
) -> None:
    """Write a label volume per case, on the case's own grid and affine."""
    names = [name.strip() for name in subset.replace("+", ",").split(",") if name.strip()]
    with _bar("predict") as advance:
        written = workflow.predict_folder(Run.open(run), root, out, advance, subset=names)
    console.print(f"{len(written)} label volumes in {out}", soft_wrap=True)


@app.command(epilog="[bold]Examples[/bold]  prism-meta compare runs/first runs/second")
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Evaluated run, or its records.csv.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another, on the same cases.")],
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
) -> None:
    """Paired differences B - A over cases, with a 95 % bootstrap interval."""
    comparison = compare_records(
        workflow.load_records(first), workflow.load_records(second), seed=seed
    )
    console.print(comparison_table(comparison, names=(_name(first), _name(second))))


def main() -> None:
    """Entry point of the ``prism-meta`` script."""
    # Deprecations inside MONAI are not for the reader of a progress bar.
    warnings.filterwarnings("ignore", module=r"monai\..*")
    app()


def _train(run: Run, fabric: Fabric, *, resume: bool = False) -> None:
    with _bar("prepare", "train", quiet=not fabric.is_global_zero) as advance:
        workflow.train_run(
            run,
            workflow.Progresses(
                prepare=lambda *a: advance(*a, task="prepare"),
                train=lambda *a: advance(*a, task="train"),
            ),
            fabric=fabric,
            resume=resume,
        )
    if fabric.is_global_zero:
        console.print(f"run in {run.folder}", soft_wrap=True)


def _evaluate(run: Run, *, root: Path | None = None, out: Path | None = None) -> None:
    with _bar("evaluate") as advance:
        result = workflow.evaluate_run(run, advance, root=root, out=out, command=command_line())
    policy = run.config.evaluation.policy()
    console.print(
        results_table(
            result.summary,
            title=f"{run.folder}: every subset of modalities",
            policy=policy.statement,
            modalities=run.config.data.modalities,
        )
    )
    console.print(f"report in {result.report}", soft_wrap=True)


def _name(path: Path) -> str:
    return str(path)


@contextmanager
def _bar(*names: str, quiet: bool = False) -> Iterator[Any]:
    """Progress bars on standard error; ``advance(done, total, text, task=name)`` moves one."""
    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True, quiet=quiet)) as progress:
        tasks = {name: progress.add_task(name, total=None, start=False, note="") for name in names}

        def advance(done: int, total: int, note: str, task: str = names[0]) -> None:
            bar = tasks[task]
            if not progress.tasks[bar].started:
                progress.start_task(bar)
            progress.update(bar, completed=done, total=total, note=note)

        yield advance
