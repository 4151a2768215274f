"""Cases that cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from niftis import cut

from broken import Broken, whole


def _truncated(folder: Path) -> Sequence[object]:
    root = whole.cases(folder)
    cut(root / "p1" / "p1_t1.nii.gz")
    return whole.train(folder, root)


BROKEN = [
    Broken("a truncated image", _truncated, ("case p1: p1_t1.nii.gz", "restore it or remove it")),
]
