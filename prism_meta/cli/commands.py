"""The command line: prism-meta demo, cases, plan, train, adapt, profile, evaluate, predict, export, ..."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from prism_meta.cli import (
    ablate_command,
    adapt_command,
    compare_command,
    demo,
    export_command,
    plan_command,
    profile_command,
    survey_command,
    train_command,
    workflow,
)
from prism_meta.cli.ending import Commands
from prism_meta.cli.evaluating import evaluate_run
from prism_meta.cli.options import CleanUp, Flips, RunFolder, Weights, run_path
from prism_meta.cli.usage import at_least, path, print_any_character, tell
from prism_meta.errors import CaseError, PrismError, raise_faults
from prism_meta.files import writable_folder
from prism_meta.report.tables import findings_table, policies_table, results_table
from prism_meta.training.ensembles import CleanupChoice
from prism_meta.training.facts import command_line
from prism_meta.training.progress import progress_bars
from prism_meta.training.run import Run
from prism_meta.training.stopping import StopRequest
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
    with progress_bars("phantoms") as advance:
        train_root, test_root = size.write(
            out / "phantoms", seed=seed, on_case=lambda done: advance(done, size.phantoms, "")
        )
    train_command.train_and_tell(train_root, size.config(seed), run_folder, stop=StopRequest())
    run = Run.open(run_folder)
    _evaluate(run, root=test_root)
    with progress_bars("predict") as advance:
        written = workflow.predict_folder([run], test_root, out / "predictions", advance)
    console.print(f"{len(written)} label volumes in {out / 'predictions'}", soft_wrap=True)


app.command("cases", epilog=survey_command.EXAMPLES)(survey_command.run_cases)
app.command("plan", epilog=plan_command.EXAMPLES)(plan_command.run_plan)


app.command("train", epilog=train_command.EXAMPLES)(train_command.run_train)
app.command("adapt", epilog=adapt_command.EXAMPLES)(adapt_command.run_adapt)
app.command("profile", epilog=profile_command.EXAMPLES)(profile_command.run_profile)


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
    flips: Flips = False,
    clean_up: CleanUp = "run",
) -> None:
    """Evaluate a run on every subset of modalities and write a table, CSV, JSON and an HTML report.

    If it is interrupted, the same command goes on with the cases that are not yet measured.
    """
    _evaluate(Run.open(run), root=root, out=out, weights=weights, flips=flips, cleanup=clean_up)


@app.command(
    "predict",
    epilog="[bold]Examples[/bold]  prism-meta predict runs/a new_cases labels  ·  "
    "prism-meta predict runs/a new_cases labels --subset flair+t1  ·  "
    "prism-meta predict runs/fold0 runs/fold1 new_cases labels --flips",
)
def run_predict(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            parser=run_path,
            metavar="RUN [RUN ...] CASES OUT",
            help="Run folders that prism-meta train wrote, or hf://owner/name on the Hugging Face hub, whose "
            "probabilities are averaged, e.g. of folds; "
            "a folder of cases with any modalities; and a folder for the label volumes.",
            show_default=False,
        ),
    ] = None,
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
    flips: Flips = False,
    clean_up: CleanUp = "run",
    probabilities: Annotated[
        bool,
        typer.Option(
            "--probabilities",
            help="Write CASE_probabilities.nii.gz, too: a channel for the background and for each class.",
        ),
    ] = False,
    uncertainty: Annotated[
        bool,
        typer.Option(
            "--uncertainty",
            help="Write CASE_uncertainty.nii.gz, too, the entropy of the probabilities in [0, 1]; and for "
            "several RUNs CASE_disagreement.nii.gz, their mutual information, in twice the time.",
        ),
    ] = False,
) -> None:
    """Write one label volume per case, on the grid of its files, and a table of the volumes of regions.

    Cases that were predicted before, from the same files with the same weights, are skipped.
    """
    *folders, root, out = at_least(paths or [], "RUN", "CASES", "OUT")
    names = [name.strip() for name in subset.replace("+", ",").split(",") if name.strip()]
    with progress_bars("predict") as advance:
        written = workflow.predict_folder(
            [Run.open(folder) for folder in folders],
            root,
            out,
            advance,
            subset=names,
            grid=grid,
            weights=weights,
            flips=flips,
            cleanup=clean_up,
            probabilities=probabilities,
            uncertainty=uncertainty,
            tell=tell,
        )
    console.print(f"{len(written)} label volumes in {out}", soft_wrap=True)


app.command("export", epilog=export_command.EXAMPLES)(export_command.run_export)
app.command("ablate", epilog=ablate_command.EXAMPLES)(ablate_command.run_ablate)
app.command("compare", epilog=compare_command.COMPARE_EXAMPLES)(compare_command.run_compare)
app.command("report", epilog=compare_command.REPORT_EXAMPLES)(compare_command.run_report)


def main() -> None:
    """Entry point of the ``prism-meta`` script."""
    print_any_character()
    # Deprecation warnings inside MONAI would only break up the progress bars.
    warnings.filterwarnings("ignore", module=r"monai\..*")
    app()


def _evaluate(
    run: Run,
    *,
    root: Path | None = None,
    out: Path | None = None,
    weights: Kind | None = None,
    flips: bool = False,
    cleanup: CleanupChoice = "run",
) -> None:
    with progress_bars("evaluate") as advance:
        result = evaluate_run(
            run,
            advance,
            root=root,
            out=out,
            weights=weights,
            flips=flips,
            cleanup=cleanup,
            command=command_line(),
            tell=tell,
        )
    tables = [(f"{run.folder}: every subset of modalities", result.summary)]
    if result.cleaned is not None:
        tables.append((f"{run.folder}: after the clean-up ({result.cleanup})", result.cleaned))
    for title, summary in tables:
        console.print(
            results_table(
                summary,
                title=title,
                policy=result.policy,
                modalities=run.config.data.modalities,
                faults=result.faults,
            )
        )
    console.print(findings_table(result.summary))
    if result.empty:
        console.print(policies_table(result.by_policy, empty=result.empty))
    console.print(f"report in {result.report}", soft_wrap=True)
    raise_faults(CaseError, result.faults)  # the cases that were left out
