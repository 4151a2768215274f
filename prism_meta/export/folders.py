"""Folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prism_meta.errors import OutputError
from prism_meta.files import cannot_write


@contextmanager
def whole_folder(folder: Path | str) -> Iterator[Path]:
    """Yield a temporary folder to write into. It becomes ``folder`` only if the block succeeds.

    Args:
        folder: must not exist, or be empty.

    Raises:
        OutputError: it holds files, or it cannot be written.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "exported"
        >>> with whole_folder(folder) as partial:
        ...     _ = (partial / "a.txt").write_text("whole")
        >>> [path.name for path in folder.iterdir()]
        ['a.txt']
    """
    folder = Path(folder)
    try:
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        if folder.exists() and any(folder.iterdir()):
            raise OutputError(f"{folder}: holds files already; give another --out, or remove it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = folder.absolute().with_name(f".partial-{secrets.token_hex(8)}")
        partial.mkdir()
        try:
            yield partial
            if folder.exists():
                folder.rmdir()  # empty, and Windows does not replace a folder
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
