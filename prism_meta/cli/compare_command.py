"""The command ``compare``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from prism_meta.cli import comparing
from prism_meta.cli.usage import at_least, path
from prism_meta.report.runs_page import write_runs_page
from prism_meta.report.several import side_by_side
from prism_meta.report.tables import comparison_table
from prism_meta.training.facts import command_line

console = Console()

EXAMPLES = (
    "[bold]Examples[/bold]  prism-meta compare runs/first runs/second  ·  "
    "prism-meta compare runs/a runs/b runs/c --out runs.html"
)


def run_compare(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            parser=path,
            metavar="A B [C ...]",
            help="Run folders that were evaluated, or their records.csv. The others are compared with A.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            parser=path,
            metavar="FILE",
            help="Write an HTML page with all runs side by side, per subset and region.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Random seed for the bootstrap.")
    ] = 0,
) -> None:
    """Show paired differences to the first run over the shared cases, with 95 % bootstrap intervals."""
    given = at_least(paths or [], "A", "B")
    found = side_by_side(comparing.load_runs(given), seed=seed)
    for name, change in found.changes.items():
        console.print(comparison_table(change, names=(found.first, name)))
    if any(found.left_out.values()):
        console.print(found.note(), soft_wrap=True, markup=False)
    if out is not None:
        written = write_runs_page(
            out,
            found,
            settings=comparing.differing_settings(given),
            command=shlex.join(command_line()),
        )
        console.print(f"page in {written}", soft_wrap=True)
