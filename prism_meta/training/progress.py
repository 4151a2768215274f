"""Progress on standard error: bars on a terminal, and plain lines in a file or a pipe."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

#: Seconds between two plain lines.
INTERVAL = 10.0


class Advance(Protocol):
    """Moves a progress bar."""

    def __call__(self, done: int, total: int, note: str, task: str = ...) -> None:
        """Show ``done`` of ``total``, with ``note`` beside the bar named ``task``."""


@contextmanager
def progress_bars(*names: str, quiet: bool = False) -> Iterator[Advance]:
    """One bar per name, which appears with its first call; the default task is the first name.

    Where nothing can move, in a file, a pipe or a dumb terminal, each task has a line when it ends, and
    before that one at most every ``INTERVAL`` seconds.
    """
    console = Console(stderr=True, quiet=quiet)
    moves = console.is_jupyter or (console.is_terminal and not console.is_dumb_terminal)
    if not moves:
        yield _Lines(console, names[0])
        return
    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks = {
            name: progress.add_task(name, total=None, start=False, visible=False, note="")
            for name in names
        }

        def advance(done: int, total: int, note: str, task: str = names[0]) -> None:
            bar = tasks[task]
            if not progress.tasks[bar].started:
                progress.start_task(bar)
            progress.update(bar, completed=done, total=total, note=note, visible=True)

        yield advance


class _Lines:
    """Writes lines instead of bars."""

    def __init__(self, console: Console, default: str) -> None:
        self._console, self._default = console, default
        self._start = self._last = time.monotonic()

    def __call__(self, done: int, total: int, note: str, task: str = "") -> None:
        now = time.monotonic()
        if done < total and now - self._last < INTERVAL:
            return
        self._last = now
        parts = (f"{task or self._default}: {done} of {total}", note, f"{now - self._start:.0f} s")
        line = "  ".join(filter(None, parts))
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
