"""``prism-meta profile``: time, memory and FLOPs of predictions and of training steps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

import typer
from rich.text import Text
from torch import Tensor

from prism_meta.bilevel.strategies import ALL_STRATEGIES
from prism_meta.cli.options import RunFolder, Weights
from prism_meta.cli.output import add_result, bars, show
from prism_meta.cli.profile_tables import profile_tables
from prism_meta.errors import ConfigError, raise_faults
from prism_meta.modalities import composed, subset
from prism_meta.modalities import subsets as all_subsets
from prism_meta.training.profiling.prediction import CaseSize
from prism_meta.training.profiling.profile import profile_run
from prism_meta.training.run import Run
from prism_meta.training.stopping import duration

EXAMPLES = (
    "[bold]Examples[/bold]  prism-meta profile runs/a  ·  prism-meta profile runs/a --only predict "
    "--subsets flair,flair+t1 --shape 160x192x144  ·  prism-meta profile runs/a --only train "
    "--strategies first_order,second_order --json > profile.json"
)
#: All subsets of so many modalities are profiled; of more, each modality alone and all together.
MODALITIES = 4


def run_profile(
    run: RunFolder,
    subsets: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Subsets of modalities, separated by commas, e.g. flair,flair+t1. Defaults to all; of more "
            f"than {MODALITIES} modalities to each one alone and all together.",
        ),
    ] = None,
    strategies: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Strategies, separated by commas. Defaults to all: "
            f"{', '.join(kind.name for kind in ALL_STRATEGIES)}.",
        ),
    ] = None,
    only: Annotated[
        Literal["predict", "train"] | None,
        typer.Option(help="Profile only predictions, or only training. Defaults to both."),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="DxHxW",
            help="Size of a case in voxels of the model's grid, the slices last. Defaults to the median of "
            "the held-out cases, by their headers.",
        ),
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=2, max=1000, help="How often everything is timed.")
    ] = 5,
    limit: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            help="How long timing whole cases may take. If they need longer, their time is estimated from "
            "that of some windows.",
        ),
    ] = "2m",
    weights: Weights = None,
) -> None:
    """Show time, memory and FLOPs of predictions per subset, and of training per strategy.

    Images are random and as large as those of the run, so that no case is needed.
    """
    opened = Run.open(run)
    rows = _subsets(subsets, opened.config.data.modalities)
    names = _strategies(strategies)
    size = None if shape is None else _size(shape)
    seconds = duration(limit)
    with bars("predict", "train") as advance:
        made = profile_run(
            opened,
            subsets=None if only == "train" else rows,
            strategies=[] if only == "predict" else names,
            size=size,
            rounds=repeats,
            limit=seconds,
            weights=weights,
            on_predict=partial(advance, task="predict"),
            on_train=partial(advance, task="train"),
        )
    # Lines between the tables are as wide as the tables.
    show(*(Text(part) if isinstance(part, str) else part for part in profile_tables(made)))
    add_result(**made.as_dict())


def _subsets(text: str | None, modalities: Sequence[str]) -> Tensor:
    """Bool (S, M), by size, then in modality order.

    Raises:
        ConfigError: a subset is empty, occurs twice, or has an unknown modality.
    """
    every = all_subsets(len(modalities))
    if text is None:
        size = every.sum(1)
        return every if len(modalities) <= MODALITIES else every[(size == 1) | (size == size.max())]
    known = {composed(name): name for name in modalities}
    chosen, faults = [], []
    for name in _listed("subsets", text, "subset, e.g. " + "+".join(modalities[:2])):
        parts = [known.get(composed(part.strip()), part) for part in name.split("+")]
        try:
            chosen.append(subset(parts, modalities).tolist())
        except ValueError:
            use = f"join different ones of {', '.join(modalities)} by +"
            faults.append(f"subsets: {name!r} is no subset of the modalities; {use}")
    faults += _twice("subsets", ["+".join(map(str, row)) for row in chosen], text)
    raise_faults(ConfigError, faults)
    return every[[row in chosen for row in every.tolist()]]


def _strategies(text: str | None) -> list[str]:
    known = [kind.name for kind in ALL_STRATEGIES]
    if text is None:
        return known
    chosen = _listed("strategies", text, f"of {', '.join(known)}")
    faults = [
        f"strategies: unknown strategy {name!r}; use some of {', '.join(known)}"
        for name in chosen
        if name not in known
    ]
    raise_faults(ConfigError, [*faults, *_twice("strategies", chosen, text)])
    return chosen


def _listed(option: str, text: str, expected: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"{option}: got {text!r}; give at least one {expected}")
    return names


def _twice(option: str, chosen: Sequence[str], text: str) -> list[str]:
    if len(set(chosen)) == len(chosen):
        return []
    return [f"{option}: {text!r} has one of them twice; give each once"]


def _size(text: str) -> CaseSize:
    parts = re.fullmatch(r"(\d{1,5})[x,](\d{1,5})[x,](\d{1,5})", text.strip())
    shape = tuple(map(int, parts.groups())) if parts else ()
    if not shape or min(shape) < 1:
        raise ConfigError(f"shape: got {text!r}; give three numbers of voxels, e.g. 160x192x144")
    return CaseSize(shape, "given")
