"""Phantom: seeded multi-contrast brain MR with tumours, from tissue maps and signal equations.

Each modality carries what it carries in the clinic: oedema is bright in FLAIR and T2, fluid is
dark in FLAIR, and the enhancing ring stands out only after contrast agent (T1ce).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from prism_meta.data.phantom.anatomy import Anatomy, Shape, Space, Tissue, Volume, draw_anatomy
from prism_meta.errors import ConfigError, raise_faults
from prism_meta.files import atomic, writable_folder
from prism_meta.modalities import BRATS

#: Longitudinal relaxivity of a gadolinium chelate at 3 T, 1 / (mM s).
RELAXIVITY = 4.5
#: A field of view below this cuts off too much of the brain to hold a tumour, mm.
SMALLEST_FIELD_OF_VIEW = 100.0


@dataclass(frozen=True)
class Relaxation:
    """MR properties of a tissue: T1 and T2 in ms, proton density relative to water."""

    t1: float
    t2: float
    density: float


#: At 3 T. Healthy tissue is near Wansapura et al., JMRI 9:531 (1999) and Stanisz et al., MRM 54:507
#: (2005); tumour tissue is chosen so that its contrasts are those of clinical images.
TISSUES: Mapping[Tissue, Relaxation] = MappingProxyType(
    {
        Tissue.CSF: Relaxation(4000, 1800, 1.00),
        Tissue.GREY: Relaxation(1380, 95, 0.81),
        Tissue.WHITE: Relaxation(840, 75, 0.70),
        Tissue.DEEP_GREY: Relaxation(1150, 80, 0.79),
        Tissue.OEDEMA: Relaxation(1600, 150, 0.87),
        Tissue.NECROSIS: Relaxation(2800, 300, 0.93),
        Tissue.ENHANCING: Relaxation(1430, 115, 0.86),
        Tissue.VESSEL: Relaxation(1650, 60, 0.80),
    }
)


@dataclass(frozen=True)
class Timing:
    """Timing of a pulse sequence in ms; ``inversion`` is None for a spin echo.

    ``contrast_agent`` says whether gadolinium is in the blood.
    """

    repetition: float
    echo: float
    inversion: float | None = None
    contrast_agent: bool = False


SEQUENCES: Mapping[str, Timing] = MappingProxyType(
    {
        "flair": Timing(9000, 110, inversion=2500),
        "t1ce": Timing(520, 12, contrast_agent=True),
        "t1": Timing(520, 12),
        "t2": Timing(4500, 95),
    }
)


@dataclass(frozen=True)
class Phantom:
    """One subject.

    Args:
        images: per modality (D, H, W), arbitrary units; above 0 in the brain and 0 outside.
        label: (D, H, W), 0, 1 necrotic or non-enhancing core, 2 oedema, 4 enhancing tumour.
        affine: (4, 4), voxel to mm; the axes run left, back, up, as in BraTS files.
    """

    images: dict[str, NDArray[np.float32]]
    label: NDArray[np.uint8]
    affine: NDArray[np.float64]


def spin_echo(
    density: float, t1: float | Volume, t2: float, *, repetition: float, echo: float
) -> Volume:
    """Spin-echo signal: S = density (1 - exp(-TR / T1)) exp(-TE / T2).

    Args:
        density: proton density, relative.
        t1: longitudinal relaxation time, ms; a number or a volume.
        t2: transverse relaxation time, ms.
        repetition: TR, ms.
        echo: TE, ms.

    Source: Bernstein, King and Zhou, Handbook of MRI Pulse Sequences (2004), section 14.3.

    Example:
        >>> round(float(spin_echo(1.0, 1000.0, 100.0, repetition=1e6, echo=100.0)), 4)
        0.3679
    """
    signal = density * (1 - np.exp(-repetition / np.asarray(t1))) * np.exp(-echo / t2)
    return np.asarray(signal, np.float32)


def inversion_recovery(
    density: float, t1: float, t2: float, *, repetition: float, echo: float, inversion: float
) -> Volume:
    """Magnitude after inversion: S = density |1 - 2 exp(-TI / T1) + exp(-TR / T1)| exp(-TE / T2).

    A tissue is nulled at TI = T1 ln 2 when TR is much longer than T1: FLAIR does so for fluid.

    Args:
        density: proton density, relative.
        t1: longitudinal relaxation time, ms.
        t2: transverse relaxation time, ms.
        repetition: TR, ms.
        echo: TE, ms.
        inversion: TI, ms.

    Source: Bernstein, King and Zhou, Handbook of MRI Pulse Sequences (2004), section 14.2.

    Example:
        >>> times = dict(repetition=1e6, echo=0.0, inversion=4000 * np.log(2))
        >>> round(float(inversion_recovery(1.0, 4000.0, 1800.0, **times)), 6)
        0.0
    """
    recovered = np.abs(1 - 2 * np.exp(-inversion / t1) + np.exp(-repetition / t1))
    return np.asarray(density * recovered * np.exp(-echo / t2), np.float32)


def shorten_t1(t1: float, concentration: float | Volume) -> Volume:
    """T1 with contrast agent: 1 / T1' = 1 / T1 + r1 C, r1 = 4.5 / (mM s).

    Args:
        t1: without contrast agent, ms.
        concentration: C, mM; a number or a volume.

    Returns:
        T1' in ms, the shape of ``concentration``.

    Source: Haacke et al., Magnetic Resonance Imaging: Physical Principles and Sequence Design
    (1999).

    Example:
        >>> round(float(shorten_t1(1000.0, 1.0)), 1)  # 1 / (1 / s + 4.5 / s)
        181.8
    """
    return np.asarray(1 / (1 / t1 + RELAXIVITY * np.asarray(concentration) / 1000), np.float32)


def draw_phantom(
    seed: int,
    *,
    shape: Shape = (80, 96, 72),
    spacing: float = 2.0,
    modalities: Sequence[str] = BRATS,
) -> Phantom:
    """Draw one subject; an image does not depend on which others are drawn.

    Args:
        seed: at least 0; the same seed gives the same phantom.
        shape: (D, H, W) in voxels.
        spacing: edge of a voxel, mm; 1 mm takes 8 times as long as 2 mm.
        modalities: some of ``flair``, ``t1ce``, ``t1``, ``t2``.

    Raises:
        ConfigError: an unknown modality, or a volume that cannot hold the brain.

    Example:
        >>> phantom = draw_phantom(0, shape=(40, 48, 36), spacing=4.0, modalities=("flair", "t1"))
        >>> sorted(phantom.images), phantom.label.shape
        (['flair', 't1'], (40, 48, 36))
    """
    raise_faults(ConfigError, _faults(shape, spacing, modalities))
    body, patient, *scans = np.random.SeedSequence(seed).spawn(2 + len(SEQUENCES))
    space = Space((shape[0], shape[1], shape[2]), spacing)
    anatomy = draw_anatomy(np.random.default_rng(body), space)
    subject = _Subject.draw(np.random.default_rng(patient), space)
    images = {
        name: _scan(np.random.default_rng(scan), space, anatomy, subject, SEQUENCES[name])
        for name, scan in zip(SEQUENCES, scans, strict=True)
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
    """Write one folder per case with the images that are available, and ``seg.nii.gz``.

    Case i depends on ``seed`` and i alone, not on the number of cases or their availability.

    Args:
        folder: gets ``case_000/flair.nii.gz`` and so on; int16 images, uint8 labels.
        availability: bool (N, M), columns in the order of ``modalities``.
        seed: at least 0.
        shape: see ``draw_phantom``.
        spacing: see ``draw_phantom``.
        modalities: M names, see ``draw_phantom``.
        on_case: called with i when case i is written, for a progress bar.

    Returns:
        The N case folders.

    Raises:
        ConfigError: see ``draw_phantom``; also a row of ``availability`` that is not M long
            or has no modality.
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
        case = folder / f"case_{i:03d}"
        for name, image in phantom.images.items():
            # readers take voxels above 0 for the brain: rounding must not remove any
            whole = np.where(image > 0, np.maximum(image.round(), 1), 0)
            _write(case / f"{name}.nii.gz", whole.astype(np.int16), phantom.affine)
        for name in set(modalities) - set(shown):  # left by an earlier run
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
            f"least {SMALLEST_FIELD_OF_VIEW:g} mm each; the whole brain takes 160 x 192 x 144 mm"
        )
    return faults


def _write(
    path: Path, volume: NDArray[np.int16] | NDArray[np.uint8], affine: NDArray[np.float64]
) -> None:
    make_image: Callable[..., Any] = nib.Nifti1Image  # nibabel does not declare its types
    image = make_image(volume, affine)
    image.header.set_xyzt_units("mm")
    with atomic(path) as partial:
        nib.save(image, partial)


@dataclass(frozen=True)
class _Subject:
    """What all images of a subject share: relaxation, uptake of contrast agent, texture."""

    tissues: Mapping[Tissue, Relaxation]
    uptake: Mapping[Tissue, Volume]  # mM
    texture: Volume

    @classmethod
    def draw(cls, rng: np.random.Generator, space: Space) -> _Subject:
        tissues = {}
        for tissue, usual in TISSUES.items():
            t1, t2, density = np.exp(rng.normal(0, (0.03, 0.03, 0.015)))
            tissues[tissue] = Relaxation(usual.t1 * t1, usual.t2 * t2, usual.density * density)
        patchy = np.clip(0.5 + 0.2 * space.field(rng, 5.0), 0.2, 1)
        peak = rng.uniform(0.35, 0.9)
        uptake = {
            Tissue.ENHANCING: (peak * patchy).astype(np.float32),
            Tissue.VESSEL: np.asarray(rng.uniform(0.4, 0.8), np.float32),
            Tissue.NECROSIS: np.asarray(0.04 * peak, np.float32),
        }
        texture = np.exp(0.025 * space.field(rng, 3.0) + 0.02 * space.field(rng, 10.0))
        return cls(tissues, uptake, texture.astype(np.float32))


def _scan(
    rng: np.random.Generator,
    space: Space,
    anatomy: Anatomy,
    subject: _Subject,
    usual: Timing,
) -> Volume:
    """One image: signal, blur, bias field, gain, Rician noise, skull-stripped."""
    jitter = np.exp(rng.normal(0, 0.04, 3).clip(-0.1, 0.1))
    sequence = replace(
        usual,
        repetition=usual.repetition * jitter[0],
        echo=usual.echo * jitter[1],
        # TI is tuned to null fluid, so it varies less
        inversion=None if usual.inversion is None else usual.inversion * jitter[2] ** 0.3,
    )
    image = np.zeros(space.shape, np.float32)
    for tissue, fraction in zip(Tissue, anatomy.maps, strict=True):
        image += fraction * _signal(subject, tissue, sequence)
    in_plane = rng.uniform(0.5, 1.1) / space.spacing
    through = rng.uniform(0.3, 1.3) / space.spacing
    image = ndimage.gaussian_filter(image * subject.texture, (in_plane, in_plane, through))
    bias = 0.6 * space.field(rng, 60.0) + 0.4 * space.field(rng, 35.0)
    image *= np.exp(rng.uniform(0.08, 0.2) * bias).clip(0.7, 1.4)
    level = float(np.median(image[anatomy.brain]))
    sigma = level * rng.uniform(0.025, 0.06)
    real, imaginary = rng.standard_normal((2, *space.shape), np.float32) * np.float32(sigma)
    gain = np.exp(rng.uniform(np.log(150), np.log(1200))) / level
    magnitude = np.hypot(image + real, imaginary) * gain
    return np.where(anatomy.brain, magnitude, 0).astype(np.float32)


def _signal(subject: _Subject, tissue: Tissue, sequence: Timing) -> Volume:
    """Signal of pure tissue: a number, or a volume where the uptake varies."""
    own = subject.tissues[tissue]
    repetition, echo = sequence.repetition, sequence.echo
    if sequence.inversion is not None:
        return inversion_recovery(
            own.density,
            own.t1,
            own.t2,
            repetition=repetition,
            echo=echo,
            inversion=sequence.inversion,
        )
    t1: float | Volume = own.t1
    if sequence.contrast_agent and tissue in subject.uptake:
        t1 = shorten_t1(own.t1, subject.uptake[tissue])
    return spin_echo(own.density, t1, own.t2, repetition=repetition, echo=echo)
