"""The whole check of one case, before long work starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor

from prism_meta.data.cases import Case, Volume
from prism_meta.data.labels import LabelSet
from prism_meta.data.preprocessing import Preprocessing, label_classes
from prism_meta.errors import CaseError


@dataclass(frozen=True)
class Checked:
    """The result of ``check_case``.

    Args:
        faults: one message per fault.
        volume: what could be read of the case; None if that is nothing.
        classes: (D, H, W) uint8 class indices of the label; None if it was not read or has other values.
    """

    faults: tuple[str, ...]
    volume: Volume | None = None
    classes: Tensor | None = None


def check_case(
    case: Case, *, preprocessing: Preprocessing, labels: LabelSet | None = None
) -> Checked:
    """Read a case completely and return its faults, without preprocessing it.

    It finds what ``Case.read`` and ``prepare`` would raise: damaged files, voxels that are not finite, a
    grid that does not fit into memory, label values that are not in the label set, and an empty image.
    If a file is at fault, the others are read nevertheless, so that their faults are found, too.

    Args:
        case: the case.
        preprocessing: of the model.
        labels: label set of the case. Defaults to None, which ignores the label file.

    Example:
        >>> from pathlib import Path
        >>> case = Case("p1", ("t1",), files={"t1": Path("t1.nii.gz")})
        >>> checked = check_case(case, preprocessing=Preprocessing())
        >>> [fault.split(" (")[0] for fault in checked.faults]
        ['case p1: t1.nii.gz cannot be read as NIfTI']
    """
    faults: list[str] = []
    if labels is None:
        case = replace(case, label=None)
    elif case.label is None:
        faults.append(no_label(case))
    volume = classes = None
    with _collected(faults):
        volume = case.read()
    if volume is None:
        case = _readable(case, faults)
        if case.files:
            with _collected(faults):
                volume = case.read()
    if volume is not None:
        faults += brain_faults(case, volume, preprocessing, labels)
        if labels is not None and volume.label is not None:
            with _collected(faults):
                classes = label_classes(volume, labels)
    return Checked(tuple(dict.fromkeys(faults)), volume, classes)


def brain_faults(
    case: Case, volume: Volume, preprocessing: Preprocessing, labels: LabelSet | None
) -> list[str]:
    """The faults of a case that show on the model's grid: it is too large, or empty."""
    faults: list[str] = []
    with _collected(faults):
        preprocessing.check_size(volume, num_classes=1 if labels is None else len(labels.names))
        if not preprocessing.brain(volume).any():
            faults.append(no_brain(case))
    return faults


def no_label(case: Case) -> str:
    """The fault of a case without a label file."""
    return f"case {case.id}: no label file; training and evaluation need one, add it or remove the case"


def no_brain(case: Case) -> str:
    """The fault of a case whose images are empty."""
    names = ", ".join(dict.fromkeys(path.name for path in case.files.values()))
    return f"case {case.id}: all voxels are 0 in {names}; restore the files or remove the case"


@contextmanager
def _collected(faults: list[str]) -> Iterator[None]:
    try:
        yield
    except CaseError as error:
        faults.extend(error.faults)


def _readable(case: Case, faults: list[str]) -> Case:
    """The case with those of its files that can be read and lie on one grid; adds faults of the others."""
    kept = replace(case, files={}, label=None, grid=None)
    for name, file in case.files.items():
        single, more = (
            replace(kept, files={name: file}),
            replace(kept, files={**kept.files, name: file}),
        )
        with _collected(faults):
            single.read()
            if not more.header_faults():
                kept = more
    if case.label is not None and kept.files:
        labelled = replace(kept, label=case.label)
        with _collected(faults):
            labelled.read()
            kept = labelled
    return kept
