"""Small synthetic cases as NIfTI files, recorders of what is read, and the folder of real cases."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel import orientations
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from prism_meta.data import cache, cases
from prism_meta.data.cases import Volume
from prism_meta.data.layouts.folders import load_cases
from prism_meta.modalities import BRATS

#: Three different sizes, so that a swapped axis is noticed.
SHAPE = (20, 24, 16)
#: Centre of the blob, as a share of each half axis. It is off centre, so that a flip is noticed.
CENTRE = (0.2, -0.15, 0.1)
#: Radii of the blob's shells, from the outside in. Each shell is one class.
RADII = (0.55, 0.42, 0.28)

FloatArray = NDArray[np.float32]


ORIENTATIONS = ("RAS", "LPS", "PSR", "ILA")
#: Where the size of a voxel must be small against the blob.
BIG = (40, 48, 32)
#: The voxel size of the synthetic cases, mm.
OWN = (1.0, 1.0, 1.0)


def real_data() -> Path:
    """The folder of real cases; the test is skipped if there is none."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("PRISM_META_DATA") or default)
    if not (folder / "brats-tcga").is_dir():
        pytest.skip(
            f"no real cases in {folder}; set PRISM_META_DATA to the folder that has brats-tcga"
        )
    return folder


def grid(shape: Sequence[int]) -> list[NDArray[np.float64]]:
    """Coordinates of the voxels along each axis, from -1 to 1."""
    axes = [(np.arange(n) + 0.5) / n * 2 - 1 for n in shape]
    return list(np.meshgrid(*axes, indexing="ij"))


def draw_label(
    shape: Sequence[int] = SHAPE, values: Sequence[int] = (2, 1, 4)
) -> NDArray[np.int16]:
    """A blob with one shell for each of ``values``, from the outside in; 0 elsewhere."""
    distance = np.sqrt(sum((x - c) ** 2 for x, c in zip(grid(shape), CENTRE, strict=True)))
    label = np.zeros(shape, np.int16)
    for value, radius in zip(values, RADII, strict=False):
        label[distance < radius] = value
    return label


def draw_image(shape: Sequence[int] = SHAPE, *, index: int = 0, seed: int = 0) -> FloatArray:
    """An image of modality ``index``: an ellipsoid with a gradient, the blob and noise; 0 outside."""
    x, y, z = grid(shape)
    noise = np.random.default_rng((seed, index)).normal(0, 2, shape)
    image = 100 * (index + 1) + 30 * x + 20 * y - 10 * z + noise
    image += 40 * (draw_label(shape) > 0) * (1 if index % 2 else -0.5)
    image[x**2 + y**2 + z**2 > 0.9] = 0
    return image.astype(np.float32)


def affine_of(
    spacing: Sequence[float], origin: Sequence[float] = (-9.0, 5.0, 31.0)
) -> NDArray[Any]:
    """The affine of a RAS grid."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    return affine


def reorient(
    array: NDArray[Any], affine: NDArray[Any], codes: str
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Reorder the axes of a RAS grid so that they point to ``codes``, e.g. ``LPS``; same anatomy."""
    change = orientations.ornt_transform(
        orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(tuple(codes))
    )
    moved = orientations.apply_orientation(array, change)
    return moved, affine @ orientations.inv_ornt_aff(change, array.shape)


def save(array: NDArray[Any], path: Path, affine: NDArray[Any] | None = None) -> Path:
    """Write one NIfTI file; its folder is made if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def write_case(
    folder: Path,
    *,
    modalities: Sequence[str] = BRATS,
    missing: Sequence[str] = (),
    label: str | None = "seg",
    values: Sequence[int] = (2, 1, 4),
    names: str = "{case}_{modality}.nii.gz",
    shape: Sequence[int] = SHAPE,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    codes: str = "RAS",
    seed: int = 0,
) -> Path:
    """Write one case: every modality that is not missing, and a label file.

    Args:
        folder: folder of the case; its name is the name of the case.
        modalities: names of all modalities; the intensities depend on the position in this list.
        missing: modalities that get no file.
        label: name of the label file; None writes no label.
        values: label values of the classes, from the outside in.
        names: pattern of the file names.
        shape: voxels along right, anterior and superior, before ``codes`` reorders the axes.
        spacing: voxel size along the same axes, in mm.
        codes: directions that the axes of the files point to.
        seed: random seed of the noise.
    """
    arrays: dict[str, NDArray[Any]] = {
        name: draw_image(shape, index=k, seed=seed)
        for k, name in enumerate(modalities)
        if name not in missing
    }
    if label is not None:
        arrays[label] = draw_label(shape, values)
    for name, array in arrays.items():
        moved, affine = reorient(array, affine_of(spacing), codes)
        save(moved, folder / names.format(case=folder.name, modality=name), affine)
    return folder


def write_cases(root: Path, count: int, **options: Any) -> Path:
    """Write ``count`` cases p0, p1, ... into ``root``, each with its own noise."""
    for k in range(count):
        write_case(root / f"p{k}", seed=k, **options)
    return root


def cut(path: Path) -> None:
    """Truncate a file to three quarters, as a full disk would."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])


def record_reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A list that receives the path of every NIfTI file whose header is read from now on."""
    opened: list[Path] = []
    read = cases.read_header

    def recording(path: Path) -> Any:
        opened.append(Path(path))
        return read(path)

    monkeypatch.setattr(cases, "read_header", recording)
    return opened


def record_slices(monkeypatch: pytest.MonkeyPatch, read: list[str]) -> list[Path]:
    """From now on, append the tensors read from a cache to ``read``, and its files to the result."""
    opened: list[Path] = []

    class Recording:
        def __init__(self, path: Path, **options: Any) -> None:
            opened.append(path)
            self._stored = safe_open(path, **options)

        def __enter__(self) -> Recording:
            self._entered = self._stored.__enter__()
            return self

        def __exit__(self, *exception: Any) -> None:
            self._stored.__exit__(*exception)

        def get_slice(self, name: str) -> Any:
            read.append(name)
            return self._entered.get_slice(name)

        def get_tensor(self, name: str) -> Any:
            read.append(name)
            return self._entered.get_tensor(name)

    monkeypatch.setattr(cache, "safe_open", Recording)
    return opened


@contextmanager
def forbidden(folder: Path) -> Iterator[None]:
    """Context in which ``folder`` is not writable; root, who can write anywhere, changes user in it."""
    if not hasattr(os, "geteuid"):
        pytest.skip("this system has no POSIX permissions")
    mode, user = stat.S_IMODE(folder.stat().st_mode), os.geteuid()
    # The folders above may be closed to other users: let them pass through.
    parents = [
        p for p in folder.parents if p.stat().st_uid == user and p.stat().st_mode & 0o077 == 0
    ]
    folder.chmod(0o555)
    for parent in parents:
        parent.chmod(0o711)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(0)
        for parent in parents:
            parent.chmod(0o700)
        folder.chmod(mode)


def written(folder: Path, **options: Any) -> Volume:
    """The volume of one case that is written and read again."""
    write_case(folder / "p0", **options)
    (case,) = load_cases(folder)
    return case.read()


def world(voxels: Tensor, affine: Any) -> Tensor:
    """Centre of mass of ``voxels`` in mm."""
    affine = torch.as_tensor(affine, dtype=torch.float64)
    return affine[:3, :3] @ voxels.nonzero().double().mean(0) + affine[:3, 3]
