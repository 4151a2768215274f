"""The command ``prism-meta evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prism_meta.cli.evaluating import evaluate_run
from prism_meta.cli.options import CleanUp, Flips, RunFolder, Weights
from prism_meta.cli.output import add_result, bars, note, show
from prism_meta.cli.usage import path
from prism_meta.errors import CaseError, raise_faults
from prism_meta.report.tables import findings_table, policies_table, results_table
from prism_meta.training.folder.facts import command_line
from prism_meta.training.folder.weights import Kind
from prism_meta.training.prediction.ensembles import CleanupChoice
from prism_meta.training.run import Run

EXAMPLES = (
    "[bold]Examples[/bold]  prism-meta evaluate runs/a  ·  "
    "prism-meta evaluate runs/a other_hospital --out eval"
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
    """Evaluate a run on every subset of modalities: a table, CSV, JSON and an HTML report.

    If it is interrupted, the same command goes on with the cases that are not yet measured.
    """
    evaluate_and_show(
        Run.open(run), root=root, out=out, weights=weights, flips=flips, cleanup=clean_up
    )


def evaluate_and_show(
    run: Run,
    *,
    root: Path | None = None,
    out: Path | None = None,
    weights: Kind | None = None,
    flips: bool = False,
    cleanup: CleanupChoice = "run",
) -> None:
    """Evaluate a run, and show its numbers; the arguments are those of ``evaluate_run``."""
    with bars("evaluate") as advance:
        result = evaluate_run(
            run,
            advance,
            root=root,
            out=out,
            weights=weights,
            flips=flips,
            cleanup=cleanup,
            command=command_line(),
            tell=note,
        )
    tables = [(f"{run.folder}: every subset of modalities", result.summary)]
    if result.cleaned is not None:
        tables.append((f"{run.folder}: after the clean-up ({result.cleanup})", result.cleaned))
    for title, summary in tables:
        show(
            results_table(
                summary,
                title=title,
                policy=result.policy,
                modalities=run.config.data.modalities,
                faults=result.faults,
            )
        )
    show(findings_table(result.summary))
    if result.empty:
        show(policies_table(result.by_policy, empty=result.empty))
    show(f"report in {result.report}")
    add_result(
        run=run.folder,
        report=result.report,
        empty_masks=result.policy,
        summary=result.summary.to_dict(),
        clean_up=result.cleanup,
        summary_after_clean_up=None if result.cleaned is None else result.cleaned.to_dict(),
        faults=result.faults,
    )
    raise_faults(CaseError, result.faults)  # the cases that were left out
