"""Imports learn2learn; the tests of its integration are skipped if it is not installed."""

from __future__ import annotations

from typing import Any

import pytest

from prism_meta.integrations import MissingPackageError
from prism_meta.integrations.learn2learn.upstream import INSTALL, learn2learn

try:
    l2l: Any = learn2learn()
except MissingPackageError:
    l2l = None

needs_learn2learn = pytest.mark.skipif(l2l is None, reason=f"needs learn2learn: {INSTALL}")
