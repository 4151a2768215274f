"""Subsets of modalities as users give them, names such as ``flair+t1`` or booleans, and their checks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prism_meta.data.cases import Case
from prism_meta.modalities import subset_name
from prism_meta.records import Record

#: A subset of modalities: a name such as ``flair+t1``, or bool (M,).
Subset = str | Sequence[bool] | Tensor


def as_mask(subset: Subset, modalities: Sequence[str]) -> Tensor:
    """A subset as bool (M,).

    Raises:
        ValueError: a name is not one of ``modalities``.

    Example:
        >>> as_mask("flair+t1", ("flair", "t1ce", "t1")).tolist()
        [True, False, True]
    """
    if not isinstance(subset, str):
        return torch.as_tensor(subset).bool()
    names = subset.split("+") if subset else []
    unknown = [name for name in names if name not in modalities]
    if unknown:
        raise ValueError(
            f"subset: unknown modality {', '.join(unknown)}; use some of {', '.join(modalities)}"
        )
    return torch.tensor([name in names for name in modalities])


def as_masks(subsets: Tensor | Sequence[Subset], modalities: Sequence[str]) -> Tensor:
    """Several subsets as bool (S, M); see ``as_mask``."""
    if isinstance(subsets, Tensor):
        return subsets.bool()
    return torch.stack([as_mask(subset, modalities) for subset in subsets])


def shown_rows(
    case: Case, subsets: Tensor | Sequence[Subset], modalities: Sequence[str] | None
) -> Tensor:
    """The subsets as bool (S, M), each of which the case can show.

    Raises:
        ValueError: see ``check_subsets``, or the case lacks a modality of a subset.
    """
    rows = as_masks(subsets, case.modalities)
    check_subsets(case, rows, modalities)
    for shown in rows:
        if (shown & ~case.availability).any():
            raise ValueError(
                f"subset: {subset_name(shown.tolist(), case.modalities)} has modalities that case "
                f"{case.id} lacks; it has {', '.join(case.files)}"
            )
    return rows


def check_subsets(case: Case, subsets: Tensor, modalities: Sequence[str] | None) -> None:
    """Check that subsets, bool (S, M), fit a case, and the case a model.

    Args:
        case: the case.
        subsets: bool (S, M).
        modalities: names of the model's modalities; None if it does not say.

    Raises:
        ValueError: the modalities of the case are not those of the model, the shape does not fit, or a
            subset is empty.
    """
    if modalities not in (None, case.modalities):
        raise ValueError(
            f"case {case.id}: has the modalities {', '.join(case.modalities)}, but the model was "
            f"trained on {', '.join(modalities or ())}; load it with these names in this order"
        )
    if subsets.ndim != 2 or subsets.shape[1] != len(case.modalities):
        raise ValueError(
            f"subsets: got {tuple(subsets.shape)}, expected (S, {len(case.modalities)}), a column "
            f"for each of {', '.join(case.modalities)}"
        )
    if not subsets.any(1).all():
        raise ValueError("subset: got no modality, expected at least one")


def in_order(records: Sequence[Record], names: Sequence[str]) -> list[Record]:
    """Records of one case after the other, sorted subset by subset; the order of the cases is kept.

    Args:
        records: records of subsets in ``names``.
        names: names of the subsets, in order.

    Example:
        >>> records = [Record(case, s, "WT", 1, 0) for case in ("p1", "p2") for s in ("t1", "t2")]
        >>> [(r.subset, r.case) for r in in_order(records, ["t2", "t1"])]
        [('t2', 'p1'), ('t2', 'p2'), ('t1', 'p1'), ('t1', 'p2')]
    """
    place = {name: i for i, name in enumerate(names)}
    return sorted(records, key=lambda record: place[record.subset])
