"""A folder per case, with files named after their modality, as in BraTS."""

from __future__ import annotations

import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from prism_meta.data.availability import apply_availability
from prism_meta.data.cases import Case
from prism_meta.data.grids import Align, Notes
from prism_meta.data.layouts.search import FoundFolder, output_mark, search_folders
from prism_meta.errors import CaseError, one_line, raise_faults
from prism_meta.modalities import BRATS, file_tokens

_log = logging.getLogger(__name__)
#: Bytes. File systems take 255, of which the names of outputs need some for suffixes.
_LONGEST_NAME = 200


def find_cases(
    root: Path | str,
    modalities: Sequence[str] = BRATS,
    *,
    label: str | None = "seg",
    align: Align = "refuse",
) -> tuple[list[Case], list[str]]:
    """Find the cases in a folder, and the faults of those that cannot be used. Reads headers only.

    ``load_cases`` raises these faults. Use ``find_cases`` to go on with the other cases.

    Args:
        root: the folder, see ``load_cases``.
        modalities: names of the M modalities, in the model's order.
        label: name of the label files. None ignores them and their faults. Defaults to ``seg``.
        align: what happens to files that lie on other grids, see ``Case``.

    Returns:
        The cases without faults, sorted by name; and the faults of the others and of the folder.

    Example:
        >>> import tempfile
        >>> cases, faults = find_cases(tempfile.mkdtemp(), ("t1",))
        >>> cases, faults[0].split(": ")[1]
        ([], 'no case found; expected folders with files like *t1.nii.gz')
    """
    root, modalities = Path(root), tuple(modalities)
    if not _is_folder(root):
        return [], [f"{root}: no such folder; give a folder with one folder per case"]
    mark = output_mark(root)
    if mark is not None:
        return [], [
            f"{root}: has {mark}, so it is an output of prism-meta, expected a folder of cases; "
            f"give the folder of the cases, or rename {mark} if it is yours"
        ]
    faults: list[str] = []
    names = modalities if label is None else (*modalities, label)
    notes = Notes()
    found = [
        _examine(folder, modalities, label, align, notes)
        for folder in search_folders(root, faults)
        if folder.path != root or _assign(folder.files, names)
    ]
    for line in notes.lines():
        _log.warning("%s", one_line(line))
    found.sort(key=lambda pair: pair[0].id)
    counts = Counter(case.id for case, _ in found)
    faults.extend(
        f"case {name}: {count} folders of this name; rename all but one"
        for name, count in counts.items()
        if count > 1
    )
    cases = []
    for case, own in found:
        faults.extend(own)
        if not own and counts[case.id] == 1:
            cases.append(case)
    if not cases and not faults:
        pattern = _pattern(modalities)
        faults.append(f"{root}: no case found; expected folders with files like {pattern}")
    return cases, faults


def load_cases(
    root: Path | str,
    modalities: Sequence[str] = BRATS,
    *,
    label: str | None = "seg",
    availability: Path | str | None = None,
    align: Align = "refuse",
) -> list[Case]:
    """Find the cases in a folder that has one subfolder per case. Reads headers, but no voxels.

    A file belongs to modality ``flair`` if it is named ``flair.nii.gz`` or ends in
    ``_flair.nii.gz`` or ``-flair.nii.gz`` (BraTS 2018-2021). Uncompressed files (``.nii``), upper-case
    names and the names of BraTS 2023 (``-t1n``, ``-t1c``, ``-t2f``, ``-t2w``) are accepted, too. A file
    that several modalities match belongs to the one with the longest name.

    Hidden folders are skipped, and so are outputs of this package with all that is below them
    (``OUTPUT_MARKS``). Symbolic links are followed, but each real folder counts once.

    Args:
        root: the folder. It may also be the folder of a single case.
        modalities: names of the M modalities, in the model's order.
        label: name of the label files, matched like a modality. None ignores them. Defaults to
            ``seg``.
        availability: CSV file of the modalities to use, see ``read_availability``. Defaults to all
            modalities that have a file.
        align: ``"resample"`` brings files that lie on other grids onto the grid of the label, or of the
            first modality without a label. Defaults to ``"refuse"``, which makes them faults.

    Returns:
        The cases, sorted by name.

    Raises:
        CaseError: there is no case, a case has no modality or several files for one, the headers of
            a case differ, or the table does not match the cases (all faults together).

    Example:
        >>> import tempfile
        >>> import nibabel as nib
        >>> import numpy as np
        >>> root = Path(tempfile.mkdtemp())
        >>> (root / "p1").mkdir()
        >>> image = nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4))
        >>> nib.save(image, root / "p1" / "p1_t1.nii.gz")
        >>> [(case.id, case.availability.tolist()) for case in load_cases(root, ("t1", "t2"))]
        [('p1', [True, False])]
    """
    cases, faults = find_cases(root, modalities, label=label, align=align)
    raise_faults(CaseError, faults)
    return cases if availability is None else apply_availability(cases, availability)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # the path is too long, or has a NUL
        return False


def _examine(
    folder: FoundFolder,
    modalities: tuple[str, ...],
    label: str | None,
    align: Align,
    notes: Notes,
) -> tuple[Case, list[str]]:
    """The case in a folder, and its faults."""
    path = folder.path
    # Tables and file systems differ in how they write letters with accents.
    name = unicodedata.normalize(
        "NFC", path.resolve().name if path.name in ("", "..") else path.name
    )
    faults = []
    if one_line(name) != name:
        faults.append(
            f"case {name}: the name of the folder is not UTF-8, or has control characters, expected a "
            "name that tables can hold; rename the folder"
        )
    size = len(os.fsencode(name))
    if size > _LONGEST_NAME:
        faults.append(
            f"case {name}: the name has {size} bytes, expected at most {_LONGEST_NAME}, because outputs "
            "are named after the case; rename the folder"
        )
    found = _assign(folder.files, modalities if label is None else (*modalities, label))
    for key, matches in found.items():
        if len(matches) > 1:
            faults.append(
                f"case {name}: {len(matches)} files for {key!r} ({', '.join(matches)}); "
                "keep one per folder"
            )
    files = {m: path / found[m][0] for m in modalities if m in found}
    labels = [] if label is None else found.get(label, [])
    case = Case(
        name, modalities, files=files, label=path / labels[0] if labels else None, align=align
    )
    if files:
        return case, [*faults, *case.header_faults(notes)]
    faults.append(
        f"case {name}: no modality; expected a file like {_pattern(modalities)}, found "
        f"{', '.join(folder.files) or 'nothing'}; add a file or remove the folder"
    )
    return case, faults


def _pattern(modalities: Sequence[str]) -> str:
    return " or ".join(f"*{name}.nii.gz" for name in modalities)


def _assign(files: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    """Which of ``names``, modalities and the label, each file belongs to; others are left out."""
    found: dict[str, list[str]] = {name: [] for name in names}
    for file in files:
        stem = unicodedata.normalize("NFC", file).lower()
        stem = stem.removesuffix(".gz").removesuffix(".nii")
        tokens = [
            (len(token), name)
            for name in names
            for token in file_tokens(name)
            if stem == token or stem.endswith((f"_{token}", f"-{token}"))
        ]
        if tokens:
            found[max(tokens)[1]].append(file)
    return {name: matches for name, matches in found.items() if matches}
