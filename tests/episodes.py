"""Episodes of small synthetic cases."""

from __future__ import annotations

from typing import Any

from prism_meta.data.cache import CachedCase
from prism_meta.data.episodes import Episodes
from prism_meta.data.preprocessing import Preprocessing

#: The synthetic cases have voxels of 1 mm.
OWN_GRID = Preprocessing((1.0, 1.0, 1.0))


def episodes(pool: list[CachedCase], **options: Any) -> Episodes:
    given: dict[str, Any] = {"patch": (8, 9, 10), "batch_size": 4, "steps": 12, **options}
    return Episodes(pool, **given)
