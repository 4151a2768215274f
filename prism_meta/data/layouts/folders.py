"""A folder per case, with files named after their modality, as in BraTS."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from prism_meta.data.availability import apply_availability
from prism_meta.data.cases import Case
from prism_meta.errors import CaseError, raise_faults
from prism_meta.modalities import ALIASES, BRATS

_SUFFIXES = (".nii.gz", ".nii")


def load_cases(
    root: Path | str,
    modalities: Sequence[str] = BRATS,
    *,
    label: str = "seg",
    availability: Path | str | None = None,
) -> list[Case]:
    """Find the cases in a folder that has one subfolder per case. Reads headers, but no voxels.

    A file belongs to modality ``flair`` if it is named ``flair.nii.gz`` or ends in
    ``_flair.nii.gz`` or ``-flair.nii.gz`` (BraTS 2018-2021). Uncompressed files (``.nii``), upper-case
    names and the names of BraTS 2023 (``-t1n``, ``-t1c``, ``-t2f``, ``-t2w``) are accepted, too.

    Args:
        root: the folder. It may also be the folder of a single case.
        modalities: names of the M modalities, in the model's order.
        label: name of the label files, matched like a modality. Defaults to ``seg``.
        availability: CSV file of the modalities to use, see ``read_availability``. Defaults to all
            modalities that have a file.

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
    root = Path(root)
    modalities = tuple(modalities)
    if not root.is_dir():
        raise CaseError(f"{root}: no such folder; give a folder with one folder per case")
    pattern = " or ".join(f"*{name}.nii.gz" for name in modalities)
    cases: list[Case] = []
    faults: list[str] = []
    for folder, names in _case_folders(root):
        case_id = folder.resolve().name if folder.name in ("", "..") else folder.name
        found = {m: _matching(names, m) for m in modalities}
        labels = _matching(names, label)
        for name, matches in [*found.items(), (label, labels)]:
            if len(matches) > 1:
                faults.append(
                    f"case {case_id}: {len(matches)} files for {name!r} ({', '.join(matches)}); "
                    "keep one per folder"
                )
        files = {m: folder / matches[0] for m, matches in found.items() if matches}
        if files:
            label_file = folder / labels[0] if labels else None
            cases.append(Case(case_id, modalities, files=files, label=label_file))
        elif folder != root:
            faults.append(
                f"case {case_id}: no modality; expected a file like {pattern}, found "
                f"{', '.join(names) or 'nothing'}; add a file or remove the folder"
            )
    if not cases and not faults:
        faults.append(f"{root}: no case found; expected folders with files like {pattern}")
    ids = [case.id for case in cases]
    for name in sorted({i for i in ids if ids.count(i) > 1}):
        faults.append(f"case {name}: {ids.count(name)} folders of this name; rename all but one")
    for case in cases:
        faults.extend(case.header_faults())
    raise_faults(CaseError, faults)
    cases.sort(key=lambda case: case.id)
    return cases if availability is None else apply_availability(cases, availability)


def _case_folders(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield each folder with NIfTI files or without subfolders, and the names of its NIfTI files."""

    def raise_unreadable(error: OSError) -> None:
        raise CaseError(
            f"{error.filename}: cannot be read ({(error.strerror or str(error)).lower()}); "
            "make the folder readable"
        )

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=raise_unreadable):
        subfolders[:] = sorted(n for n in subfolders if not n.startswith("."))
        nifti = sorted(n for n in names if not n.startswith(".") and n.lower().endswith(_SUFFIXES))
        if nifti or not subfolders:
            yield Path(folder), nifti


def _matching(names: Sequence[str], modality: str) -> list[str]:
    """The file names that belong to ``modality``."""
    tokens = tuple(t.lower() for t in (modality, *ALIASES.get(modality, ())))
    ends = tuple(f"{separator}{t}" for t in tokens for separator in "_-")

    def matches(name: str) -> bool:
        stem = name.lower().removesuffix(".gz").removesuffix(".nii")
        return stem in tokens or stem.endswith(ends)

    return [name for name in names if matches(name)]
