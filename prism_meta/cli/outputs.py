"""Folders for outputs: checked before long work, and not left over if nothing comes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from prism_meta.errors import OutputError, raise_faults
from prism_meta.files import kept_if_used, writable_folder


@contextmanager
def output_folder(folder: Path, *, files: Sequence[str] = ()) -> Iterator[Path]:
    """Make a folder, check that ``files`` can be written into it, and yield it.

    If the block raises, the folder is removed again if it is new and empty.

    Args:
        folder: the folder.
        files: names of the files that the block will write.

    Raises:
        OutputError: the folder cannot be created or written, or a file is a folder.
    """
    with kept_if_used(folder):
        writable_folder(folder)
        faults = [
            f"cannot write {folder / name}: is a directory; remove it, or give another folder"
            for name in files
            if (folder / name).is_dir()
        ]
        raise_faults(OutputError, faults)
        yield folder
