"""BIDS, the Brain Imaging Data Structure: a folder per subject, session and kind of image."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from prism_meta.data.layouts.base import Found, Layout, build_case, is_folder, remaining
from prism_meta.data.layouts.names import FileNames
from prism_meta.data.layouts.search import SUFFIXES
from prism_meta.errors import Fault, one_line

_SUBJECT, _SESSION = re.compile(r"sub-[^/]+"), re.compile(r"ses-[^/]+")
#: Folders of kinds of images.
_KINDS = ("anat", "dwi", "perf", "fmap", "func", "pet", "swi", "mri")
#: Folder of what was made from the images: labels, among others.
_DERIVATIVES = "derivatives"
_log = logging.getLogger(__name__)


class Bids(Layout):
    """``sub-01/ses-01/anat/sub-01_ses-01_FLAIR.nii.gz``; sessions are optional.

    A case is a session of a subject, and the subject is its patient. Labels lie beside the images or in
    the same folders below ``derivatives``, e.g. ``derivatives/masks/sub-01/ses-01/anat``. The column
    ``site`` of ``participants.tsv`` gives the site.

    Source: Gorgolewski et al., Scientific Data 3:160044 (2016).
    """

    name = "bids"
    title = "BIDS"

    def matches(self, root: Path, names: FileNames) -> bool:
        return any(_has_kinds(subject) for subject in _subjects(root))

    def find(self, root: Path, names: FileNames) -> Found:
        found = Found(self.title)
        subjects = _subjects(root)
        if not subjects:
            message = f"{root}: has no folder sub-*, expected BIDS; give the folder that holds the subjects"
            found.faults.append(Fault(message, "layout"))
            return found
        base = subjects[0].parent
        sites = _sites(base / "participants.tsv", found.faults)
        skipped = []
        for subject in subjects:
            for folder in _sessions(subject):
                whole = folder == subject
                name = subject.name if whole else f"{subject.name}_{folder.name}"
                paths = _niftis(folder, skip=_SESSION if whole else None)
                files = [path.relative_to(folder).as_posix() for path in paths]
                owned = names.assign(files, nested=True)
                found.others += remaining(files, owned, "")
                by_name = {key: [folder / file for file in own] for key, own in owned.items()}
                if names.label is not None and names.label not in owned:
                    labels = _derived(base, folder, whole=whole, names=names)
                    by_name |= {names.label: labels} if labels else {}
                if not any(name in owned for name in names.modalities):
                    skipped.append(name)
                    continue
                case, faults = build_case(
                    name, names, by_name, site=sites.get(subject.name), patient=subject.name
                )
                found.add(case, faults)
        if skipped:
            _log.warning(
                "%s: %d sessions have none of %s and are skipped: %s",
                one_line(str(root)), len(skipped), ", ".join(names.modalities), ", ".join(skipped),
            )  # fmt: skip
        if not found.cases and not found.faults:
            shown = ", ".join(ending for ending, _ in found.others.most_common(8)) or "no files"
            message = (
                f"{root}: no case found; expected files like sub-01/anat/sub-01_{names.modalities[0]}"
                f".nii.gz, found files that end in {shown}; name the modalities so, or give patterns"
            )
            found.faults.append(Fault(message, "modalities", "files"))
        return found


def _subjects(root: Path) -> list[Path]:
    """The folders of subjects; the root may be one."""
    if not is_folder(root):
        return []
    if _SUBJECT.fullmatch(root.name) and _has_kinds(root):
        return [root]
    return [folder for folder in _folders(root) if _SUBJECT.fullmatch(folder.name)]


def _has_kinds(subject: Path) -> bool:
    return any((folder / kind).is_dir() for folder in _sessions(subject) for kind in _KINDS)


def _sessions(subject: Path) -> list[Path]:
    """The folders of the sessions of a subject; the subject's own if it has images outside of them."""
    inner = _folders(subject)
    sessions = [folder for folder in inner if _SESSION.fullmatch(folder.name)]
    direct = any(folder.name in _KINDS for folder in inner)
    return [*([subject] if direct or not sessions else []), *sessions]


def _derived(base: Path, folder: Path, *, whole: bool, names: FileNames) -> list[Path]:
    """The label files of a session below ``derivatives``."""
    place = folder.relative_to(base)
    above = base / _DERIVATIVES
    labels = []
    for start in (above, *_folders(above)):
        files = _niftis(start / place, skip=_SESSION if whole else None)
        owned = names.assign([path.name for path in files])
        labels += [path for path in files if path.name in owned.get(names.label or "", ())]
    return labels


def _niftis(folder: Path, *, skip: re.Pattern[str] | None) -> list[Path]:
    """The NIfTI files below a folder, except in folders that ``skip`` fits."""
    if not is_folder(folder):
        return []
    return sorted(_walk(folder, skip))


def _walk(folder: Path, skip: re.Pattern[str] | None) -> Iterator[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith(".") or (skip is not None and skip.fullmatch(entry.name)):
            continue
        if entry.name.lower().endswith(SUFFIXES):
            yield entry
        elif entry.is_dir() and not entry.is_symlink():
            yield from _walk(entry, skip)


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []


def _sites(path: Path, faults: list[str]) -> dict[str, str]:
    """Subject -> site, from the table of participants, if there is one."""
    if not path.is_file():
        return {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            rows = list(csv.DictReader(handle, delimiter="\t"))
    except (OSError, ValueError, csv.Error) as error:
        faults.append(f"{path}: cannot be read ({error}); correct the table, or remove it")
        return {}
    return {
        row["participant_id"]: site
        for row in rows
        if row.get("participant_id") and (site := row.get("site") or "") not in ("", "n/a")
    }
