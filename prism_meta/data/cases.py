"""Cases on disk: finding their files and reading them.

A modality without a file is missing. Nothing is read for it, and no placeholder replaces it.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray
from torch import Tensor

from prism_meta.data.availability import apply_availability
from prism_meta.errors import CaseError, raise_faults
from prism_meta.modalities import BRATS

_SUFFIXES = (".nii.gz", ".nii")
#: Other names of the modalities in file names, e.g. those of BraTS 2023 and later.
_ALIASES = {"t1": ("t1n",), "t1ce": ("t1c", "t1gd"), "flair": ("t2f",), "t2": ("t2w",)}
#: Exceptions of nibabel, gzip and zlib for damaged files. RGB voxels raise TypeError.
_UNREADABLE = (
    ImageFileError, HeaderDataError, OSError, EOFError, ValueError, TypeError, zlib.error
)  # fmt: skip


@dataclass(frozen=True)
class Volume:
    """The voxels of a case, on the case's own grid.

    Args:
        images: modality -> (D, H, W) float32, for the modalities that were read.
        affine: (4, 4), from voxel indices to mm.
        shape: (D, H, W).
        label: (D, H, W) with the values of the label file. Defaults to None.
    """

    images: dict[str, NDArray[np.float32]]
    _: KW_ONLY
    affine: NDArray[np.float64]
    shape: tuple[int, int, int]
    label: NDArray[Any] | None = None

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size in mm along each axis."""
        return tuple(float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))


@dataclass(frozen=True)
class Case:
    """One case (usually a patient): its files, one per modality that exists.

    Args:
        id: name of the case.
        modalities: names of all M modalities, in the model's order.
        files: modality -> file, for the modalities that exist.
        label: the label file. Defaults to None, a case without labels.

    Example:
        >>> case = Case("p1", ("flair", "t1"), files={"t1": Path("p1/t1.nii.gz")})
        >>> case.availability
        tensor([False,  True])
    """

    id: str
    modalities: tuple[str, ...]
    _: KW_ONLY
    files: Mapping[str, Path]
    label: Path | None = None

    @property
    def availability(self) -> Tensor:
        """Which modalities exist: bool (M,)."""
        return torch.tensor([name in self.files for name in self.modalities])

    def restrict(self, shown: Tensor | Sequence[bool]) -> Case:
        """Return the case without the files of the modalities that ``shown``, bool (M,), excludes."""
        keep = {name for name, s in zip(self.modalities, shown, strict=True) if s}
        return replace(self, files={n: f for n, f in self.files.items() if n in keep})

    def header_faults(self) -> list[str]:
        """Check the headers of the files and return the faults found. Reads no voxels."""
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
                    f"case {self.id}: {path.name} has an invalid affine (its voxels have no "
                    "volume); set its voxel sizes and axes"
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
        """Read the voxels of every modality that exists, and of the label.

        Args:
            with_label: False skips the label file. Defaults to True.

        Raises:
            CaseError: a file cannot be read, the grids differ, or an image has NaN or infinite
                voxels (all faults of the case together).
        """
        if not self.files:
            raise CaseError(f"case {self.id}: no modality to read; keep at least one")
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
        affine = np.asarray(first.affine, np.float64)
        return Volume(images, affine=affine, shape=(d, h, w), label=label)

    def _unreadable(self, path: Path, error: Exception) -> str:
        """The message for a file that nibabel cannot read."""
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
    tokens = tuple(t.lower() for t in (modality, *_ALIASES.get(modality, ())))
    ends = tuple(f"{separator}{t}" for t in tokens for separator in "_-")

    def matches(name: str) -> bool:
        stem = name.lower().removesuffix(".gz").removesuffix(".nii")
        return stem in tokens or stem.endswith(ends)

    return [name for name in names if matches(name)]


def _open(path: Path) -> Any:
    """``nib.load``, whose result has no useful type."""
    return nib.load(path)
