"""``prism-meta plan``: sizes from the data and the memory, and what ``train`` plans without settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.filesize import decimal
from rich.table import Table

from prism_meta.cli.options import CASES_HELP, ConfigFile, Overrides
from prism_meta.cli.output import add_result, bars, note, show
from prism_meta.cli.usage import path
from prism_meta.errors import CaseError, ConfigError, OutputError, raise_faults
from prism_meta.files import write_whole
from prism_meta.training.config import Config, load_config
from prism_meta.training.planning.plan import PLANNED, default_memory, plan
from prism_meta.training.planning.result import Plan
from prism_meta.training.stopping import duration
from prism_meta.training.survey.survey import survey

EXAMPLES = (
    "[bold]Examples[/bold]  prism-meta plan cases --memory 10GB  ·  prism-meta plan cases --memory 24GB "
    "--time 12h -s meta.strategy=second_order --out second.toml"
)


def run_plan(
    root: Annotated[Path, typer.Argument(parser=path, metavar="CASES", help=CASES_HELP)],
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory that training may use, e.g. 10GB: of the GPU, or of the process on a CPU. Defaults "
            "to most of the GPU, or 2 GB on a CPU.",
        ),
    ] = None,
    time: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="How long training may take, e.g. 2h. It sets training.steps, and sizes with which this "
            "machine takes enough of them.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", parser=path, help="Configuration to write.")
    ] = Path("plan.toml"),
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Choose spacing, patch, batch size and network from the data and the memory, and write a config.

    Headers are read, and no voxels. The settings are those that the training will have, e.g. its strategy.
    """
    settings = load_config(config, overrides or [])
    limit = default_memory(settings) if memory is None else _bytes(memory)
    seconds = None if time is None else duration(time)
    if out.exists():
        raise OutputError(f"{out}: exists already; give another --out, or remove it")
    planned = planned_for(settings, root, limit, seconds=seconds)
    show(plan_table(planned, limit))
    write_whole(out, planned.to_toml())
    show(f"configuration in {out}; train with: prism-meta train {root} -c {out}")
    add_result(
        config=out,
        settings=planned.config.model_dump(mode="json"),
        choices=[{"key": key, "value": value, "why": why} for key, value, why in planned.choices],
        memory={
            "limit": limit,
            "peak": planned.total,
            "steps": planned.parts,
            "preparation": planned.preparation,
        },
    )


def planned_for(config: Config, root: Path, memory: int, *, seconds: float | None = None) -> Plan:
    """Plan for a data set, with a progress bar."""
    with bars("headers", "plan") as advance:
        found = survey(config, root, fast=True, on_case=advance)
        raise_faults(CaseError, found.faults)
        tried = 0

        def on_try(what: str) -> None:
            nonlocal tried
            tried += 1
            advance(tried, max(8, tried + 1), what, task="plan")

        made = plan(config, found, memory, seconds=seconds, on_try=on_try)
        advance(1, 1, "", task="plan")
    return made


def sets_sizes(overrides: Sequence[str]) -> bool:
    """Whether any of the keys that a plan chooses is set.

    Example:
        >>> sets_sizes(["data.holdout=4"]), sets_sizes(["data.holdout=4", "data.patch=[64, 64]"])
        (False, True)
    """
    return any(override.split("=")[0].strip() in PLANNED for override in overrides)


def planned_by_train(config: Config, root: Path) -> Config:
    """What ``train`` uses without a configuration; it says what it planned."""
    memory = default_memory(config)
    made = planned_for(config, root, memory)
    chosen = ", ".join(f"{key} = {value}" for key, value, _ in made.choices)
    note(
        f"planned for {decimal(memory)} of memory: {chosen} (prism-meta plan says why; give --config, or "
        "set one of these keys, to choose yourself)"
    )
    return made.config


def plan_table(made: Plan, memory: int) -> Table:
    """The choices, and the memory that they need."""
    table = Table(box=None, pad_edge=False, title="Plan", title_justify="left")
    table.add_column("key", no_wrap=True)
    table.add_column("value", no_wrap=True)
    table.add_column("why")
    for key, value, reason in made.choices:
        table.add_row(key, str(value), reason)
    table.add_section()
    for name, size in made.parts.items():
        table.add_row("memory", decimal(size), name)
    if made.preparation:
        table.add_row("memory", decimal(made.preparation), "preparing a case, before the steps")
    table.add_row("memory", decimal(made.total), f"at the peak, of {decimal(memory)}")
    return table


def _bytes(text: str) -> int:
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except (ValidationError, OverflowError):
        size = 0
    if size <= 0:
        raise ConfigError(f"memory: got {text!r}; give a size such as 10GB or 800MB")
    return size
