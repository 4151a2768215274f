"""NIfTI files, read to their end, so that damage is found instead of changing voxels in silence.

nibabel stops at the last voxel and never reaches the checksum at the end of a compressed file. It
also lets a header promise more voxels than the file or the memory can hold.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling, array_from_file
from numpy.typing import NDArray

from prism_meta.data.grids import distance, voxel_sizes
from prism_meta.data.memory import excess

#: Voxel sizes in mm; others are taken for a wrong unit or a damaged header.
VOXEL_SIZES = (0.01, 100.0)
#: Largest distance of the first voxel from the origin, mm. Beyond it, rounding moves voxels.
_FARTHEST = 1e6
#: The largest factor by which deflate, the method of gzip, can compress.
_MAX_COMPRESSION = 1032
#: Fields that nibabel corrects in silence: the affine and the voxels would be others.
_TRUSTED = ("sizeof_hdr", "bitpix", "qform_code", "sform_code")
_GZIP = b"\x1f\x8b"
#: Exceptions of nibabel, gzip and zlib for damaged files.
_UNREADABLE = (
    ImageFileError, HeaderDataError, OSError, EOFError, ValueError, TypeError, ArithmeticError,
    LookupError, MemoryError, zlib.error, struct.error,
)  # fmt: skip


class NiftiError(Exception):
    """A file that cannot be used.

    Args:
        problem: what is wrong, to be read after the name of the file.
        fix: what the user can do. Defaults to None: restore the file.
    """

    def __init__(self, problem: str, fix: str | None = None) -> None:
        super().__init__(problem)
        self.problem, self.fix = problem, fix


@dataclass(frozen=True)
class NiftiHeader:
    """What the header of a file says.

    Args:
        shape: (D, H, W).
        affine: (4, 4), from voxel indices to mm.
        dtype: type of the stored voxels.
        offset: position of the first voxel in the file, bytes.
        scaling: slope and intercept; None if the voxels are stored as they are.
        channels: number of volumes in the file, its fourth axis. Defaults to 1.
        disagreement: largest distance between the places that qform and sform give a voxel, in voxels;
            0 if the header has only one of the two. The affine is that of the sform then, as in nibabel
            and ITK.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    dtype: np.dtype[Any]
    offset: int
    scaling: tuple[float, float] | None
    channels: int = 1
    disagreement: float = 0.0

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """(D, H, W), or (D, H, W, C) for several channels."""
        return self.shape if self.channels == 1 else (*self.shape, self.channels)

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size in mm along each axis."""
        return voxel_sizes(self.affine)

    @property
    def end(self) -> int:
        """Length of the file after decompression, bytes."""
        return self.offset + math.prod(self.stored_shape) * self.dtype.itemsize

    def check_one_channel(self) -> None:
        """Refuse a file with several channels.

        Raises:
            NiftiError: there are several.
        """
        if self.channels > 1:
            raise NiftiError(
                f"has shape {self.stored_shape}, expected 3-D (D, H, W)", "give one volume per file"
            )


def read_header(path: Path) -> NiftiHeader:
    """Read and check the header of a file.

    Raises:
        NiftiError: the file is no NIfTI file, or no volume of real numbers with three axes, or four if
            the last are channels; or its size does not fit the header, or its voxels do not fit into
            memory.
    """
    with _unreadable_as_fault():
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            raise NiftiError(f"is {kind}, expected a NIfTI file")
        size = path.stat().st_size
        if not size:
            raise NiftiError("is empty, expected a NIfTI file")
        with _opened(path) as (stream, compressed):
            header = _checked(_parse(stream))
    if compressed != path.name.lower().endswith(".gz"):
        # nibabel and most programs go by the name.
        right = f"{path.name}.gz" if compressed else path.name[: -len(".gz")]
        raise NiftiError(
            f"is {'' if compressed else 'not '}compressed, which its name does not say",
            f"rename it to {right}",
        )
    limit = size * _MAX_COMPRESSION if compressed else size
    if header.end > limit:
        raise NiftiError(
            f"is too short for its shape {header.stored_shape} of {header.dtype} voxels"
        )
    if not compressed and header.end < size:
        raise _too_long(header)
    # Read, then converted.
    problem = excess(math.prod(header.stored_shape) * (header.dtype.itemsize + 8))
    if problem:
        raise NiftiError(f"has shape {header.stored_shape} and {problem}", "correct its header")
    return header


def read_voxels(path: Path, header: NiftiHeader) -> NDArray[Any]:
    """Read all voxels of a file and its checksum.

    Args:
        path: the file.
        header: what ``read_header`` returned for it.

    Returns:
        (D, H, W), or (D, H, W, C) for several channels; as stored, or float64 if the header scales them.

    Raises:
        NiftiError: the file is damaged.
    """
    with _unreadable_as_fault(), _opened(path) as (stream, _):
        opened: Any = stream  # nibabel's type leaves out what it accepts
        stored = array_from_file(
            header.stored_shape, header.dtype, opened, header.offset, mmap=False
        )
        # At the end of a compressed file, this reads the checksum. A damaged one may have more, of
        # which enough is read to find the damage.
        rest = [len(stream.read(2**20)) for _ in range(64)]
        if any(rest):
            raise _too_long(header)
    stored = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    if header.scaling is None:
        return stored
    slope, inter = header.scaling
    with np.errstate(over="ignore", invalid="ignore"):
        scaled: NDArray[Any] = apply_read_scaling(stored.astype(np.float64), slope, inter)
    return scaled


@contextmanager
def _unreadable_as_fault() -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:
        said = (isinstance(error, OSError) and error.strerror) or str(error)
        reason = " ".join(said.split()) or type(error).__name__
        if len(reason) > 120:
            reason = reason[:117] + "..."
        raise NiftiError(f"cannot be read as NIfTI ({reason})") from error


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, bool]]:
    """The content of a file, decompressed; and whether it was compressed."""
    with path.open("rb") as raw:
        compressed = raw.read(len(_GZIP)) == _GZIP
        raw.seek(0)
        if not compressed:
            yield raw, False
            return
        with gzip.GzipFile(fileobj=raw) as stream:
            yield cast(BinaryIO, stream), True


def _parse(stream: BinaryIO) -> Any:
    """The header as nibabel reads it."""
    start = stream.read(540)
    kinds: tuple[Any, ...] = (nib.Nifti1Header, nib.Nifti2Header)
    for kind in kinds:
        if kind.may_contain_header(start):
            header = kind(start[: kind.template_dtype.itemsize], check=False)
            stored = {name: header[name].item() for name in _TRUSTED}
            header.check_fix()
            wrong = [name for name, value in stored.items() if header[name].item() != value]
            if wrong:
                raise ValueError(f"its header has an invalid {', '.join(wrong)}")
            if header["magic"].item() != header.single_magic:
                raise ValueError("its voxels are in another file")
            return header
    raise ValueError("it has no NIfTI header")


def _checked(header: Any) -> NiftiHeader:
    """The checks that need no more than the header."""
    shape, dtype = tuple(int(n) for n in header.get_data_shape()), header.get_data_dtype()
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise NiftiError(f"has shape {shape}, expected 3-D (D, H, W)", "give one volume per file")
    channels = shape[3] if len(shape) == 4 else 1
    if dtype.kind not in "iuf":
        kind = "complex" if dtype.kind == "c" else "colour"
        raise NiftiError(f"has {kind} voxels, expected real numbers", "convert it to one channel")
    stored = {name: float(header[name]) for name in ("vox_offset", "scl_slope", "scl_inter")}
    wrong = [f"{name} is {value}" for name, value in stored.items() if not np.isfinite(value)]
    if wrong:
        raise NiftiError(f"has a damaged header ({', '.join(wrong)})")
    slope, inter = header.get_slope_inter()
    scaling = None if slope is None or (slope, inter) == (1.0, 0.0) else (slope, inter)
    affine = np.asarray(header.get_best_affine(), np.float64)
    _check_affine(affine)
    d, h, w = shape[:3]
    offset = int(header.get_data_offset())
    off = _disagreement(header, (d, h, w), affine)
    return NiftiHeader((d, h, w), affine, dtype, offset, scaling, channels, off)


def _disagreement(header: Any, shape: tuple[int, int, int], affine: NDArray[np.float64]) -> float:
    """See ``NiftiHeader``; infinite if the qform makes no sense."""
    if not (header["qform_code"] and header["sform_code"]):
        return 0.0
    try:
        qform = header.get_qform()
    except (ValueError, HeaderDataError):  # its quaternion is no rotation
        return np.inf
    return distance(shape, qform, affine) if np.isfinite(qform).all() else np.inf


def _check_affine(affine: NDArray[np.float64]) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        sizes = np.linalg.norm(affine[:3, :3], axis=0)
    usable = bool(np.isfinite(affine).all() and np.isfinite(sizes).all() and (sizes > 0).all())
    if not usable or abs(np.linalg.det(affine[:3, :3] / sizes)) < 1e-6:
        raise NiftiError(
            "has an invalid affine (its voxels have no volume)", "set its voxel sizes and axes"
        )
    smallest, largest = VOXEL_SIZES
    if sizes.min() < smallest or sizes.max() > largest:
        raise NiftiError(
            f"has voxels of {' x '.join(f'{size:.3g}' for size in sizes)} mm, expected "
            f"{smallest:g} to {largest:g} mm along each axis",
            "correct the unit or the voxel sizes in its header",
        )
    if np.abs(affine[:3, 3]).max() > _FARTHEST:
        raise NiftiError(
            f"lies {np.abs(affine[:3, 3]).max():.3g} mm from the origin, expected at most "
            f"{_FARTHEST:g} mm",
            "correct the affine in its header",
        )


def _too_long(header: NiftiHeader) -> NiftiError:
    return NiftiError(
        f"is longer than its shape {header.stored_shape} of {header.dtype} voxels needs, so one of the two "
        "is wrong"
    )
