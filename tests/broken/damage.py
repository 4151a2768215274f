"""Ways to damage one file, by name."""

from __future__ import annotations

import gzip
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import niftis
import numpy as np
from numpy.typing import NDArray

#: Changes one file.
Damage = Callable[[Path], object]
#: Bytes at the start of a compressed file that may hold a time and a name, which nothing depends on.
_GZIP_HEADER = 40
_GRID = niftis.affine_of(niftis.OWN)


def content(change: Callable[[bytes], bytes]) -> Damage:
    """Replace the content of a file."""
    return lambda path: path.write_bytes(change(path.read_bytes()))


def unpacked(change: Callable[[bytes], bytes]) -> Damage:
    """Change the content of a compressed file and compress it again, so that the checksum is right."""
    return content(lambda data: gzip.compress(change(gzip.decompress(data)), 1))


def flip(share: float) -> Damage:
    """Flip a bit at a share of the length of a compressed file, or the next one that gzip notices.

    Nothing depends on a few bits, e.g. those that fill the last byte of a block.
    """

    def change(data: bytes) -> bytes:
        start = _GZIP_HEADER + int(share * (len(data) - _GZIP_HEADER - 1))
        for place in range(start, len(data)):
            flipped = data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]
            try:
                gzip.decompress(flipped)
            except (OSError, EOFError, zlib.error):
                return flipped
        raise ValueError("gzip notices no flipped bit")

    return content(change)


def keep(share: float) -> Damage:
    """Keep a share of a file from its start."""
    return content(lambda data: data[: int(share * len(data))])


def field(offset: int, form: str, *values: Any) -> Callable[[bytes], bytes]:
    """Overwrite a field of the header."""

    def change(data: bytes) -> bytes:
        packed = struct.pack(f"<{form}", *values)
        return data[:offset] + packed + data[offset + len(packed) :]

    return change


def write(array: NDArray[Any], affine: NDArray[Any] = _GRID) -> Damage:
    """Write other voxels to a file."""
    return lambda path: niftis.save(array, path, affine)


def replaced(make: Damage) -> Damage:
    """Remove a file and make something else in its place."""

    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


def voxels(change: Callable[[NDArray[Any]], NDArray[Any]]) -> Damage:
    """Change the voxels of a file."""

    def damage(path: Path) -> None:
        array = np.asarray(nib.load(path).dataobj)  # type: ignore[attr-defined]
        niftis.save(change(array.copy()), path, _GRID)

    return damage


def at_centre(value: float) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Set one voxel in the middle."""

    def change(array: NDArray[Any]) -> NDArray[Any]:
        array = array if np.can_cast(type(value), array.dtype) else array.astype(np.float64)
        array[tuple(n // 2 for n in array.shape)] = value
        return array

    return change


_NOISE = np.random.default_rng(0).bytes(3000)
FLIPS = {f"bit {k} of 24": flip(k / 23) for k in range(24)}
CUTS = {f"cut to {share}": keep(share) for share in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98, 0.998)}
GARBAGE: dict[str, Damage] = {
    "nothing": content(lambda _: b""),
    "one byte": content(lambda _: b"\x1f"),
    "noise": content(lambda _: _NOISE),
    "zeros": content(lambda _: bytes(3000)),
    "ones": content(lambda _: b"\xff" * 3000),
    "a page": content(lambda _: b"<html>Log in to download this file.</html>\n" * 50),
    "an archive": content(lambda _: b"PK\x03\x04" + _NOISE),
    "compressed noise": content(lambda _: gzip.compress(_NOISE)),
    "compressed nothing": content(lambda _: gzip.compress(b"")),
    "noise after the end": content(lambda data: data + _NOISE),
    "a longer volume": unpacked(lambda data: data + bytes(2)),
    "a shorter volume": unpacked(lambda data: data[:-2]),
    "compressed twice": content(gzip.compress),
}
PLACES: dict[str, Damage] = {
    "a folder": replaced(lambda path: path.mkdir()),
    "a pipe": replaced(os.mkfifo),
    "a link to nothing": replaced(lambda path: path.symlink_to("lost")),
    "a link to itself": replaced(lambda path: path.symlink_to(path.name)),
    "a link to its folder": replaced(lambda path: path.symlink_to(".")),
}
_RGB = [("R", "u1"), ("G", "u1"), ("B", "u1")]
TYPES = {
    "colour": write(np.zeros(niftis.SHAPE, _RGB)),
    "colour and opacity": write(np.zeros(niftis.SHAPE, [*_RGB, ("A", "u1")])),
    "complex": write(np.ones(niftis.SHAPE, np.complex64)),
    "long complex": write(np.ones(niftis.SHAPE, np.complex128)),
}
SHAPES = {
    "another shape": write(np.ones((20, 24, 15), np.int16)),
    "axes in another order": write(np.ones((24, 20, 16), np.int16)),
    "two axes": write(np.ones((20, 24), np.int16)),
    "four axes": write(np.ones((20, 24, 16, 3), np.int16)),
    "five axes": write(np.ones((20, 24, 16, 1, 2), np.int16)),
    "one axis": write(np.ones(20, np.int16)),
}
FIELDS = {
    "size of header": field(0, "i", 349),
    "no axes": field(40, "h", 0),
    "nine axes": field(40, "h", 9),
    "negative axis": field(42, "h", -20),
    "axis of 0": field(44, "h", 0),
    "axis of 21": field(42, "h", 21),
    "axis of 19": field(42, "h", 19),
    "30000 voxels along each axis": field(42, "3h", 30000, 30000, 30000),
    "unknown type": field(70, "h", 999),
    "no type": field(70, "h", 0),
    "bits per voxel": field(72, "h", 7),
    "code of the affine": field(254, "h", 130),
    "offset of infinity": field(108, "f", np.inf),
    "offset of nan": field(108, "f", np.nan),
    "offset below 0": field(108, "f", -352.0),
    "offset in the header": field(108, "f", 16.0),
    "offset beyond the end": field(108, "f", 1e12),
    "slope of infinity": field(112, "f", np.inf),
    "slope of nan": field(112, "f", np.nan),
    "intercept of infinity": field(116, "f", np.inf),
    "intercept of nan": field(116, "f", np.nan),
    "no magic": field(344, "4s", b"\0\0\0\0"),
    "magic of two files": field(344, "4s", b"ni1\0"),
}


def _sform(*values: float) -> Callable[[bytes], bytes]:
    return field(280, f"{len(values)}f", *values)


AFFINES = {
    "nan": _sform(*[np.nan] * 12),
    "infinite": _sform(*[np.inf] * 12),
    "of zeros": _sform(*[0] * 12),
    "flat": _sform(*[1, 0, 0, 0] * 3),
    "in metres": _sform(*_GRID[:3].flatten() * 1e-3),
    "of 4 microns": _sform(*niftis.affine_of((0.004,) * 3)[:3].flatten()),
    "of 1000 mm": _sform(*niftis.affine_of((1000,) * 3)[:3].flatten()),
    "far away": _sform(1, 0, 0, 1e12),
    "moved": _sform(1, 0, 0, 3.5),
    "of other voxels": _sform(1.1, 0, 0, -9),
    "mirrored": _sform(-1, 0, 0, -9),
}
VALUES = {
    str(value): voxels(at_centre(value))
    for value in (3, -1, 300, 40000, 2.5, 1e30, np.nan, -np.inf)
}


def copy(source: str, target: str) -> Damage:
    """Copy a file or folder of a root to another place in it."""

    def change(root: Path) -> None:
        copied = shutil.copytree if (root / source).is_dir() else shutil.copy
        copied(root / source, root / target)

    return change
