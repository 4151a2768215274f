"""What a kill leaves on the disk, at every moment of a command; and a disk that is full at any moment.

Every change of a file is seen before it happens by an audit hook, so that no place where the package writes
can be forgotten. Only what happens below one folder counts.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

#: Content by path below the folder; None for a folder.
State = dict[str, bytes | None]
#: Called before each change with its name, e.g. ``os.rename``, and the path that it changes.
Before = Callable[[str, Path], None]
#: Temporary files of the package.
PARTIAL = ".partial-"

#: Changes that may need space on the disk.
NEED_SPACE = ("open", "append", "os.mkdir", "os.rename", "fsync")
_CHANGES = (
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.truncate",
    "os.link",
    "os.symlink",
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC


class _Hook:
    """The audit hook. Python cannot remove one, so there is one that rests between its uses."""

    def __init__(self) -> None:
        self.root: Path | None = None
        self.before: Before | None = None
        self._added = False

    def add(self) -> None:
        if not self._added:
            sys.addaudithook(self)
            self._added = True

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.before is None:
            return
        if event == "open":
            flags = arguments[2]
            if not isinstance(flags, int) or not flags & _WRITING:
                return
        elif event not in _CHANGES:
            return
        path = arguments[0]
        if isinstance(path, (str, bytes, os.PathLike)):
            appends = event == "open" and bool(arguments[2] & os.O_APPEND)  # type: ignore[operator]
            self.tell("append" if appends else event, Path(os.fsdecode(path)))

    def tell(self, event: str, path: Path) -> None:
        before = self.before
        if before is None or self.root is None or self.root not in (path, *path.parents):
            return
        self.before = None  # what ``before`` does itself does not count
        try:
            before(event, path)
        finally:
            self.before = before


_hook = _Hook()


@contextmanager
def watching(root: Path, before: Before) -> Iterator[None]:
    """Within the context, call ``before`` before each change below ``root``. What it raises is raised there.

    ``fsync`` is a change, too: it stands for the write before it, which may have failed half-way.
    """
    sync = os.fsync

    def telling(descriptor: int) -> None:
        path = _path_of(descriptor, root)
        if path is not None:
            _hook.tell("fsync", path)
        sync(descriptor)

    _hook.add()
    _hook.root, _hook.before = root, before
    os.fsync = telling
    try:
        yield
    finally:
        os.fsync = sync
        _hook.before = None


def _path_of(descriptor: int, root: Path) -> Path | None:
    """The file below ``root`` that is open; None for folders, whose sync may fail without harm."""
    facts = os.fstat(descriptor)
    for path in root.rglob("*"):
        if path.is_file() and os.path.samestat(path.stat(), facts):
            return path
    return None


def read(root: Path) -> State:
    """All files and folders below ``root``."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(root.rglob("*"))
    }


def restore(root: Path, state: State) -> None:
    """Make ``root`` hold exactly ``state``."""
    for path in root.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, content in state.items():
        path = root / name
        if content is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def states_of(root: Path, command: Callable[[], object]) -> list[tuple[str, State]]:
    """Run ``command``; all different states of ``root`` in which a kill can leave it, each with a name."""
    found: dict[str, State] = {}
    contents: dict[bytes, bytes] = {}  # equal ones once
    before_append: dict[str, int] = {}

    def add(name: str, state: State) -> None:
        state = {p: c if c is None else contents.setdefault(c, c) for p, c in state.items()}
        if not found or _unnamed(state) != _unnamed(list(found.values())[-1]):
            found[f"{len(found)}: {name}"] = state

    def before(event: str, path: Path) -> None:
        name, state = path.relative_to(root).as_posix(), read(root)
        content = state.get(name)
        if event == "append":
            before_append[name] = 0 if content is None else len(content)
        if event == "fsync" and content is not None:
            half = (len(content) + before_append.get(name, 0)) // 2
            add(f"within the write of {name}", {**state, name: content[:half]})
        add(f"before {event} {name}", state)

    with watching(root, before):
        command()
    add("at the end", read(root))
    return list(found.items())


def _unnamed(state: State) -> list[tuple[str, bytes | None]]:
    """The state without the random parts of names."""
    return [(n.partition(PARTIAL)[0] if PARTIAL in n else n, c) for n, c in state.items()]


@contextmanager
def longest_file(size: int) -> Iterator[None]:
    """Within the context the system lets no file of this process grow beyond ``size`` bytes."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class FullDisk:
    """The disk is full after some changes that need space; pass it to ``watching``.

    Args:
        count: number of changes that succeed.
    """

    def __init__(self, count: float) -> None:
        self.left, self.seen = count, 0
        self._before_append: dict[Path, int] = {}

    def __call__(self, event: str, path: Path) -> None:
        if event not in NEED_SPACE:
            return
        self.seen += 1
        if event == "append":
            self._before_append[path] = path.stat().st_size if path.exists() else 0
        if self.seen <= self.left:
            return
        if event == "fsync":  # what was written before it came only half-way
            os.truncate(path, (path.stat().st_size + self._before_append.get(path, 0)) // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
