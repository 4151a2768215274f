"""The command ``prism-meta adapt``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prism_meta.cli.adapting import adaptation_table
from prism_meta.cli.options import RunFolder, Weights
from prism_meta.cli.output import add_result, is_quiet, note, show
from prism_meta.cli.usage import path
from prism_meta.errors import one_line
from prism_meta.training.adaptation.adapt import adapt
from prism_meta.training.run import Run

EXAMPLES = (
    "[bold]Examples[/bold]  prism-meta adapt runs/a site_cases --subset flair+t1 --out runs/a_site  ·  "
    "prism-meta adapt runs/a site_cases --steps 20 --lr 0.001 --out runs/a_site  ·  "
    "prism-meta predict runs/a_site new_cases labels --subset flair+t1"
)


def run_adapt(
    run: RunFolder,
    root: Annotated[
        Path,
        typer.Argument(
            parser=path,
            metavar="CASES",
            help="Folder of labelled cases of the site, or a manifest; 1 to 10 cases are usual.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", parser=path, help="Run folder to create.", metavar="RUN2")
    ],
    subset: Annotated[
        str | None,
        typer.Option(
            help="Modalities to adapt to, separated by + or commas. Defaults to all that every case has."
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", help="Number of steps. Defaults to the best on held-out cases."),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            metavar="RATE",
            help="Rate of Adam. Defaults to the best on held-out cases. With --steps and --lr no case is "
            "held out, and the weights are adapted in any case.",
        ),
    ] = None,
    weights: Weights = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=2**32 - 1,
            help="Random seed of patches and dropout. Defaults to that of the run.",
        ),
    ] = None,
) -> None:
    """Fine-tune a run to a site and a subset of modalities, from a few labelled cases.

    Each case is held out in turn to choose the rate and the number of steps. If adapting is not better than
    not adapting by more than the standard error, the weights are kept as they are. The new run folder works
    with all other commands. Ctrl-C leaves nothing behind; the same command starts again.
    """
    opened = Run.open(run)
    adapted = adapt(
        opened,
        root,
        subset=subset,
        out=out,
        steps=steps,
        lr=lr,
        weights=weights,
        seed=seed,
        progress=not is_quiet(),
    )
    known = {**opened.facts["train"], **opened.facts.get("validation", {})}
    seen = sorted(set(adapted.facts.cases) & set(known))
    if seen:
        note(
            f"{len(seen)} of the cases have names of cases that {run} was trained on "
            f"({one_line(', '.join(seen[:5]))}); if they are the same, the Dice before is too good"
        )
    if adapted.facts.held_out:
        show(adaptation_table(adapted.facts, title=f"{run}: {adapted.facts.subset}"))
    show(adapted.facts.sentence(), f"run in {out}")
    add_result(run=out, adaptation=adapted.facts.model_dump(mode="json"))
