"""Files that are whole or not there: written under a temporary name, synced to disk, then renamed.

A killed process leaves its temporary file behind. ``writable_folder`` removes such files at the next
start.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from prism_meta.errors import OutputError, raise_faults

#: Temporary files: host and process that write them, and a random part that no one can foresee.
_PARTIAL = re.compile(r"\.partial-(?P<host>[\w.]*)-(?P<pid>\d+)-[0-9a-f]{16}")
#: Seconds after which a temporary file of another host counts as left behind.
_STALE = 24 * 3600
#: Temporary files of this process.
_writing: set[str] = set()


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path to write to. It replaces ``path`` only if the block succeeds.

    The temporary file is created exclusively, so that a link planted under its name is not followed.
    It keeps the suffixes of ``path`` because writers choose the format by them (``.nii.gz``).

    A temporary path is yielded as it is, so that functions that write whole files can fill it. What they
    fail at is then said of the file that the outer block writes.

    Raises:
        OutputError: the folder cannot be created or written, or the disk is full.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with atomic(folder / "a.txt") as partial:
        ...     _ = partial.write_text("whole")
        >>> [p.name for p in folder.iterdir()]
        ['a.txt']
    """
    path = Path(path)
    if path.name in _writing:
        yield path
        return
    suffixes = "".join(path.suffixes[-2:])
    name = f".partial-{_host()}-{os.getpid()}-{secrets.token_hex(8)}{suffixes}"
    partial = path.with_name(name)
    _writing.add(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            partial.unlink()
        _writing.discard(name)


def write_whole(path: Path | str, content: bytes | str) -> None:
    """Write a whole file at once; text is written as UTF-8.

    Raises:
        OutputError: see ``atomic``.
    """
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    with atomic(path) as partial:
        partial.write_bytes(data)


def writable_folder(folder: Path | str, *, files: Sequence[str] = ()) -> Path:
    """Create ``folder`` and check that it can be written. Call it before long computations.

    Temporary files that a killed process left there are removed.

    Args:
        folder: the folder.
        files: names of the files that will be written into it.

    Raises:
        OutputError: the folder cannot be created or written, or a file is a folder.

    Example:
        >>> import tempfile
        >>> writable_folder(Path(tempfile.mkdtemp()) / "run").is_dir()
        True
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".partial-{_host()}-{os.getpid()}-{secrets.token_hex(8)}"
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        probe.unlink()
        _remove_left_behind(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    faults = [
        f"cannot write {folder / name}: is a directory; remove it, or choose another folder"
        for name in files
        if (folder / name).is_dir()
    ]
    raise_faults(OutputError, faults)
    return folder


@contextmanager
def kept_if_used(folder: Path | str) -> Iterator[None]:
    """If the block raises, remove ``folder`` and its parents as far as they are new and empty.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> with suppress(ValueError), kept_if_used(root / "runs" / "a"):
        ...     (root / "runs" / "a").mkdir(parents=True)
        ...     raise ValueError("refused")
        >>> list(root.iterdir())
        []
    """
    folder = Path(folder)
    new = [path for path in (folder, *folder.parents) if not _exists(path)]
    try:
        yield
    except BaseException:
        for path in new:
            with suppress(OSError):
                path.rmdir()
        raise


def cannot_write(path: Path, error: OSError) -> OutputError:
    """The error for a file or folder that ``error`` kept from being written."""
    reason = (error.strerror or str(error)).lower()
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    fix = "free some space" if full else "choose a folder that you may write to"
    return OutputError(f"cannot write {path}: {reason}; {fix}")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # the path is too long, or has a NUL
        return False


def _host() -> str:
    return re.sub(r"[^\w.]", "_", socket.gethostname())[:64]


def sync(path: Path) -> None:
    """Write a file, or the entries of a folder, from the system's memory to the disk.

    Raises:
        OSError: there is no such file, or no space for it.
    """
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some network file systems do not sync folders.
        with contextlib.nullcontext() if path.is_file() else suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_left_behind(folder: Path) -> None:
    for path in folder.iterdir():
        match = _PARTIAL.match(path.name)
        if match is None:
            continue
        with suppress(OSError):
            old = time.time() - path.lstat().st_mtime > _STALE
            if old or (match["host"] == _host() and _has_ended(int(match["pid"]), path.name)):
                path.unlink()


def _has_ended(pid: int, name: str) -> bool:
    """Whether the process of this host that wrote the temporary file ``name`` has ended."""
    if pid == os.getpid():  # a number is used again, in a container always
        return name not in _writing
    if os.name == "nt":
        return False  # os.kill would end it
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # it belongs to another user
        return False
    return False
