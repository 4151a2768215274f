"""Cases on disk: which files there are, and reading them with clear errors.

A modality whose file is absent is missing. Nothing is read for it and nothing stands in for it.
"""

from __future__ import annotations

import csv
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray
from torch import Tensor

from prism_meta.data.masking import draw_availability
from prism_meta.errors import CaseError, raise_faults
from prism_meta.modalities import BRATS

_SUFFIXES = (".nii.gz", ".nii")
#: Other names of a modality in file names: BraTS 2023 and later.
_ALIASES = {"t1": ("t1n",), "t1ce": ("t1c", "t1gd"), "flair": ("t2f",), "t2": ("t2w",)}
#: What a damaged file raises from nibabel, gzip and zlib; TypeError comes from RGB voxels.
_UNREADABLE = (
    ImageFileError, HeaderDataError, OSError, EOFError, ValueError, TypeError, zlib.error
)  # fmt: skip


@dataclass(frozen=True)
class Volume:
    """What was read of a case, on its own grid.

    Args:
        images: modality -> (D, H, W) float32; only those that exist and were asked for.
        label: (D, H, W) as in the file, or None.
        affine: (4, 4), voxel to mm.
        shape: (D, H, W).
    """

    images: dict[str, NDArray[np.float32]]
    label: NDArray[Any] | None
    affine: NDArray[np.float64]
    shape: tuple[int, int, int]

    @property
    def spacing(self) -> tuple[float, ...]:
        """Size of a voxel in mm along each axis."""
        return tuple(float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))


@dataclass(frozen=True)
class Case:
    """One patient: files of the modalities that exist.

    Args:
        id: name of the case.
        modalities: names of all M modalities, in the model's order.
        files: modality -> file, of those that exist.
        label: the label file, if there is one.
    """

    id: str
    modalities: tuple[str, ...]
    files: Mapping[str, Path]
    label: Path | None = None

    @property
    def availability(self) -> Tensor:
        """bool (M,), which modalities exist."""
        return torch.tensor([name in self.files for name in self.modalities])

    def restrict(self, shown: Tensor | Sequence[bool]) -> Case:
        """The same case with only those of its modalities that ``shown``, (M,), has."""
        keep = {name for name, s in zip(self.modalities, shown, strict=True) if s}
        return replace(self, files={n: f for n, f in self.files.items() if n in keep})

    def header_faults(self) -> list[str]:
        """What is wrong with the files as far as their headers tell; reads no voxel."""
        faults: list[str] = []
        reference: tuple[Path, tuple[int, ...], NDArray[np.float64]] | None = None
        for path in [*self.files.values(), *([self.label] if self.label else [])]:
            try:
                image = _open(path)
            except _UNREADABLE as error:
                faults.append(self._unreadable(path, error))
                continue
            shape, affine = tuple(image.shape), np.asarray(image.affine, np.float64)
            if len(shape) == 4 and shape[3] == 1:
                shape = shape[:3]
            if len(shape) != 3 or min(shape) < 1:
                faults.append(
                    f"case {self.id}: {path.name} has shape {shape}, expected 3-D (D, H, W); "
                    "give one volume per file"
                )
            elif not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
                faults.append(
                    f"case {self.id}: {path.name} has an affine that gives its voxels no volume; "
                    "set its voxel sizes and axes"
                )
            elif reference is None:
                reference = (path, shape, affine)
            elif shape != reference[1]:
                faults.append(
                    f"case {self.id}: {path.name} has shape {shape}, but {reference[0].name} has "
                    f"{reference[1]}; resample them to one grid"
                )
            elif not np.allclose(affine, reference[2], atol=1e-2):
                faults.append(
                    f"case {self.id}: {path.name} and {reference[0].name} have different affines "
                    f"(by up to {np.abs(affine - reference[2]).max():.3g}); resample them to one grid"
                )
        return faults

    def read(self, *, with_label: bool = True) -> Volume:
        """Read the voxels of every modality that exists, and the label if there is one.

        Raises:
            CaseError: a file cannot be read, the grids differ, or a volume holds NaN or infinity.
        """
        if not self.files:
            raise CaseError(f"case {self.id}: no modality to read; show at least one")
        raise_faults(CaseError, self.header_faults())
        faults: list[str] = []
        images: dict[str, NDArray[np.float32]] = {}
        label = None
        for name, path in self.files.items():
            try:
                array = np.asarray(_open(path).dataobj, np.float32)
            except _UNREADABLE as error:
                faults.append(self._unreadable(path, error))
                continue
            bad = int(array.size - np.isfinite(array).sum())
            if bad:
                faults.append(
                    f"case {self.id}: {path.name} has {bad} voxels that are NaN or infinite; "
                    "repair the file or remove it (a missing modality is allowed)"
                )
            images[name] = array.reshape(array.shape[:3])
        if with_label and self.label:
            try:
                label = np.asarray(_open(self.label).dataobj)
                label = label.reshape(label.shape[:3])
            except _UNREADABLE as error:
                faults.append(self._unreadable(self.label, error))
        raise_faults(CaseError, faults)
        first = _open(next(iter(self.files.values())))
        d, h, w = first.shape[:3]
        return Volume(images, label, np.asarray(first.affine, np.float64), (d, h, w))

    def _unreadable(self, path: Path, error: Exception) -> str:
        reason = " ".join(str(error).split()) or type(error).__name__
        if len(reason) > 120:
            reason = reason[:117] + "..."
        kind = "label" if path == self.label else "modality"
        fix = (
            "restore it"
            if kind == "label"
            else "restore it or remove it (a missing modality is allowed)"
        )
        return f"case {self.id}: {path.name} cannot be read as NIfTI ({reason}); {fix}"


def load_cases(
    root: Path | str,
    modalities: Sequence[str] = BRATS,
    *,
    label: str = "seg",
    availability: Path | str | None = None,
) -> list[Case]:
    """Find the cases below a folder: one folder per case, files named after their modality.

    A file belongs to modality ``flair`` if its name is ``flair.nii.gz`` or ends with
    ``_flair.nii.gz`` or ``-flair.nii.gz`` (BraTS 2018-2021); ``.nii`` and any case of letters are
    taken too, and so are the names of BraTS 2023 (``-t1n``, ``-t1c``, ``-t2f``, ``-t2w``). No voxel
    is read.

    Args:
        root: the folder; a folder of one case is taken as that case.
        modalities: names of the M modalities, in the model's order.
        label: name of the label file.
        availability: CSV of which modalities to use, see ``read_availability``.

    Returns:
        The cases, sorted by name.

    Raises:
        CaseError: all faults together: no case, a case without any modality, several files for one
            modality, headers that do not fit each other, or a table that does not fit the cases.

    Example:
        >>> import tempfile
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
    for folder, names in _leaves(root):
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
            cases.append(Case(case_id, modalities, files, folder / labels[0] if labels else None))
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


def read_availability(path: Path | str, modalities: Sequence[str]) -> dict[str, tuple[bool, ...]]:
    """Read an availability table: case -> which modalities exist.

    Two forms of CSV: ``case,<modality>...`` with 0 and 1, and the published imbalanced-split table
    ``data_name,mask_id,mask,pos_mask_ids``, whose masks are in the order flair, t1ce, t1, t2.

    Args:
        path: the CSV file.
        modalities: names of the M modalities; the first form may have them in any order.

    Raises:
        CaseError: the file cannot be read, or a line does not fit, all of them together.

    Source of the second form: PASSION (Shi et al., ACM MM 2024).
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            rows = list(csv.DictReader(handle))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CaseError(f"{path}: cannot be read as an availability table ({error})") from error
    columns = set(rows[0]) if rows else set()
    published = {"data_name", "mask"} <= columns
    if not published and not {"case", *modalities} <= columns:
        raise CaseError(
            f"{path}: got the columns {', '.join(map(str, rows[0])) if rows else 'none'}; expected "
            f"case,{','.join(modalities)} or data_name,mask_id,mask,pos_mask_ids"
        )
    table: dict[str, tuple[bool, ...]] = {}
    faults: list[str] = []
    for line, row in enumerate(rows, start=2):
        if published:
            name, cells = row["data_name"], _published_mask(row["mask"] or "", modalities)
        else:
            name = row["case"]
            cells = tuple({"0": False, "1": True}.get((row[m] or "").strip()) for m in modalities)
        if cells is None or None in cells or not any(cells):
            faults.append(
                f"{path}, line {line} ({name}): expected 0 or 1 for each of {', '.join(modalities)}, "
                "at least one 1"
            )
        elif name in table:
            faults.append(f"{path}, line {line}: case {name} stands there twice; keep one line")
        else:
            table[name] = tuple(bool(c) for c in cells)
    raise_faults(CaseError, faults)
    return table


def apply_availability(cases: Sequence[Case], table: Path | str) -> list[Case]:
    """Hide the modalities that an availability table says are missing.

    Raises:
        CaseError: a case is not in the table, or the table promises a file that is not there.
    """
    rows = read_availability(table, cases[0].modalities)
    faults, restricted = [], []
    for case in cases:
        if case.id not in rows:
            faults.append(f"case {case.id}: not in {table}; add a line for it")
            continue
        promised = dict(zip(case.modalities, rows[case.id], strict=True))
        absent = [name for name, there in promised.items() if there and name not in case.files]
        if absent:
            faults.append(
                f"case {case.id}: {table} says that {', '.join(absent)} exists, but there is no such "
                "file; put 0 there"
            )
        restricted.append(case.restrict(rows[case.id]))
    raise_faults(CaseError, faults)
    return restricted


def drop_modalities(cases: Sequence[Case], rates: Sequence[float], *, seed: int) -> list[Case]:
    """Make modalities missing at these rates; a case keeps what it lacked before.

    Raises:
        CaseError: a case would keep no modality, since its files and the draw do not meet.
    """
    drawn = draw_availability(len(cases), rates, seed=seed)
    faults = [
        f"case {case.id}: missing_rates leave it no modality, for it has only "
        f"{', '.join(case.files)}; use a table (data.availability) or another seed"
        for case, row in zip(cases, drawn, strict=True)
        if not (row & case.availability).any()
    ]
    raise_faults(CaseError, faults)
    return [case.restrict(row) for case, row in zip(cases, drawn, strict=True)]


def _published_mask(text: str, modalities: Sequence[str]) -> tuple[bool | None, ...] | None:
    try:
        mask = json.loads(text.lower())
    except (ValueError, RecursionError):  # ValueError: not JSON, or a number of thousands of digits
        return None
    if not isinstance(mask, list) or len(mask) != len(BRATS) or set(modalities) - set(BRATS):
        return None
    by_name = dict(zip(BRATS, mask, strict=True))
    return tuple(by_name[m] if isinstance(by_name[m], bool) else None for m in modalities)


def _leaves(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder without subfolders, and what NIfTI files it holds; hidden names are skipped."""

    def unreadable(error: OSError) -> None:
        raise CaseError(
            f"{error.filename}: cannot be read ({(error.strerror or str(error)).lower()}); "
            "make the folder readable"
        )

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=unreadable):
        subfolders[:] = sorted(n for n in subfolders if not n.startswith("."))
        nifti = sorted(n for n in names if not n.startswith(".") and n.lower().endswith(_SUFFIXES))
        if nifti or not subfolders:
            yield Path(folder), nifti


def _matching(names: Sequence[str], modality: str) -> list[str]:
    tokens = tuple(t.lower() for t in (modality, *_ALIASES.get(modality, ())))
    ends = tuple(f"{separator}{t}" for t in tokens for separator in "_-")

    def matches(name: str) -> bool:
        stem = name.lower().removesuffix(".gz").removesuffix(".nii")
        return stem in tokens or stem.endswith(ends)

    return [name for name in names if matches(name)]


def _open(path: Path) -> Any:
    """nibabel is only half typed."""
    return nib.load(path)
