"""Phantoms: seeded multi-contrast brain MR with tumours, from tissue maps and MR signal equations."""

from prism_meta.data.phantom.images import Phantom, draw_phantom, write_phantoms
from prism_meta.data.phantom.signal import (
    SEQUENCES,
    PulseSequence,
    inversion_recovery,
    shorten_t1,
    spin_echo,
)
from prism_meta.data.phantom.tissues import TISSUES, Relaxation, Tissue

__all__ = [
    "SEQUENCES",
    "TISSUES",
    "Phantom",
    "PulseSequence",
    "Relaxation",
    "Tissue",
    "draw_phantom",
    "inversion_recovery",
    "shorten_t1",
    "spin_echo",
    "write_phantoms",
]
