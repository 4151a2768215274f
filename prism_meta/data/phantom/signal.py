"""MR signal equations: spin echo, inversion recovery, and contrast agent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from prism_meta.data.phantom.space import FloatArray

#: Longitudinal relaxivity of a gadolinium chelate at 3 T, 1 / (mM s).
RELAXIVITY = 4.5


@dataclass(frozen=True, kw_only=True)
class PulseSequence:
    """A pulse sequence: a spin echo, or an inversion recovery if ``inversion`` is given.

    Args:
        repetition: repetition time TR, ms.
        echo: echo time TE, ms.
        inversion: inversion time TI, ms. Defaults to None, a spin echo.
        contrast_agent: whether gadolinium was injected before the scan. Defaults to False.
    """

    repetition: float
    echo: float
    inversion: float | None = None
    contrast_agent: bool = False


#: The sequence of each modality.
SEQUENCES: Mapping[str, PulseSequence] = MappingProxyType(
    {
        "flair": PulseSequence(repetition=9000, echo=110, inversion=2500),
        "t1ce": PulseSequence(repetition=520, echo=12, contrast_agent=True),
        "t1": PulseSequence(repetition=520, echo=12),
        "t2": PulseSequence(repetition=4500, echo=95),
    }
)


def spin_echo(
    *, density: float, t1: float | FloatArray, t2: float, repetition: float, echo: float
) -> FloatArray:
    """Spin-echo signal: S = density (1 - exp(-TR / T1)) exp(-TE / T2).

    Args:
        density: proton density, relative to water.
        t1: longitudinal relaxation time, ms; a number or (D, H, W).
        t2: transverse relaxation time, ms.
        repetition: repetition time TR, ms.
        echo: echo time TE, ms.

    Returns:
        The signal, relative; the shape of ``t1``.

    Source: Bernstein, King and Zhou, Handbook of MRI Pulse Sequences (2004), section 14.3.

    Example:
        >>> signal = spin_echo(density=1.0, t1=1000.0, t2=100.0, repetition=1e6, echo=100.0)
        >>> round(float(signal), 4)
        0.3679
    """
    signal = density * (1 - np.exp(-repetition / np.asarray(t1))) * np.exp(-echo / t2)
    return np.asarray(signal, np.float32)


def inversion_recovery(
    *, density: float, t1: float, t2: float, repetition: float, echo: float, inversion: float
) -> FloatArray:
    """Magnitude after inversion recovery: S = density |1 - 2 exp(-TI / T1) + exp(-TR / T1)| exp(-TE / T2).

    A tissue gives no signal at TI = T1 ln 2 if TR is much longer than T1. FLAIR suppresses fluid so.

    Args:
        density: proton density, relative to water.
        t1: longitudinal relaxation time, ms.
        t2: transverse relaxation time, ms.
        repetition: repetition time TR, ms.
        echo: echo time TE, ms.
        inversion: inversion time TI, ms.

    Returns:
        The signal, relative.

    Source: Bernstein, King and Zhou, Handbook of MRI Pulse Sequences (2004), section 14.2.

    Example:
        >>> times = dict(repetition=1e6, echo=0.0, inversion=4000 * np.log(2))
        >>> round(float(inversion_recovery(density=1.0, t1=4000.0, t2=1800.0, **times)), 6)
        0.0
    """
    recovered = np.abs(1 - 2 * np.exp(-inversion / t1) + np.exp(-repetition / t1))
    return np.asarray(density * recovered * np.exp(-echo / t2), np.float32)


def shorten_t1(t1: float, concentration: float | FloatArray) -> FloatArray:
    """T1 with contrast agent: 1 / T1' = 1 / T1 + r1 C, with r1 = 4.5 / (mM s).

    Args:
        t1: T1 without contrast agent, ms.
        concentration: concentration C of the agent, mM; a number or (D, H, W).

    Returns:
        T1' in ms; the shape of ``concentration``.

    Source: Haacke et al., Magnetic Resonance Imaging: Physical Principles and Sequence Design
    (1999).

    Example:
        >>> round(float(shorten_t1(1000.0, 1.0)), 1)  # 1 / (1 / s + 4.5 / s)
        181.8
    """
    return np.asarray(1 / (1 / t1 + RELAXIVITY * np.asarray(concentration) / 1000), np.float32)
