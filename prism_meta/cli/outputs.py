"""Folders for outputs: checked before long work, and not left over if nothing comes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from prism_meta.errors import OutputError, raise_faults
from prism_meta.files import writable_folder


@contextmanager
def output_folder(folder: Path, *, files: Sequence[str] = ()) -> Iterator[Path]:
    """Make a folder, check that ``files`` can be written into it, and yield it.

    If the block raises, the folders that were made for it are removed again, as far as they are empty.

    Args:
        folder: the folder.
        files: names of the files that the block will write.

    Raises:
        OutputError: the folder cannot be created or written, or a file is a folder.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "new"
        >>> with suppress(KeyError), output_folder(folder):
        ...     raise KeyError
        >>> folder.exists()
        False
    """
    made = [path for path in (folder, *folder.parents) if not _exists(path)]
    try:
        writable_folder(folder)
        raise_faults(
            OutputError,
            [
                f"cannot write {folder / name}: is a directory; remove it, or give another folder"
                for name in files
                if (folder / name).is_dir()
            ],
        )
        yield folder
    except BaseException:
        for path in made:
            with suppress(OSError):  # files that were written are kept
                path.rmdir()
        raise


def _exists(path: Path) -> bool:
    try:
        path.lstat()
    except (OSError, ValueError):  # nor does a path exist that is too long or not allowed
        return False
    return True
