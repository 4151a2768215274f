"""The lock of a run folder: two processes never train in one folder."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from prism_meta.errors import PrismError
from prism_meta.files import cannot_write, write_whole

#: The file that is locked. It stays, because others may be waiting for it.
LOCK = ".lock"
#: Who holds the lock; it exists only meanwhile.
HOLDER = ".lock.json"
#: What a file system says that has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_log = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``. The system releases it if the process is killed.

    On a network folder it holds against other hosts if the file system passes locks on, as NFS does. A
    file system without locks is only warned of.

    Raises:
        PrismError: another process holds it.
        OutputError: the folder cannot be written.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with locked(folder):
        ...     sorted(path.name for path in folder.iterdir())
        ['.lock', '.lock.json']
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise PrismError(
            f"{folder}: {_holder(folder)} trains in this folder; wait until it ends, or give another "
            "--out"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise cannot_write(folder / LOCK, error) from error
        _log.warning(
            "%s: this file system has no locks; make sure that no other process trains in this folder",
            folder,
        )
    try:
        facts = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        write_whole(folder / HOLDER, json.dumps(facts) + "\n")
        yield
    finally:
        with suppress(OSError):
            (folder / HOLDER).unlink()
        lock.release()


def _holder(folder: Path) -> str:
    for _ in range(10):  # it writes the file just after it got the lock
        with suppress(OSError, ValueError, KeyError, TypeError):
            facts = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
            return f"process {facts['pid']} on {facts['host']} (since {facts['since']})"
        time.sleep(0.05)
    return "another process"
