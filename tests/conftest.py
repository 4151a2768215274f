"""Settings of the whole suite."""

from __future__ import annotations

import torch

# Tests are many small operations, for which a second thread only costs.
torch.set_num_threads(1)
