"""The command line: the list of commands, and its entry point."""

from __future__ import annotations

import warnings
from typing import Annotated, Any

import typer

from prism_meta.cli.ending import EndedGroup
from prism_meta.cli.lazy import LazyCommand
from prism_meta.cli.usage import print_any_character

#: The commands, in the order of the help, each with the first line of its own help; see ``LazyCommand``.
COMMANDS = {
    "demo": "Draw phantoms with missing modalities, train on them, evaluate, and predict labels.",
    "cases": "Show what a data set has, and all its faults, before a training meets them.",
    "plan": "Choose spacing, patch, batch size and network from the data and the memory, and write a config.",
    "train": "Train on a folder of cases and write a run folder.",
    "adapt": "Fine-tune a run to a site and a subset of modalities, from a few labelled cases.",
    "profile": "Show time, memory and FLOPs of predictions per subset, and of training per strategy.",
    "evaluate": "Evaluate a run on every subset of modalities: a table, CSV, JSON and an HTML report.",
    "predict": "Write one label volume per case, on the grid of its files, and a table of region volumes.",
    "export": "Write a run as files for other software: ONNX, torch.export, or a folder for a model hub.",
    "ablate": "Compare methods over seeds and folds: train all runs of a study, and write its report.",
    "compare": "Show paired differences to the first run over shared cases, with 95 % bootstrap intervals.",
    "report": "Write an HTML page with evaluated runs side by side, per subset and region.",
    "doctor": "Check the installation: versions, devices and optional packages, and test it in seconds.",
}


class Commands(EndedGroup):
    """The group of all commands."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        for name, summary in COMMANDS.items():
            self.add_command(LazyCommand(name, summary))


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Train one segmentation network for every subset of modalities, and evaluate it on each.",
)


def _show_version(value: bool) -> None:
    if value:
        from prism_meta import __version__

        typer.echo(f"prism-meta {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None: ...


def main() -> None:
    """Entry point of the ``prism-meta`` script."""
    print_any_character()
    # Deprecation warnings inside MONAI would only break up the progress bars.
    warnings.filterwarnings("ignore", module=r"monai\..*")
    app()
