"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prism_meta.bilevel.strategies import ALL_STRATEGIES
from prism_meta.cli.completing import complete_key, complete_run
from prism_meta.cli.usage import path
from prism_meta.errors import PrismError
from prism_meta.export.download import SCHEME, download_run
from prism_meta.training.folder.weights import Kind
from prism_meta.training.prediction.ensembles import CleanupChoice


def run_path(text: str | Path) -> Path:
    """A run folder on the command line; one on the Hugging Face hub (``hf://owner/name``) is downloaded.

    Raises:
        typer.BadParameter: no file can have this path, or the run cannot be downloaded.
    """
    if not str(text).startswith(SCHEME):
        return path(text)
    try:
        return download_run(str(text))
    except PrismError as error:
        raise typer.BadParameter(str(error)) from error


RunFolder = Annotated[
    Path,
    typer.Argument(
        parser=run_path,
        metavar="RUN",
        help="Run folder that prism-meta train wrote, or hf://owner/name on the Hugging Face hub.",
        autocompletion=complete_run,
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        parser=path,
        help="TOML file. Defaults to the built-in settings.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        autocompletion=complete_key,
        help="Set one key of the configuration, e.g. training.steps=500. Repeatable. Strategies for "
        f"meta.strategy: {', '.join(kind.name for kind in ALL_STRATEGIES)}.",
    ),
]
Runs = Annotated[
    list[Path] | None,
    typer.Argument(
        parser=path,
        metavar="A B [C ...]",
        help="Run folders that were evaluated, or their records.csv. The others are compared with A.",
        show_default=False,
        autocompletion=complete_run,
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Random seed for the bootstrap.")]
#: What CASES may be.
CASES_HELP = "Folder of cases (a folder per case, BIDS, Decathlon, nnU-Net), or a manifest."
Weights = Annotated[
    Kind | None,
    typer.Option(
        help="Weights of the run to use. Defaults to the best on its validation cases, if it has any, "
        "otherwise to the moving average of training.ema, otherwise to the last ones."
    ),
]
Flips = Annotated[
    bool,
    typer.Option(
        "--flips",
        help="Average over mirrored images, too: 4 times as slow on slices, 8 times on volumes.",
    ),
]
CleanUp = Annotated[
    CleanupChoice,
    typer.Option(
        "--clean-up",
        help="How labels are cleaned up. run: by the rules that the run chose on its validation cases, if "
        "any; brats: an ET under 0.5 ml (500 voxels of 1 mm) is removed; none: labels stay as predicted.",
    ),
]
