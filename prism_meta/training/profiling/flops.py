"""Counting of floating-point operations."""

from __future__ import annotations

import logging
from typing import Any


def flop_counter() -> Any:
    """torch's ``FlopCounterMode``, which counts what runs within its context.

    Where triton is not installed, importing it warns that kernels of triton are not counted. No network
    here has any.
    """
    logging.getLogger("torch.utils.flop_counter").setLevel(logging.ERROR)
    from torch.utils.flop_counter import FlopCounterMode

    return FlopCounterMode(display=False)
