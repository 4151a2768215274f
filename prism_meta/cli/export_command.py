"""The command ``prism-meta export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prism_meta.cli.options import RunFolder, Weights
from prism_meta.cli.output import add_result, show
from prism_meta.cli.usage import path
from prism_meta.export.formats import FORMATS, export_run
from prism_meta.export.hub import NO_LICENCE
from prism_meta.training.run import Run

EXAMPLES = (
    "[bold]Examples[/bold]  prism-meta export runs/a --out exported  ·  "
    "prism-meta export runs/a --out exported --format onnx --format program  ·  "
    "prism-meta export runs/a --out upload --format hub --license cc-by-4.0  ·  "
    "python exported/predict.py new_cases/p1 p1_labels.nii.gz"
)


def run_export(
    run: RunFolder,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", parser=path, metavar="FOLDER", help="Folder to create."),
    ],
    formats: Annotated[
        list[str],
        typer.Option(
            "--format",
            "-f",
            metavar="|".join(FORMATS),
            help="Repeatable. " + "; ".join(f"{n}: {f.title}" for n, f in FORMATS.items()) + ".",
        ),
    ] = ["onnx"],  # noqa: B006, typer copies it
    weights: Weights = None,
    licence: Annotated[
        str,
        typer.Option(
            "--license",
            metavar="NAME",
            help="Licence of the weights on the card of format hub, as the hub calls it, e.g. cc-by-4.0.",
        ),
    ] = NO_LICENCE,
) -> None:
    """Write a run as files for other software: ONNX, torch.export, or a folder for a model hub.

    Beside each model lie its preprocessing and its labels as JSON.
    """
    export_run(Run.open(run), out, formats=formats, weights=weights, licence=licence)
    show(f"exported to {out}")
    add_result(out=out, formats=formats)
