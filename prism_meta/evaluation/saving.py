"""Predicted labels as NIfTI files on the grid of their case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from prism_meta.data.cases import Case
from prism_meta.files import atomic


def save_labels(path: Path | str, labels: NDArray[np.int16], case: Case) -> None:
    """Write a label volume with the affine and the coordinate codes of the case's files.

    Args:
        path: NIfTI file to write.
        labels: (D, H, W), in the values of the label files.
        case: the case that the labels were predicted from.

    Raises:
        OutputError: the file cannot be written.
    """
    source: Any = nib.load(next(iter(case.files.values())))
    image = nib.Nifti1Image(labels, source.affine)
    if isinstance(source.header, nib.Nifti1Header):
        for kind in ("sform", "qform"):
            affine, code = getattr(source, f"get_{kind}")(coded=True)
            if affine is not None:
                getattr(image, f"set_{kind}")(affine, code=int(code))
        image.header.set_xyzt_units(*source.header.get_xyzt_units())
    with atomic(path) as partial:
        nib.save(image, partial)
