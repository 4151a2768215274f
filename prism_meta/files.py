"""Atomic writes: a temporary file in the same folder, then a rename. No file is ever half-written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prism_meta.errors import OutputError


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path to write to. It replaces ``path`` only if the block succeeds.

    The temporary file keeps the suffixes of ``path`` because writers choose the format by them
    (``.nii.gz``).

    Raises:
        OutputError: the folder cannot be created or written.

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
    """Create ``folder`` and check that it can be written. Call it before long computations.

    Raises:
        OutputError: the folder cannot be created or written.

    Example:
        >>> writable_folder(Path(tempfile.mkdtemp()) / "run").is_dir()
        True
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
