"""Modalities, their subsets, and the batch that carries both: the words all modules share."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

#: Modality order of the BraTS challenges as PRISM and PASSION use it.
BRATS: tuple[str, ...] = ("flair", "t1ce", "t1", "t2")
#: Other names of the modalities in file names, e.g. those of BraTS 2023 and later.
ALIASES = {"t1": ("t1n",), "t1ce": ("t1c", "t1gd"), "flair": ("t2f",), "t2": ("t2w",)}


@dataclass(frozen=True)
class Batch:
    """Images, what the model is shown of them, and their labels.

    Args:
        image: (B, M, *S) float; a channel that ``mask`` hides holds any value and is never used.
        mask: (B, M) bool, the modalities that the model is shown; every row has at least one.
        target: (B, *S) long, class indices.
        case_ids: names of the B cases, for messages and logs.
        valid: (B, *S) bool, False at voxels that pad a volume smaller than the patch. Losses leave them
            out. Defaults to None, all voxels.

    Raises:
        ValueError: the shapes do not fit each other.

    Example:
        >>> batch = Batch(torch.zeros(2, 4, 8, 8), torch.ones(2, 4).bool(), torch.zeros(2, 8, 8).long())
        >>> batch.to("cpu").image.shape
        torch.Size([2, 4, 8, 8])
    """

    image: Tensor
    mask: Tensor
    target: Tensor
    case_ids: tuple[str, ...] = ()
    valid: Tensor | None = None

    def __post_init__(self) -> None:
        if self.mask.dtype != torch.bool or self.mask.shape != self.image.shape[:2]:
            raise ValueError(
                f"mask: got {self.mask.dtype} {tuple(self.mask.shape)}, expected torch.bool "
                f"{tuple(self.image.shape[:2])}, the first two sizes of the image"
            )
        if self.target.shape != (self.image.shape[0], *self.image.shape[2:]):
            raise ValueError(
                f"target: got {tuple(self.target.shape)}, expected (B, *S) = "
                f"{(self.image.shape[0], *self.image.shape[2:])} for image {tuple(self.image.shape)}"
            )
        if self.valid is not None and (
            self.valid.dtype != torch.bool or self.valid.shape != self.target.shape
        ):
            raise ValueError(
                f"valid: got {self.valid.dtype} {tuple(self.valid.shape)}, expected torch.bool "
                f"{tuple(self.target.shape)}, as the target"
            )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``. A pinned batch is copied while the caller continues."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pin_memory(self) -> Batch:
        """The same batch in pinned memory, from which a GPU copies while it computes."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        image, mask, target = (change(t) for t in (self.image, self.mask, self.target))
        valid = None if self.valid is None else change(self.valid)
        return Batch(image, mask, target, self.case_ids, valid)


def subsets(num_modalities: int) -> Tensor:
    """All non-empty subsets of modalities, by size, then in modality order.

    Args:
        num_modalities: M, at least 1.

    Returns:
        bool (2^M - 1, M).

    Raises:
        ValueError: ``num_modalities`` is less than 1.

    Example:
        >>> subsets(2).int().tolist()
        [[1, 0], [0, 1], [1, 1]]
    """
    if num_modalities < 1:
        raise ValueError(f"num_modalities: got {num_modalities}, expected at least 1")
    rows = [
        [m in chosen for m in range(num_modalities)]
        for size in range(1, num_modalities + 1)
        for chosen in combinations(range(num_modalities), size)
    ]
    return torch.tensor(rows)


def subset_index(mask: Tensor) -> Tensor:
    """The place of each row of a mask among ``subsets``.

    Args:
        mask: bool (N, M); each row has at least one True.

    Returns:
        (N,) long, on the device of ``mask``.

    Example:
        >>> subset_index(torch.tensor([[True, True], [True, False]]))
        tensor([2, 0])
    """
    every = subsets(mask.shape[1]).to(mask.device)
    return (mask[:, None] == every).all(2).long().argmax(1)


def subset_name(subset: Tensor | Sequence[bool], modalities: Sequence[str]) -> str:
    """The name of one subset in tables and files.

    Args:
        subset: bool (M,).
        modalities: names of the M modalities.

    Returns:
        The names of those that are in the subset, joined by ``+``.

    Example:
        >>> subset_name([True, False, True], ("flair", "t1ce", "t1"))
        'flair+t1'
    """
    return "+".join(name for name, shown in zip(modalities, subset, strict=True) if shown)


def subset(names: str | Iterable[str], modalities: Sequence[str] = BRATS) -> Tensor:
    """The subset with these modalities, the inverse of ``subset_name``.

    Args:
        names: names joined by ``+``, or a sequence of names.
        modalities: all M modalities, in the model's order.

    Returns:
        bool (M,).

    Raises:
        ValueError: a name is unknown or given twice, or there is none.

    Example:
        >>> subset("t1+flair", ("flair", "t1ce", "t1"))
        tensor([ True, False,  True])
    """
    chosen = names.split("+") if isinstance(names, str) else list(names)
    unknown = [name for name in chosen if name not in modalities]
    if unknown:
        near = difflib.get_close_matches(unknown[0], modalities, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"subset: unknown modality {', '.join(map(repr, unknown))}, expected some of "
            f"{', '.join(modalities)}{hint}"
        )
    if not chosen or len(set(chosen)) != len(chosen):
        raise ValueError(f"subset: got {names!r}, expected different names, at least one")
    return torch.tensor([name in chosen for name in modalities])


def composed(name: str) -> str:
    r"""The form of letters with accents in which names are compared; file systems and editors differ.

    Example:
        >>> composed("Fa\u0308lle") == "F\u00e4lle"
        True
    """
    return unicodedata.normalize("NFC", name)


def file_tokens(name: str) -> tuple[str, ...]:
    """The words at the end of a file name that say that the file belongs to modality or label ``name``.

    Upper and lower case are the same, and so are the composed and decomposed forms of Unicode.

    Example:
        >>> file_tokens("T1")
        ('t1', 't1n')
    """
    folded = composed(name).lower()
    return (folded, *ALIASES.get(folded, ()))


def modality_faults(names: Sequence[str], label: str | None = None) -> list[str]:
    """Check the names of modalities and of the label: files, tables and subsets are named after them.

    Args:
        names: names of the M modalities.
        label: name of the label files. Defaults to no check of it.

    Returns:
        One message per fault.

    Example:
        >>> modality_faults(("t1", "T1"))
        ["modalities: 't1' and 'T1' mean the same files; keep one of them"]
    """
    if not names:
        return [
            "modalities: got none, expected at least one name; name the modalities of your files"
        ]
    faults = [
        f"{what}: {fault}"
        for what, name in [*(("modalities", name) for name in names), ("label", label)]
        if name is not None
        for fault in _name_faults(name)
    ]
    listed = [*names, *([] if label is None else [label])]
    for (_, first), (j, second) in combinations(enumerate(listed), 2):
        if not set(file_tokens(first)) & set(file_tokens(second)):
            continue
        if j < len(names):
            faults.append(
                f"modalities: {first!r} and {second!r} mean the same files; keep one of them"
                if first != second
                else f"modalities: {first!r} occurs twice; keep one of them"
            )
        else:
            faults.append(
                f"label: {second!r} means the same files as modality {first!r}, so the model would "
                "be shown the labels; give the label files another name"
            )
    if label is not None:
        faults.extend(
            f"label: {label!r} ends like modality {name!r}, so that label files could be taken for it; "
            "give the label files another name"
            for name in names
            if file_tokens(label)[0].endswith(_endings(name))
        )
    return list(dict.fromkeys(faults))


def _endings(name: str) -> tuple[str, ...]:
    return tuple(f"{separator}{token}" for token in file_tokens(name) for separator in "_-")


def _name_faults(name: str) -> list[str]:
    """What keeps ``name`` from being part of file names, table columns and names of subsets."""
    bad = sorted({c for c in name if c in "/\\+," or c.isspace() or not c.isprintable()})
    if not name.strip():
        return [f"got the empty name {name!r}; give the word that your file names end in"]
    if bad:
        return [
            f"{name!r} has the characters {' '.join(map(ascii, bad))}, which cannot be in file names, "
            "table columns or names of subsets; leave them out"
        ]
    if name.lower().endswith((".nii", ".nii.gz")):
        return [f"{name!r} ends in a suffix of files; leave the suffix out"]
    return []
