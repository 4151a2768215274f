"""The command ``prism-meta compare``."""

from __future__ import annotations

from prism_meta.cli import comparing
from prism_meta.cli.options import Runs, Seed
from prism_meta.cli.output import add_result, show
from prism_meta.cli.usage import at_least
from prism_meta.report.several import side_by_side
from prism_meta.report.tables import comparison_table

EXAMPLES = (
    "[bold]Examples[/bold]  prism-meta compare runs/first runs/second  ·  "
    "prism-meta compare runs/a runs/b runs/c"
)


def run_compare(runs: Runs = None, seed: Seed = 0) -> None:
    """Show paired differences to the first run over shared cases, with 95 % bootstrap intervals."""
    found = side_by_side(comparing.load_runs(at_least(runs or [], "A", "B")), seed=seed)
    for name, change in found.changes.items():
        show(comparison_table(change, names=(found.first, name)))
    if any(found.left_out.values()):
        show(found.note())
    add_result(
        reference=found.first,
        cases=found.cases,
        left_out=found.left_out,
        averages={name: summary.to_dict() for name, summary in found.summaries.items()},
        changes={name: change.to_dict() for name, change in found.changes.items()},
    )
