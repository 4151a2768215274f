"""Faults of cases: those that headers tell, and those that show while a case is predicted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from prism_meta.data.cases import Case
from prism_meta.data.checks import no_label
from prism_meta.errors import CaseError


def evaluation_faults(cases: Sequence[Case]) -> list[str]:
    """What makes cases unfit to be evaluated, as far as headers tell. Reads no voxels."""
    faults: list[str] = []
    for case in cases:
        faults += case.header_faults() if case.label else [no_label(case)]
    return faults


@contextmanager
def memory_as_case_error(case: Case) -> Iterator[None]:
    """Name the case if there is not enough memory for it, so that the other cases can go on.

    Raises:
        CaseError: memory ran out within the context.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise CaseError(
            f"case {case.id}: needs more memory than is free; predict it on a machine with more "
            "memory, or crop its files"
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether there was not enough memory, on any device.

    Example:
        >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("shape"))
        (True, False)
    """
    # PyTorch has an exception of its own for GPUs; on the CPU only the text tells.
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "can't allocate memory" in str(error)


def check_finite(logits: Tensor, case: Case) -> None:
    """Refuse output without a most probable class, which would otherwise pass for background.

    Raises:
        CaseError: a value is NaN or infinite.

    Example:
        >>> check_finite(torch.tensor([0.0, torch.nan]), Case("p1", ("t1",), files={}))
        Traceback (most recent call last):
        ...
        prism_meta.errors.CaseError: case p1: the model's output is not finite; check the intensities ...
    """
    # The sum takes a fifth of the time of isfinite; it can overflow where every value is finite.
    if not logits.sum().isfinite() and not logits.isfinite().all():
        raise CaseError(
            f"case {case.id}: the model's output is not finite; check the intensities of the case, "
            "or train the model again"
        )
