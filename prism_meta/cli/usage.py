"""How every command reads its arguments and writes to the terminal."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

# Newer versions of typer bring a click of their own.
_UsageError: Any = typer.BadParameter.__base__


def path(text: str | Path) -> Path:
    """A path on the command line; ``~`` is the home folder also where no shell expands it.

    Raises:
        typer.BadParameter: no file can have this path.

    Example:
        >>> path("runs/a")
        PosixPath('runs/a')
    """
    text = str(text)  # defaults are paths already
    if not text.strip() or "\0" in text:
        raise typer.BadParameter(f"got {text!r}, expected a file or folder")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # a user who has no home
        raise typer.BadParameter(f"got {text!r}, whose home folder is unknown") from error


def at_least(paths: Sequence[Path], *names: str) -> Sequence[Path]:
    """The paths if there are as many as ``names``, or more.

    Raises:
        typer.BadParameter: one is missing.

    Example:
        >>> at_least([Path("a"), Path("b"), Path("c")], "RUN", "CASES")
        [PosixPath('a'), PosixPath('b'), PosixPath('c')]
    """
    if len(paths) < len(names):
        raise _UsageError(f"Missing argument '{names[len(paths)]}'.")
    return paths


class ErrorLines(TyperGroup):
    """A command line that cannot be read is one line and code 2, like every other fault of an input."""

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **more: Any) -> Any:
        with _one_line():
            return super().make_context(info_name, args, parent, **more)

    def invoke(self, ctx: Any) -> Any:
        with _one_line():
            return super().invoke(ctx)


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help
            raise
        command = "prism-meta" if error.ctx is None else error.ctx.command_path
        message = " ".join(error.format_message().split()).rstrip(".")
        tell(f"error: {message[:1].lower()}{message[1:]}; see {command} --help")
        raise SystemExit(2) from error


def tell(line: str) -> None:
    """Write a line to standard error, in its encoding. With ``err=True`` typer takes UTF-8 for ASCII."""
    typer.echo(line, file=sys.stderr)


def is_first() -> bool:
    """Whether this is the first of the processes that a training starts; they all find the same."""
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("RANK", "0") == "0"


def print_any_character() -> None:
    """Print characters that the terminal or file cannot encode as escapes, e.g. ``\\u2265``.

    Rich draws its tables and bars in ASCII there, but names of cases may hold any character.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
