"""How much memory there is, so that a damaged header or a wrong setting is refused before it fills it."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache
from pathlib import Path

#: Assumed where the system does not say how much memory it has.
_FALLBACK = 64 * 2**30
#: Files with the memory limit of a container, in bytes; version 2 and version 1 of control groups.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@cache
def memory_size() -> int:
    """Bytes of memory of this machine, or of this container if its limit is lower.

    Example:
        >>> memory_size() > 2**20
        True
    """
    sizes = []
    with suppress(AttributeError, ValueError, OSError):  # not on every system
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in _LIMITS:
        with suppress(OSError, ValueError):  # no such file, or "max"
            sizes.append(int(Path(path).read_text(encoding="ascii")))
    return min((size for size in sizes if size > 0), default=_FALLBACK)


def excess(needed: float) -> str | None:
    """Say by how much ``needed`` bytes exceed the memory, or return None if they fit.

    Example:
        >>> excess(1e24)[:34]
        'needs about 1e+15 GB of memory, bu'
    """
    there = memory_size()
    if needed <= there:
        return None
    return f"needs about {needed / 1e9:.3g} GB of memory, but there are {there / 1e9:.3g} GB"
