"""Files that are complete or not there: every write goes to a neighbour and is then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prism_meta.errors import OutputError


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; it replaces ``path`` only if the block succeeds.

    The neighbour keeps the suffixes of ``path`` (``.nii.gz``), which writers look at.

    Raises:
        OutputError: the folder cannot be made or written.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> with atomic(folder / "a.txt") as partial:
        ...     _ = partial.write_text("whole")
        >>> [p.name for p in folder.iterdir()]
        ['a.txt']
    """
    path = Path(path)
    partial = path.with_name(f".{os.getpid()}.partial.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def writable_folder(folder: Path | str) -> Path:
    """Make ``folder`` and check that a file can be written in it, before any work is done for it.

    Raises:
        OutputError: it cannot be made or written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _cannot_write(folder, error) from error
    return folder


def _cannot_write(path: Path, error: OSError) -> OutputError:
    reason = (error.strerror or str(error)).lower()
    return OutputError(f"cannot write {path}: {reason}; choose a folder that you may write to")
