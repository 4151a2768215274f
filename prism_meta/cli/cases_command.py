"""``prism-meta cases``: what a data set has, and every fault of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prism_meta.cli.options import CASES_HELP, ConfigFile, Overrides
from prism_meta.cli.output import add_result, bars, note, show
from prism_meta.cli.survey_tables import survey_tables
from prism_meta.cli.usage import path
from prism_meta.errors import CaseError, raise_faults
from prism_meta.training.config import load_config
from prism_meta.training.survey.survey import survey

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
) -> None:
    """Show what a data set has, and all its faults, before a training meets them.

    Every voxel is read once. The settings are those that the training will have.
    """
    settings = load_config(config, overrides or [])
    with bars("cases") as advance:
        result = survey(settings, root, fast=fast, on_case=advance)
    show(*survey_tables(result, title=str(root)))
    add_result(**result.as_dict())
    for line in result.notes:
        note(f"note: {line}")
    raise_faults(CaseError, result.faults)
