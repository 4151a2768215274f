"""The search for folders of cases: links, loops of links, hidden folders and outputs of this package."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prism_meta.errors import one_line

#: A folder with one of these files is an output of this package: a run, an evaluation, predicted
#: labels, or a cache. The search skips it and all folders below it.
OUTPUT_MARKS = ("run.json", "records.csv", "unfinished.jsonl", "predictions.csv", "CACHEDIR.TAG")
#: Suffixes of NIfTI files, the longer first.
SUFFIXES = (".nii.gz", ".nii")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundFolder:
    """A folder that should be a case, because it has NIfTI files or no subfolders.

    Args:
        path: the folder, below the root of the search.
        files: names of its NIfTI files, sorted; and paths of those in subfolders that belong to it.
    """

    path: Path
    files: tuple[str, ...]


def output_mark(folder: Path) -> str | None:
    """Return the file that marks ``folder`` as an output of this package, or None.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "run.json").write_text("{}")
        >>> output_mark(folder)
        'run.json'
    """
    return next((mark for mark in OUTPUT_MARKS if os.path.lexists(folder / mark)), None)


def search_folders(
    root: Path,
    faults: list[str],
    *,
    is_case: Callable[[tuple[str, ...]], bool] = lambda files: False,
    nested: Callable[[str], bool] = lambda path: False,
) -> Iterator[FoundFolder]:
    """Yield the folders at and below ``root`` that should be cases, each real folder once.

    Symbolic links are followed, after all real folders, so that a folder that is reached by both is
    found under its own name. A link to ``root`` or to a folder above it is not followed.

    Args:
        root: a folder.
        faults: receives a message for each folder that cannot be read.
        is_case: whether these files are those of a case. What is below the folder of a case is not
            searched, but for ``root`` that has no files in subfolders.
        nested: whether a file in a subfolder, such as ``pre/t1.nii.gz``, belongs to the folder above.
    """
    above = {_identity(folder) for folder in (root.resolve(), *root.resolve().parents)}
    seen: set[tuple[int, int]] = set()
    pending, links = [root], list[Path]()
    while pending or links:
        # The last of each list, so that the folders come in alphabetical order.
        folder = pending.pop() if pending else links.pop(0)
        try:
            identity = _identity(folder)
            if identity in seen or (folder != root and identity in above):
                continue
            seen.add(identity)
            mark = None if folder == root else output_mark(folder)
            if mark is not None:
                _log.info("%s is skipped: it has %s, an output", one_line(str(folder)), mark)
                continue
            with os.scandir(folder) as entries:
                listed = sorted((e for e in entries if not e.name.startswith(".")), key=_name)
        except OSError as error:
            faults.append(
                f"{folder}: cannot be read ({(error.strerror or str(error)).lower()}); "
                "make the folder readable"
            )
            continue
        files = tuple(e.name for e in listed if e.name.lower().endswith(SUFFIXES))
        below = [e for e in listed if e.name not in files and _is_folder(e)]
        for entry in listed:
            if entry.name not in files and _leads_nowhere(entry):
                _log.warning("%s is a link to nothing and is skipped", one_line(entry.path))
        files += tuple(path for e in below for path in _files_in(e) if nested(path))
        whole = is_case(files) and (folder != root or any("/" in file for file in files))
        if not whole:
            pending.extend(Path(folder, e.name) for e in reversed(below) if not e.is_symlink())
            links.extend(Path(folder, e.name) for e in below if e.is_symlink())
        if files or not below:
            yield FoundFolder(folder, files)


def _files_in(folder: os.DirEntry[str]) -> list[str]:
    """The NIfTI files in a subfolder, as paths in the folder above."""
    try:
        with os.scandir(folder.path) as entries:
            names = sorted(e.name for e in entries if not e.name.startswith("."))
    except OSError:  # the search says so when it comes there
        return []
    return [f"{folder.name}/{name}" for name in names if name.lower().endswith(SUFFIXES)]


def _identity(folder: Path) -> tuple[int, int]:
    """The same for all paths to one real folder."""
    facts = folder.stat()
    return facts.st_dev, facts.st_ino


def _name(entry: os.DirEntry[str]) -> str:
    return entry.name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _leads_nowhere(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not Path(entry.path).exists()
