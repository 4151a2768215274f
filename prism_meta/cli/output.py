"""What commands write: results on standard output, as text or one JSON object; the rest on standard error.

Every command has ``--json`` and ``--quiet`` from here. It shows its text with ``show``, and gives the same
facts to ``add_result``; with ``--json`` only these are written, when the command ends.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prism_meta.cli.usage import is_first, tell

if TYPE_CHECKING:  # the help of the command line does not need them
    from rich.console import RenderableType

    from prism_meta.training.progress import Advance


@dataclass
class Output:
    """How the command that runs writes, and what it has found.

    Args:
        as_json: write ``result`` as one JSON object, and no text.
        quiet: leave out progress and notes.
        result: what ``add_result`` got.
    """

    as_json: bool = False
    quiet: bool = False
    result: dict[str, Any] = field(default_factory=dict)


_running: ContextVar[Output | None] = ContextVar("output", default=None)


@contextmanager
def command_output() -> Iterator[None]:
    """The output of one command. Its JSON object is written at the end, also if cases had faults."""
    output = Output()
    token = _running.set(output)
    try:
        yield
    finally:
        _running.reset(token)
        if output.as_json and output.result and is_first():
            # ASCII, whatever the terminal has.
            typer.echo(json.dumps(_plain(output.result), indent=2, allow_nan=False))


def show(*parts: RenderableType) -> None:
    """Write tables and lines to standard output, unless it gets the JSON object. Lines are not broken."""
    if _output().as_json:
        return
    from rich.console import Console

    console = Console()
    for part in parts:
        if isinstance(part, str):
            console.print(part, soft_wrap=True, markup=False)
        else:
            console.print(part)


def add_result(**facts: Any) -> None:
    """Add facts to the JSON object: numbers, strings, paths, sequences and mappings; NaN becomes null."""
    _output().result.update(facts)


def note(line: str) -> None:
    """Write a line to standard error, unless the user wants no notes."""
    if not _output().quiet:
        tell(line)


def wants_json() -> bool:
    """Whether this process writes the JSON object, for facts that take time to collect."""
    return _output().as_json and is_first()


def is_quiet() -> bool:
    """Whether the user wants neither progress nor notes."""
    return _output().quiet


def bars(*names: str) -> AbstractContextManager[Advance]:
    """Progress bars on standard error, unless the user wants none; see ``progress_bars``."""
    from prism_meta.training.progress import progress_bars

    return progress_bars(*names, quiet=is_quiet())


def shared_options() -> list[Any]:
    """The options that every command has, as its parameters."""
    made = typer.Typer(add_completion=False)
    made.command()(_options)
    return list(typer.main.get_command(made).params)


def _use_json(value: bool) -> None:
    _output().as_json = value


def _be_quiet(value: bool) -> None:
    _output().quiet = value


def _options(
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Write the result as one JSON object to standard output, instead of text.",
            callback=_use_json,
            expose_value=False,
        ),
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet",
            "-q",
            help="Write only the result and errors: no progress, and no notes.",
            callback=_be_quiet,
            expose_value=False,
        ),
    ] = False,
) -> None: ...


def _output() -> Output:
    return _running.get() or Output()


def _plain(value: Any) -> Any:
    """``value`` with what JSON does not know replaced.

    Example:
        >>> _plain({"dice": float("nan"), "files": (Path("a"),)})
        {'dice': None, 'files': ['a']}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value
