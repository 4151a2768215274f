"""Settings for the whole suite, and a fixture with cases that several files train on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from niftis import write_cases

# The tests are many small operations, which a second thread would only slow down.
torch.set_num_threads(1)


#: It registers a strategy, which only the process that asks for it should do.
collect_ignore = ["own_strategy.py"]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four cases; the first has no t2."""
    root = write_cases(tmp_path_factory.mktemp("cases"), 4)
    (root / "p0" / "p0_t2.nii.gz").unlink()
    return root
