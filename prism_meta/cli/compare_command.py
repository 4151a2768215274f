"""The commands ``compare`` and ``report``, which look at several runs."""

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

COMPARE_EXAMPLES = (
    "[bold]Examples[/bold]  prism-meta compare runs/first runs/second  ·  "
    "prism-meta compare runs/a runs/b runs/c"
)
REPORT_EXAMPLES = (
    "[bold]Examples[/bold]  prism-meta report runs/first runs/second  ·  "
    "prism-meta report runs/fold* --out folds.html"
)

Runs = Annotated[
    list[Path] | None,
    typer.Argument(
        parser=path,
        metavar="A B [C ...]",
        help="Run folders that were evaluated, or their records.csv. The others are compared with A.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Random seed for the bootstrap.")]


def run_compare(runs: Runs = None, seed: Seed = 0) -> None:
    """Show paired differences to the first run over the shared cases, with 95 % bootstrap intervals."""
    found = side_by_side(comparing.load_runs(at_least(runs or [], "A", "B")), seed=seed)
    for name, change in found.changes.items():
        console.print(comparison_table(change, names=(found.first, name)))
    if any(found.left_out.values()):
        console.print(found.note(), soft_wrap=True, markup=False)


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
    console.print(f"page in {written}", soft_wrap=True)
