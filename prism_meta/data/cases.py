"""A case: its files, and its voxels once they are read.

A modality without a file is missing. Nothing is read for it, and no placeholder replaces it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
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

from prism_meta.errors import CaseError, raise_faults

#: Exceptions of nibabel, gzip and zlib for damaged files. RGB voxels raise TypeError.
_UNREADABLE = (
    ImageFileError, HeaderDataError, OSError, EOFError, ValueError, TypeError, zlib.error
)  # fmt: skip


@dataclass(frozen=True)
class Volume:
    """The voxels of a case, on the case's own grid.

    Args:
        images: modality -> (D, H, W) float32. It has only the modalities that were read.
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
        files: modality -> file. It has only the modalities that exist.
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


def _open(path: Path) -> Any:
    """``nib.load``, whose result has no useful type."""
    return nib.load(path)
