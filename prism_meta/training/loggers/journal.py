"""Where the lines of the log go: ``metrics.jsonl``, and the loggers that follow it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_meta.training.folder import log
from prism_meta.training.loggers.following import Draw, Loggers


@dataclass(frozen=True)
class Journal:
    """The log of a training, which its first process writes.

    Args:
        path: ``metrics.jsonl``. Defaults to no file.
        loggers: get the same lines. Defaults to none.
    """

    path: Path | None = None
    loggers: Loggers | None = None

    def begin(self, step: int) -> None:
        """Drop the lines after ``step``, whose steps follow; loggers get the others that they lack.

        Raises:
            PrismError: the file cannot be read or written.
        """
        if self.path is None:
            return
        log.truncate(self.path, step)
        if self.loggers is not None:
            self.loggers.begin(log.read(self.path))

    def add(self, lines: Sequence[Mapping[str, Any]], draw: Draw | None = None) -> None:
        """Add the lines of some steps, and a picture of the last one for the loggers.

        Raises:
            OutputError: the file cannot be written.
        """
        if self.path is not None:
            log.append(self.path, lines)
        if self.loggers is not None:
            self.loggers.add(lines, draw)
