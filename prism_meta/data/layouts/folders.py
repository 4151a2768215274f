"""The cases in a folder, or in a manifest, whatever layout they have."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from prism_meta.data.availability import apply_availability
from prism_meta.data.cases import Case
from prism_meta.data.grids import Align
from prism_meta.data.layouts.base import Found, Layout
from prism_meta.data.layouts.bids import Bids
from prism_meta.data.layouts.case_folders import CaseFolders
from prism_meta.data.layouts.decathlon import Decathlon
from prism_meta.data.layouts.flat import Flat
from prism_meta.data.layouts.manifest import Manifest
from prism_meta.data.layouts.names import FileNames
from prism_meta.data.layouts.nnunet import NnUNet
from prism_meta.errors import CaseError, Fault, one_line, raise_faults
from prism_meta.modalities import BRATS

_log = logging.getLogger(__name__)
#: The layouts, in the order in which they are tried. The last one is taken if no other matches.
LAYOUTS: tuple[Layout, ...] = (Manifest(), NnUNet(), Decathlon(), Bids(), Flat(), CaseFolders())
#: Names of the layouts for ``find`` and ``data.layout``.
LAYOUT_NAMES = tuple(layout.name for layout in LAYOUTS)


def find(root: Path | str, names: FileNames, *, layout: str | None = None) -> Found:
    """Find the cases of a data set, and what is said of them. Reads headers, but no voxels.

    Args:
        root: a folder, or a manifest; see ``load_cases``.
        names: names of the modalities, the label and their files.
        layout: name of a layout. Defaults to None: the first that matches.

    Raises:
        ConfigError: there is no layout of this name.
    """
    found = search(root, names, layout=layout)
    for line in names.notes.lines():
        _log.warning("%s", one_line(line))
    return found


def search(root: Path | str, names: FileNames, *, layout: str | None = None) -> Found:
    """The same as ``find``, but nothing is logged of ``names.notes``."""
    root = Path(root)
    return _layout(root, names, layout).find(root, names)


def _layout(root: Path, names: FileNames, layout: str | None) -> Layout:
    if layout is None:
        return next((one for one in LAYOUTS if one.matches(root, names)), LAYOUTS[-1])
    if layout not in LAYOUT_NAMES:
        message = (
            f"layout: got {layout!r}, expected one of {', '.join(LAYOUT_NAMES)}; use one of them"
        )
        raise CaseError([Fault(message, "layout")])
    return LAYOUTS[LAYOUT_NAMES.index(layout)]


def find_cases(
    root: Path | str,
    modalities: Sequence[str] = BRATS,
    *,
    label: str | None = "seg",
    layout: str | None = None,
    files: Mapping[str, Sequence[str]] | None = None,
    align: Align = "refuse",
) -> tuple[list[Case], list[str]]:
    """Find the cases in a folder, and the faults of those that cannot be used. Reads headers only.

    ``load_cases`` raises these faults. Use ``find_cases`` to go on with the other cases.

    Args:
        root: the folder, see ``load_cases``.
        modalities: names of the M modalities, in the model's order.
        label: name of the label files. None ignores them and their faults. Defaults to ``seg``.
        layout: name of the layout. Defaults to None: it is detected.
        files: patterns of the files of a modality or of the label, e.g. ``{"lge": ["*_DE*"]}``.
        align: what happens to files that lie on other grids, see ``Case``.

    Returns:
        The cases without faults, sorted by name; and the faults of the others and of the folder.

    Example:
        >>> import tempfile
        >>> cases, faults = find_cases(tempfile.mkdtemp(), ("t1",))
        >>> cases, faults[0].split(": ")[1]
        ([], 'no case found; expected folders with files like *t1.nii.gz')
    """
    names = FileNames(tuple(modalities), label, dict(files or {}), align)
    found = find(root, names, layout=layout)
    return found.cases, found.faults


def load_cases(
    root: Path | str,
    modalities: Sequence[str] = BRATS,
    *,
    label: str | None = "seg",
    availability: Path | str | None = None,
    layout: str | None = None,
    files: Mapping[str, Sequence[str]] | None = None,
    align: Align = "refuse",
) -> list[Case]:
    """Find the cases of a data set. Reads headers, but no voxels.

    The layout is detected: a folder per case (``CaseFolders``, e.g. BraTS), one folder with the files of
    all cases (``Flat``), BIDS (``Bids``), the Medical Segmentation Decathlon (``Decathlon``), nnU-Net's raw
    data (``NnUNet``), or a table of files in CSV or JSON (``Manifest``).

    A file belongs to modality ``flair`` if it is named ``flair.nii.gz`` or ends in
    ``_flair.nii.gz`` or ``-flair.nii.gz`` (BraTS 2018-2021). Uncompressed files (``.nii``), upper-case
    names and the names of other data sets (BraTS 2023: ``-t1n``, ``-t1c``, ``-t2f``, ``-t2w``) are
    accepted, too. A file that several modalities match belongs to the one with the longest name.

    Hidden folders are skipped, and so are outputs of this package with all that is below them
    (``OUTPUT_MARKS``). Symbolic links are followed, but each real folder counts once.

    Args:
        root: the folder, or the file of a manifest. It may also be the folder of a single case.
        modalities: names of the M modalities, in the model's order.
        label: name of the label files, matched like a modality. None ignores them. Defaults to
            ``seg``.
        availability: CSV file of the modalities to use, see ``read_availability``. Defaults to all
            modalities that have a file.
        layout: name of the layout, one of ``LAYOUT_NAMES``. Defaults to None: it is detected.
        files: patterns of the files of a modality or of the label, e.g. ``{"lge": ["*_DE*"]}``.
            Defaults to none.
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
    cases, faults = find_cases(
        root, modalities, label=label, layout=layout, files=files, align=align
    )
    raise_faults(CaseError, faults)
    return cases if availability is None else apply_availability(cases, availability)
