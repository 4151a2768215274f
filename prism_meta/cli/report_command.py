"""The command ``prism-meta report``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from prism_meta.cli import comparing
from prism_meta.cli.options import Runs, Seed
from prism_meta.cli.output import add_result, show
from prism_meta.cli.usage import at_least, path
from prism_meta.report.runs_page import write_runs_page
from prism_meta.report.several import side_by_side
from prism_meta.training.folder.facts import command_line

EXAMPLES = (
    "[bold]Examples[/bold]  prism-meta report runs/first runs/second  ·  "
    "prism-meta report runs/fold* --out folds.html"
)


def run_report(
    runs: Runs = None,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", parser=path, metavar="FILE", help="HTML page to write."),
    ] = Path("runs.html"),
    seed: Seed = 0,
) -> None:
    """Write an HTML page with evaluated runs side by side, per subset and region.

    The report of a single run is written by prism-meta evaluate.
    """
    given = at_least(runs or [], "A", "B")
    found = side_by_side(comparing.load_runs(given), seed=seed)
    written = write_runs_page(
        out,
        found,
        settings=comparing.differing_settings(given),
        command=shlex.join(command_line()),
    )
    show(f"page in {written}")
    add_result(page=written)
