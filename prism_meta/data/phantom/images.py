"""Phantom images: drawing a subject in every modality, and writing cases as NIfTI files.

The modalities show the contrasts that they show in the clinic. Oedema is bright in FLAIR and T2, fluid
is dark in FLAIR, and the enhancing ring is visible only with contrast agent (T1ce).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from prism_meta.data.phantom.anatomy import draw_anatomy
from prism_meta.data.phantom.scan import Subject, scan
from prism_meta.data.phantom.signal import SEQUENCES
from prism_meta.data.phantom.space import Shape, Space
from prism_meta.errors import ConfigError, raise_faults
from prism_meta.files import atomic, writable_folder
from prism_meta.modalities import BRATS

#: A smaller field of view would cut off so much of the brain that no tumour fits, mm.
SMALLEST_FIELD_OF_VIEW = 100.0


@dataclass(frozen=True)
class Phantom:
    """The images and labels of one subject.

    Args:
        images: modality -> (D, H, W), arbitrary units; above 0 in the brain and 0 outside.
        label: (D, H, W), 0 background, 1 necrotic or non-enhancing core, 2 oedema, 4 enhancing
            tumour.
        affine: (4, 4), from voxel indices to mm. The axes run left, back, up, as in BraTS files.
    """

    images: dict[str, NDArray[np.float32]]
    label: NDArray[np.uint8]
    affine: NDArray[np.float64]


def draw_phantom(
    seed: int,
    *,
    shape: Shape = (80, 96, 72),
    spacing: float = 2.0,
    modalities: Sequence[str] = BRATS,
) -> Phantom:
    """Draw the images of one subject. Each image is the same, whichever others are drawn.

    Args:
        seed: random seed, at least 0. The same seed gives the same phantom.
        shape: (D, H, W) in voxels.
        spacing: edge of a voxel, mm. 1 mm takes 8 times as long as 2 mm.
        modalities: some of ``flair``, ``t1ce``, ``t1``, ``t2``. Defaults to all four.

    Returns:
        The images by modality and the label, each (D, H, W), and the affine.

    Raises:
        ConfigError: a modality is unknown, or the volume is too small for the brain.

    Example:
        >>> phantom = draw_phantom(0, shape=(40, 48, 36), spacing=4.0, modalities=("flair", "t1"))
        >>> sorted(phantom.images), phantom.label.shape
        (['flair', 't1'], (40, 48, 36))
    """
    raise_faults(ConfigError, _faults(shape, spacing, modalities))
    body, patient, *scans = np.random.SeedSequence(seed).spawn(2 + len(SEQUENCES))
    space = Space((shape[0], shape[1], shape[2]), spacing)
    anatomy = draw_anatomy(np.random.default_rng(body), space)
    subject = Subject.draw(np.random.default_rng(patient), space)
    images = {
        name: scan(
            np.random.default_rng(seeds),
            space,
            anatomy=anatomy,
            subject=subject,
            usual=SEQUENCES[name],
        )
        for name, seeds in zip(SEQUENCES, scans, strict=True)
        if name in modalities
    }
    affine = np.diag([-spacing, -spacing, spacing, 1.0])
    affine[:3, 3] = np.array([1, 1, -1]) * (np.array(shape) - 1) * spacing / 2
    return Phantom({name: images[name] for name in modalities}, anatomy.label, affine)


def write_phantoms(
    folder: Path | str,
    availability: Tensor | Sequence[Sequence[bool]],
    *,
    seed: int = 0,
    shape: Shape = (80, 96, 72),
    spacing: float = 2.0,
    modalities: Sequence[str] = BRATS,
    on_case: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write phantoms as NIfTI files: a folder per case with its available images and ``seg.nii.gz``.

    Case i depends only on ``seed`` and i, not on the number of cases or their availability.

    Args:
        folder: output folder. The files are ``case_000/flair.nii.gz`` and so on, int16 images and
            uint8 labels.
        availability: bool (N, M), columns in the order of ``modalities``.
        seed: random seed, at least 0.
        shape: (D, H, W) in voxels.
        spacing: edge of a voxel, mm.
        modalities: M of ``flair``, ``t1ce``, ``t1``, ``t2``. Defaults to all four.
        on_case: called with i after case i is written, e.g. for a progress bar.

    Returns:
        The N case folders.

    Raises:
        ConfigError: a modality is unknown, the volume is too small for the brain, or a row of
            ``availability`` does not have M entries or is empty (all faults together).
        OutputError: the folder cannot be written.

    Example:
        >>> import tempfile
        >>> small = dict(shape=(40, 48, 36), spacing=4.0, modalities=("flair", "t1"))
        >>> [case] = write_phantoms(tempfile.mkdtemp(), [[True, False]], **small)
        >>> case.name, sorted(path.name for path in case.iterdir())
        ('case_000', ['flair.nii.gz', 'seg.nii.gz'])
    """
    rows = [[bool(shown) for shown in row] for row in availability]
    faults = _faults(shape, spacing, modalities)
    faults += [
        f"availability: row {i} has {len(row)} entries, expected {len(modalities)}, one for each "
        f"of {', '.join(modalities)}"
        for i, row in enumerate(rows)
        if len(row) != len(modalities)
    ]
    faults += [
        f"availability: row {i} has no modality, expected at least one True"
        for i, row in enumerate(rows)
        if not any(row)
    ]
    raise_faults(ConfigError, faults)
    folder = writable_folder(folder)
    cases = []
    for i, row in enumerate(rows):
        shown = [name for name, there in zip(modalities, row, strict=True) if there]
        case_seed = int(np.random.SeedSequence([seed, i]).generate_state(1, np.uint64)[0])
        phantom = draw_phantom(case_seed, shape=shape, spacing=spacing, modalities=shown)
        case = writable_folder(folder / f"case_{i:03d}")
        for name, image in phantom.images.items():
            # Readers take voxels above 0 as the brain, so rounding must not remove any.
            whole = np.where(image > 0, np.maximum(image.round(), 1), 0)
            _write(case / f"{name}.nii.gz", whole.astype(np.int16), phantom.affine)
        for name in set(modalities) - set(shown):  # files of an earlier run
            (case / f"{name}.nii.gz").unlink(missing_ok=True)
        _write(case / "seg.nii.gz", phantom.label, phantom.affine)
        cases.append(case)
        if on_case is not None:
            on_case(i)
    return cases


def _faults(shape: Sequence[int], spacing: float, modalities: Sequence[str]) -> list[str]:
    faults = [
        f"modalities: {name!r} is unknown, expected some of {', '.join(SEQUENCES)}"
        for name in modalities
        if name not in SEQUENCES
    ]
    if len(shape) != 3 or spacing <= 0 or min(shape) * spacing < SMALLEST_FIELD_OF_VIEW:
        faults.append(
            f"shape, spacing: got {tuple(shape)} voxels of {spacing} mm, expected three axes of at "
            f"least {SMALLEST_FIELD_OF_VIEW:g} mm each; the whole brain needs 160 x 192 x 144 mm"
        )
    return faults


def _write(
    path: Path, volume: NDArray[np.int16] | NDArray[np.uint8], affine: NDArray[np.float64]
) -> None:
    make_image: Callable[..., Any] = nib.Nifti1Image  # nibabel is not typed
    image = make_image(volume, affine)
    image.header.set_xyzt_units("mm")
    with atomic(path) as partial:
        nib.save(image, partial)
