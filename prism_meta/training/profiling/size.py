"""The size of a typical case, which a profile predicts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prism_meta.data.axes import slice_axis
from prism_meta.data.cases import Case
from prism_meta.data.nifti import NiftiError, read_header
from prism_meta.errors import PrismError
from prism_meta.training.profiling.prediction import CaseSize
from prism_meta.training.run import Run
from prism_meta.training.setup.cases import find_configured

#: The volumes of BraTS in mm, for runs whose cases are not there any more.
BRATS_MM = (240.0, 240.0, 155.0)


def typical_size(run: Run) -> CaseSize:
    """The median size of the cases that a run held out, or of its training cases, by their headers.

    A prediction leaves the empty border of a volume out, so most take less time than this one. If no header
    can be read, the size is that of a BraTS volume.
    """
    spacing = np.array(run.config.data.spacing)
    kind = "held-out" if run.facts["test"] else "training"
    names = set(run.facts["test"] or run.facts["train"])
    cases: list[Case] = []
    if run.facts["data"] is not None:
        with suppress(PrismError):
            found, _ = find_configured(run.config, Path(run.facts["data"]), label=False)
            cases = [case for case in found if case.id in names]
    sizes = [size for size in map(_size, cases) if size is not None]
    if not sizes:
        return _voxels(BRATS_MM, spacing, "a BraTS volume, because no header of a case can be read")
    source = f"median of {len(sizes)} {kind} case{'s' if len(sizes) > 1 else ''}"
    return _voxels(np.median(sizes, 0).tolist(), spacing, source)


def _size(case: Case) -> list[float] | None:
    """The size of a case in mm, the slices last."""
    for path in case.files.values():
        with suppress(NiftiError):
            header = read_header(path)
            through = slice_axis(header.shape, header.affine)
            order = [axis for axis in range(3) if axis != through] + [through]
            return [header.shape[axis] * header.spacing[axis] for axis in order]
    return None


def _voxels(mm: Sequence[float], spacing: NDArray[np.float64], source: str) -> CaseSize:
    return CaseSize(tuple(max(1, round(n)) for n in (np.array(mm) / spacing).tolist()), source)
