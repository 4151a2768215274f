"""A case: its files, and its voxels once they are read.

A modality without a file is missing. Nothing is read for it, and no placeholder replaces it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prism_meta.data.grids import TOLERANCE, Align, Notes, distance, overlap, resample, voxel_sizes
from prism_meta.data.memory import excess
from prism_meta.data.nifti import NiftiError, NiftiHeader, read_header, read_voxels
from prism_meta.errors import CaseError, Fault, raise_faults

#: Voxels of an image: float32, or float64 if the file has values that float32 cannot hold.
ImageArray: TypeAlias = NDArray[np.float32] | NDArray[np.float64]


@dataclass(frozen=True)
class Volume:
    """The voxels of a case, on the case's own grid.

    Args:
        images: modality -> (D, H, W) float32, or float64 if the file has 32-bit integers, float64 or
            scaled voxels. It has only the modalities that were read.
        affine: (4, 4), from voxel indices to mm.
        shape: (D, H, W).
        label: (D, H, W) with the values of the label file. Defaults to None.
        name: of the case, for messages. Defaults to "volume".
        label_name: of the label file, for messages. Defaults to "label".
    """

    images: Mapping[str, ImageArray]
    _: KW_ONLY
    affine: NDArray[np.float64]
    shape: tuple[int, int, int]
    label: NDArray[Any] | None = None
    name: str = "volume"
    label_name: str = "label"

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size in mm along each axis."""
        return voxel_sizes(self.affine)


@dataclass(frozen=True)
class Case:
    """One case (usually a patient): its files, one per modality that exists.

    Args:
        id: name of the case.
        modalities: names of all M modalities, in the model's order.
        files: modality -> file. It has only the modalities that exist.
        label: the label file. Defaults to None, a case without labels.
        channels: modality -> channel of its file, for modalities that share one 4-D file. The others
            have a 3-D file of their own.
        site: the hospital or scanner that the case comes from. Defaults to None, unknown.
        patient: whose case it is; a patient can have several. Defaults to the id.
        align: what happens to a file that is more than a tenth of a voxel off the grid of the first:
            ``"refuse"``, the default, makes it a fault; ``"resample"`` brings all onto one grid.
        grid: the file of that grid. Defaults to the label, or to the first modality without a label.
            ``restrict`` keeps it, so the grid does not depend on the modalities that are shown.

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
    channels: Mapping[str, int] = field(default_factory=dict)
    site: str | None = None
    patient: str = ""
    align: Align = "refuse"
    grid: Path | None = None

    def __post_init__(self) -> None:
        if not self.patient:
            object.__setattr__(self, "patient", self.id)

    @property
    def availability(self) -> Tensor:
        """Which modalities exist: bool (M,)."""
        return torch.tensor([name in self.files for name in self.modalities])

    def restrict(self, shown: Tensor | Sequence[bool]) -> Case:
        """Return the case without the files of the modalities that ``shown``, bool (M,), excludes."""
        keep = {name for name, s in zip(self.modalities, shown, strict=True) if s}
        files = {n: f for n, f in self.files.items() if n in keep}
        kept = self.align == "resample" and self.files
        return replace(self, files=files, grid=self.reference if kept else self.grid)

    @property
    def reference(self) -> Path:
        """The file on whose grid the case is read, and its predictions are saved."""
        first = next(iter(self.files.values()))
        return first if self.align == "refuse" else self.grid or self.label or first

    def header_faults(self, notes: Notes | None = None) -> list[str]:
        """Check the headers of the files and return the faults found. Reads no voxels.

        Args:
            notes: receives what is odd about the files, but no fault. Defaults to None.
        """
        faults: list[str] = []
        headers = self._headers(self._paths(with_label=True), faults)
        if notes is not None:
            self._note(headers, notes)
        return faults

    def read(self, *, with_label: bool = True) -> Volume:
        """Read the voxels of every modality that exists, and of the label.

        Compressed files are read to their end, so that the checksum is tested. All volumes are on the
        grid of ``reference``.

        Args:
            with_label: False skips the label file. Defaults to True.

        Raises:
            CaseError: a file cannot be read, the grids differ, or an image has NaN or infinite
                voxels (all faults of the case together).
        """
        if not self.files:
            raise CaseError(f"case {self.id}: no modality to read; keep at least one")
        faults: list[str] = []
        wanted = self._paths(with_label=with_label)
        headers = self._headers(wanted, faults)
        raise_faults(CaseError, faults)
        first = next(iter(headers.values()))
        problem = excess(8 * sum(math.prod(h.stored_shape) for h in [first, *headers.values()]))
        if problem:
            raise CaseError(
                f"case {self.id}: {problem}; resample its files to a coarser grid or remove modalities"
            )
        images: dict[str, ImageArray] = {}
        label = None
        for path in wanted:
            header = headers[path]
            try:
                stored = read_voxels(path, header)
                if path == self.label:
                    label = _on_grid(stored, header, first, nearest=True)
                    continue
                for name in [name for name, file in self.files.items() if file == path]:
                    one = stored if header.channels == 1 else stored[..., self.channels[name]]
                    images[name] = _on_grid(_as_image(one), header, first)
            except NiftiError as error:
                faults.append(self._message(path, error))
        raise_faults(CaseError, faults)
        return Volume(
            images,
            affine=first.affine,
            shape=first.shape,
            label=label,
            name=f"case {self.id}",
            label_name="label" if self.label is None else self.label.name,
        )

    def _paths(self, *, with_label: bool) -> list[Path]:
        """The files, each once; a file with several channels may have several modalities."""
        label = [self.label] if self.label and with_label else []
        return list(dict.fromkeys([*self.files.values(), *label]))

    def _headers(self, paths: Sequence[Path], faults: list[str]) -> dict[Path, NiftiHeader]:
        """The headers of the files on one grid, the one of the grid first; appends the faults of others."""
        headers: dict[Path, NiftiHeader] = {}
        resampled = self.align == "resample"
        for path in dict.fromkeys([self.reference, *paths] if resampled else paths):
            try:
                header = read_header(path)
                if path in paths:
                    self._check_channels(path, header)
            except NiftiError as error:
                faults.append(self._message(path, error))
                continue
            first, reference = next(iter(headers.items()), (path, header))
            problem = _grid_problem(header, first.name, reference, resampled=resampled)
            if problem is None:
                headers[path] = header
            else:
                message = f"case {self.id}: {path.name} {problem}"
                faults.append(Fault(message, *problem.arguments))
        return headers

    def _note(self, headers: Mapping[Path, NiftiHeader], notes: Notes) -> None:
        reference = next(iter(headers.values()), None)
        for path, header in headers.items():
            file = f"case {self.id}: {path.name}"
            if header.disagreement > TOLERANCE:
                notes.add(
                    "qform and sform differ by more than a tenth of a voxel, and the sform is used; "
                    "correct the header if that is the wrong one",
                    f"{file} ({header.disagreement:.3g} voxels)",
                )
            if reference is not None and not _is_on(header, reference):
                notes.add(
                    "modalities on other grids are resampled onto the grid of the label, or of the first "
                    "modality without a label",
                    file,
                )

    def _check_channels(self, path: Path, header: NiftiHeader) -> None:
        names = [name for name, file in self.files.items() if file == path and path != self.label]
        if not any(name in self.channels for name in names):
            header.check_one_channel()
        beyond = [name for name in names if self.channels.get(name, 0) >= header.channels]
        if beyond:
            raise NiftiError(
                f"has {header.channels} channels, expected {', '.join(beyond)} in channel "
                f"{', '.join(str(self.channels[name]) for name in beyond)}, counted from 0",
                "correct the table of channels, or restore the file",
            )

    def _message(self, path: Path, error: NiftiError) -> str:
        kept = " or remove it (a missing modality is allowed)" if path != self.label else ""
        return f"case {self.id}: {path.name} {error.problem}; {error.fix or f'restore it{kept}'}"


def _is_on(header: NiftiHeader, reference: NiftiHeader) -> bool:
    """Whether a file lies on a grid, up to the tolerance."""
    if header is reference:
        return True
    same = header.shape == reference.shape
    return same and distance(header.shape, header.affine, reference.affine) <= TOLERANCE


def _grid_problem(
    header: NiftiHeader, first: str, reference: NiftiHeader, *, resampled: bool
) -> Fault | None:
    """What keeps a file from the grid of another, named ``first``, to be read after its own name."""
    if _is_on(header, reference):
        return None
    if resampled:
        if overlap(header.shape, header.affine, reference.shape, reference.affine):
            return None
        return Fault(
            f"lies beside {first} and shares no voxel with it; correct the affine in its header, or "
            "remove it"
        )
    fix = 'resample them to one grid, or use align = "resample"'
    if header.shape != reference.shape:
        found = f"has shape {header.shape}, but {first} has {reference.shape}"
    else:
        off = distance(header.shape, header.affine, reference.affine)
        found = f"lies up to {off:.3g} voxels off the grid of {first}, expected at most {TOLERANCE}"
    return Fault(f"{found}; {fix}", "align")


def _on_grid(
    voxels: ImageArray, header: NiftiHeader, reference: NiftiHeader, *, nearest: bool = False
) -> ImageArray:
    if _is_on(header, reference):
        return voxels
    return resample(
        voxels, header.affine, shape=reference.shape, reference=reference.affine, nearest=nearest
    )


def _as_image(stored: NDArray[Any]) -> ImageArray:
    """Voxels as float32 if it holds all their values, otherwise as float64.

    Raises:
        NiftiError: voxels are NaN or infinite.
    """
    image: ImageArray
    if np.can_cast(stored.dtype, np.float32):
        image = stored.astype(np.float32, copy=False)
    else:
        with np.errstate(over="ignore"):  # extended precision
            image = stored.astype(np.float64, copy=False)
    bad = int(image.size - np.isfinite(image).sum())
    if bad:
        raise NiftiError(
            f"has {bad} voxels that are NaN or infinite",
            "repair the file or remove it (a missing modality is allowed)",
        )
    return image
