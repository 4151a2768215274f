"""Progress bars on standard error."""

from __future__ import annotations

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


class Advance(Protocol):
    """Moves a progress bar."""

    def __call__(self, done: int, total: int, note: str, task: str = ...) -> None:
        """Show ``done`` of ``total``, with ``note`` beside the bar named ``task``."""


@contextmanager
def progress_bars(*names: str, quiet: bool = False) -> Iterator[Advance]:
    """One bar per name, which appears with its first call; the default task is the first name."""
    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True, quiet=quiet)) as progress:
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
