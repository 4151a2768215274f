"""The command ``prism-meta demo``: everything from phantoms to labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prism_meta.cli import demo
from prism_meta.cli.evaluate_command import evaluate_and_show
from prism_meta.cli.output import bars
from prism_meta.cli.predict_command import show_labels
from prism_meta.cli.train_command import add_runs, train_and_tell
from prism_meta.cli.usage import path
from prism_meta.cli.workflow import predict_folder
from prism_meta.errors import PrismError
from prism_meta.files import writable_folder
from prism_meta.training.run import Run
from prism_meta.training.stopping import StopRequest

EXAMPLES = "[bold]Examples[/bold]  prism-meta demo  ·  prism-meta demo --out results/demo --quick"


def run_demo(
    out: Annotated[
        Path,
        typer.Option(
            parser=path, help="Folder for the phantoms, the run, the report and the labels."
        ),
    ] = Path("demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Use tiny phantoms and finish in under a minute.")
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Random seed of phantoms and training.")
    ] = 0,
) -> None:
    """Draw phantoms with missing modalities, train on them, evaluate, and predict labels."""
    size = demo.QUICK if quick else demo.FULL
    run_folder = out / "run"
    if (run_folder / "run.json").exists():
        raise PrismError(f"{out}: holds a demo already; give another --out, or remove it")
    writable_folder(out)
    with bars("phantoms") as advance:
        train_root, test_root = size.write(
            out / "phantoms", seed=seed, on_case=lambda done: advance(done, size.phantoms, "")
        )
    train_and_tell(train_root, size.config(seed), run_folder, stop=StopRequest())
    add_runs([run_folder])
    run = Run.open(run_folder)
    evaluate_and_show(run, root=test_root)
    labels = out / "predictions"
    with bars("predict") as advance:
        show_labels(predict_folder([run], test_root, labels, advance), labels)
