"""Prepared cases that several files draw from."""

from __future__ import annotations

import pytest
from episodes import OWN_GRID
from niftis import write_cases

from prism_meta.data.cache import CachedCase, prepare
from prism_meta.data.labels import BRATS_LABELS
from prism_meta.data.layouts.folders import load_cases

AVAILABLE = [
    [True, True, True, True],
    [True, True, True, True],
    [True, False, True, True],
    [False, True, False, False],
    [True, False, False, True],
    [False, False, True, True],
]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list[CachedCase]:
    """Six prepared cases, two of them complete."""
    root = tmp_path_factory.mktemp("episodes")
    cases = load_cases(write_cases(root / "cases", len(AVAILABLE)))
    shown = [case.restrict(row) for case, row in zip(cases, AVAILABLE, strict=True)]
    return prepare(shown, root / "cache", preprocessing=OWN_GRID, labels=BRATS_LABELS)
