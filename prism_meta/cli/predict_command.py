"""The command ``prism-meta predict``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from prism_meta.cli.completing import complete_run
from prism_meta.cli.options import CleanUp, Flips, Weights, run_path
from prism_meta.cli.output import add_result, bars, note, show
from prism_meta.cli.usage import at_least
from prism_meta.cli.workflow import predict_folder
from prism_meta.evaluation.predictions import TABLE
from prism_meta.training.run import Run

EXAMPLES = (
    "[bold]Examples[/bold]  prism-meta predict runs/a new_cases labels  ·  "
    "prism-meta predict runs/a new_cases labels --subset flair+t1  ·  "
    "prism-meta predict runs/fold0 runs/fold1 new_cases labels --flips"
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
            autocompletion=complete_run,
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
    """Write one label volume per case, on the grid of its files, and a table of region volumes.

    Cases that were predicted before, from the same files with the same weights, are skipped.
    """
    *folders, root, out = at_least(paths or [], "RUN", "CASES", "OUT")
    names = [name.strip() for name in subset.replace("+", ",").split(",") if name.strip()]
    with bars("predict") as advance:
        written = predict_folder(
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
            tell=note,
        )
    show_labels(written, out)


def show_labels(written: Sequence[Path], out: Path) -> None:
    """Say where the label volumes are."""
    show(f"{len(written)} label volumes in {out}")
    add_result(labels=written, table=out / TABLE)
