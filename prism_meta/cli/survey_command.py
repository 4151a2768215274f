"""``prism-meta cases``: what a data set has, and every fault of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from prism_meta.cli.options import CASES_HELP, ConfigFile, Overrides
from prism_meta.cli.survey_tables import survey_tables
from prism_meta.cli.usage import path, tell
from prism_meta.errors import CaseError, raise_faults
from prism_meta.training.config import load_config
from prism_meta.training.progress import progress_bars
from prism_meta.training.survey import survey

EXAMPLES = (
    "[bold]Examples[/bold]  prism-meta cases cases  ·  prism-meta cases cases --fast  ·  "
    "prism-meta cases cases -c config.toml --json > cases.json"
)


def run_cases(
    root: Annotated[Path, typer.Argument(parser=path, metavar="CASES", help=CASES_HELP)],
    config: ConfigFile = None,
    overrides: Overrides = None,
    fast: Annotated[
        bool,
        typer.Option("--fast", help="Read headers only: no volumes, no intensities, fewer faults."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document instead of tables.")
    ] = False,
) -> None:
    """Show what a data set has, and all its faults, before a training meets them.

    Every voxel is read once. The settings are those that the training will have.
    """
    settings = load_config(config, overrides or [])
    with progress_bars("cases") as advance:
        result = survey(settings, root, fast=fast, on_case=advance)
    if as_json:
        typer.echo(json.dumps(result.as_dict(), indent=2))  # ASCII, whatever the terminal has
    else:
        console = Console()
        for table in survey_tables(result, title=str(root)):
            console.print(table)
    for note in result.notes:
        tell(f"note: {note}")
    raise_faults(CaseError, result.faults)
