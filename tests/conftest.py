"""Settings of the whole suite, and cases that the tests of several files train on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from niftis import write_cases

# Tests are many small operations, for which a second thread only costs.
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four cases, the first without t2."""
    root = write_cases(tmp_path_factory.mktemp("cases"), 4)
    (root / "p0" / "p0_t2.nii.gz").unlink()
    return root
