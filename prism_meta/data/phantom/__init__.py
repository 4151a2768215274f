"""Phantoms: seeded multi-contrast brain MR with tumours, written as NIfTI files."""

from prism_meta.data.phantom.images import (
    SEQUENCES,
    TISSUES,
    Phantom,
    draw_phantom,
    inversion_recovery,
    shorten_t1,
    spin_echo,
    write_phantoms,
)

__all__ = [
    "SEQUENCES",
    "TISSUES",
    "Phantom",
    "draw_phantom",
    "inversion_recovery",
    "shorten_t1",
    "spin_echo",
    "write_phantoms",
]
