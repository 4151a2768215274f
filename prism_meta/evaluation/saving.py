"""Predicted labels and maps as NIfTI files on the grid of their case, and the volumes of their regions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from numpy.typing import NDArray

from prism_meta.data.cases import Case
from prism_meta.data.labels import LabelSet
from prism_meta.files import atomic

#: Header fields that say where the voxels lie. NIfTI-1 and NIfTI-2 have the same names for them.
_PLACE = (
    "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "sform_code", "srow_x", "srow_y", "srow_z", "xyzt_units",
)  # fmt: skip


def save_labels(
    path: Path | str, labels: NDArray[np.integer[Any]], case: Case, *, origin: str = ""
) -> None:
    """Write a label volume that lies where the case's files lie, for every program.

    Programs differ in which of the two affines of a header they use, and in what they do if its code is
    0. So the fields of the header are copied as they are: a code of 0 stays 0.

    Args:
        path: NIfTI file to write.
        labels: (D, H, W), in the values of the label files; the file keeps their type.
        case: the case that the labels were predicted from.
        origin: what they were made from, as ``saved_origin`` tells; at most 79 ASCII characters.

    Raises:
        OutputError: the file cannot be written.
    """
    _save(path, labels, case, origin)


def save_maps(
    path: Path | str, maps: NDArray[np.floating[Any]], case: Case, *, origin: str = ""
) -> None:
    """Write maps of numbers that lie where the case's files lie; see ``save_labels``.

    Args:
        path: see ``save_labels``.
        maps: (D, H, W), or (C, D, H, W) for C channels, which are the fourth axis of the file. They are
            written as float32.
        case: see ``save_labels``.
        origin: see ``save_labels``.

    Raises:
        OutputError: the file cannot be written.
    """
    values = np.moveaxis(maps, 0, -1) if maps.ndim == 4 else maps
    _save(path, values.astype(np.float32), case, origin)


def _save(path: Path | str, values: NDArray[Any], case: Case, origin: str) -> None:
    source = _source(case).header
    image = nib.Nifti1Image(values, None)
    for name in _PLACE:
        image.header[name] = source[name]
    image.header["pixdim"][:4] = source["pixdim"][:4]  # the first is part of the qform
    image.header["descrip"] = origin
    try:
        image.header.get_xyzt_units()
    except KeyError:  # a code that NIfTI does not know
        image.header.set_xyzt_units("mm")
    with atomic(path) as partial:
        nib.save(image, partial)


def saved_origin(path: Path | str) -> str:
    """The ``origin`` of a file that was written here; empty if there is none or it cannot be read."""
    try:
        header: Any = nib.load(path).header
        return str(header["descrip"].item().decode("ascii"))
    except (OSError, ValueError, KeyError, EOFError, ImageFileError):
        return ""


def region_volumes(
    labels: NDArray[np.integer[Any]], case: Case, label_set: LabelSet
) -> dict[str, float]:
    """The volume of each region of a label volume, in ml.

    Args:
        labels: (D, H, W), in the values of the label files.
        case: its affine gives the size of a voxel.
        label_set: the regions and the values of their classes.
    """
    voxel = abs(float(np.linalg.det(_source(case).affine[:3, :3]))) / 1000  # mm^3 to ml
    return {
        region: voxel * int(np.isin(labels, [label_set.values[name] for name in classes]).sum())
        for region, classes in label_set.regions.items()
    }


def _source(case: Case) -> Any:
    """The image that gives the grid of a case; ``nib.load``'s result has no useful type."""
    return nib.load(case.reference)
