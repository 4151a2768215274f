"""The whole check of one case, before long work starts."""

from __future__ import annotations

from prism_meta.data.cases import Case
from prism_meta.data.labels import LabelSet
from prism_meta.data.preprocessing import Preprocessing, label_classes
from prism_meta.errors import CaseError


def case_faults(
    case: Case, *, preprocessing: Preprocessing, labels: LabelSet | None = None
) -> list[str]:
    """Read a case completely and return its faults, without preprocessing it.

    It finds what ``Case.read`` and ``Preprocessing`` would raise: damaged files, voxels that are not
    finite, a grid that does not fit into memory, and label values that are not in the label set.

    Args:
        case: the case.
        preprocessing: of the model.
        labels: label set of the case. Defaults to None, which ignores the label file.

    Returns:
        One message per fault.

    Example:
        >>> from pathlib import Path
        >>> case = Case("p1", ("t1",), files={"t1": Path("t1.nii.gz")})
        >>> [fault.split(" (")[0] for fault in case_faults(case, preprocessing=Preprocessing())]
        ['case p1: t1.nii.gz cannot be read as NIfTI']
    """
    faults = []
    if labels is not None and case.label is None:
        faults.append(f"case {case.id}: no label file; add it or remove the case")
    try:
        volume = case.read(with_label=labels is not None)
        preprocessing.check_size(volume, num_classes=1 if labels is None else len(labels.names))
        if labels is not None and volume.label is not None:
            label_classes(volume, labels)
    except CaseError as error:
        faults.extend(error.faults)
    return faults
