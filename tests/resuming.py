"""An interrupted training that was resumed has the files of an uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import pytest

import prism_meta as pm
from prism_meta.training.stopping import TrainingStopped


def assert_resumed_equals(
    whole: Path, cases: Path, config: pm.Config, cut: Path, *, calls: int
) -> None:
    """Train like the run ``whole`` in ``cut``, stop at this call of ``should_stop``, resume, and compare.

    It is asked after each case that is prepared, then after each step.
    """
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == calls

    with pytest.raises(TrainingStopped):
        pm.train(cases, config, out=cut, progress=False, should_stop=should_stop)
    pm.train(cases, out=cut, resume=True, progress=False)
    for name in ("weights/last.safetensors", "metrics.jsonl"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
