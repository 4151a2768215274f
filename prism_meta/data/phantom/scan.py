"""The scan of a phantom: from tissue maps to an image with blur, bias field and noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from prism_meta.data.phantom.anatomy import Anatomy
from prism_meta.data.phantom.signal import PulseSequence, inversion_recovery, shorten_t1, spin_echo
from prism_meta.data.phantom.space import FloatArray, Space
from prism_meta.data.phantom.tissues import TISSUES, Relaxation, Tissue


@dataclass(frozen=True)
class Subject:
    """The properties of a subject that all its images share.

    Args:
        tissues: MR properties of the subject's tissues.
        uptake: concentration of contrast agent in the tissues that take it up, mM.
        texture: (D, H, W), factor of the signal.
    """

    tissues: Mapping[Tissue, Relaxation]
    uptake: Mapping[Tissue, FloatArray]
    texture: FloatArray

    @classmethod
    def draw(cls, rng: np.random.Generator, space: Space) -> Subject:
        """Draw a subject: tissues that deviate by a few percent, patchy uptake, fine texture."""
        tissues = {}
        for tissue, usual in TISSUES.items():
            t1, t2, density = np.exp(rng.normal(0, (0.03, 0.03, 0.015)))
            tissues[tissue] = Relaxation(
                t1=usual.t1 * t1, t2=usual.t2 * t2, density=usual.density * density
            )
        patchy = np.clip(0.5 + 0.2 * space.field(rng, 5.0), 0.2, 1)
        peak = rng.uniform(0.35, 0.9)
        uptake = {
            Tissue.ENHANCING: (peak * patchy).astype(np.float32),
            Tissue.VESSEL: np.asarray(rng.uniform(0.4, 0.8), np.float32),
            Tissue.NECROSIS: np.asarray(0.04 * peak, np.float32),
        }
        texture = np.exp(0.025 * space.field(rng, 3.0) + 0.02 * space.field(rng, 10.0))
        return cls(tissues, uptake, texture.astype(np.float32))


def scan(
    rng: np.random.Generator,
    space: Space,
    *,
    anatomy: Anatomy,
    subject: Subject,
    usual: PulseSequence,
) -> FloatArray:
    """Draw one image: signal, blur, bias field, gain and Rician noise, without the skull.

    Args:
        rng: source of the random numbers.
        space: the voxel grid.
        anatomy: the tissue maps.
        subject: the properties that all images of the subject share.
        usual: the sequence; its times vary by a few percent between scanners.

    Returns:
        (D, H, W), arbitrary units; 0 outside the brain.
    """
    jitter = np.exp(rng.normal(0, 0.04, 3).clip(-0.1, 0.1))
    sequence = replace(
        usual,
        repetition=usual.repetition * jitter[0],
        echo=usual.echo * jitter[1],
        # TI varies less because scanners tune it to suppress fluid
        inversion=None if usual.inversion is None else usual.inversion * jitter[2] ** 0.3,
    )
    image = np.zeros(space.shape, np.float32)
    for tissue, fraction in zip(Tissue, anatomy.maps, strict=True):
        image += fraction * _tissue_signal(subject, tissue, sequence)
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


def _tissue_signal(subject: Subject, tissue: Tissue, sequence: PulseSequence) -> FloatArray:
    """Signal of pure tissue: a number, or (D, H, W) if the uptake of contrast agent varies."""
    own = subject.tissues[tissue]
    repetition, echo = sequence.repetition, sequence.echo
    if sequence.inversion is not None:
        return inversion_recovery(
            density=own.density,
            t1=own.t1,
            t2=own.t2,
            repetition=repetition,
            echo=echo,
            inversion=sequence.inversion,
        )
    t1: float | FloatArray = own.t1
    if sequence.contrast_agent and tissue in subject.uptake:
        t1 = shorten_t1(own.t1, subject.uptake[tissue])
    return spin_echo(density=own.density, t1=t1, t2=own.t2, repetition=repetition, echo=echo)
