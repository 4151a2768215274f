"""Predicted labels as NIfTI files on the grid of their case, and the volumes of their regions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from prism_meta.data.cases import Case
from prism_meta.data.labels import LabelSet
from prism_meta.files import atomic


def save_labels(path: Path | str, labels: NDArray[np.integer[Any]], case: Case) -> None:
    """Write a label volume with the affine and the coordinate codes of the case's files.

    Args:
        path: NIfTI file to write.
        labels: (D, H, W), in the values of the label files; the file keeps their type.
        case: the case that the labels were predicted from.

    Raises:
        OutputError: the file cannot be written.
    """
    source = _source(case)
    image = nib.Nifti1Image(labels, source.affine)
    if isinstance(source.header, nib.Nifti1Header):
        for kind in ("sform", "qform"):
            # A header may have one good affine, which is used, and another that makes no sense.
            try:
                affine, code = getattr(source, f"get_{kind}")(coded=True)
                if affine is not None:
                    getattr(image, f"set_{kind}")(affine, code=int(code))
            except (ValueError, HeaderDataError):
                continue
        try:
            image.header.set_xyzt_units(*source.header.get_xyzt_units())
        except KeyError:  # a code that NIfTI does not know
            image.header.set_xyzt_units("mm")
    with atomic(path) as partial:
        nib.save(image, partial)


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
    return nib.load(next(iter(case.files.values())))
