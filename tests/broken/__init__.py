"""Broken inputs of every kind, each with the command that meets it and what the command must say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Broken:
    """One broken input.

    Args:
        name: name of the test.
        command: writes the input below the folder that it gets, and returns the arguments of
            ``prism-meta``. Outputs belong below the same folder.
        says: what the lines of the message contain, all lines together: the file, the problem, the fix.
        keeps: whether the command does what can be done before it ends with code 2, so that it writes
            files. Other commands leave nothing behind.
    """

    name: str
    command: Callable[[Path], Sequence[object]]
    says: tuple[str, ...]
    keeps: bool = False
