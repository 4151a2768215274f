"""The tissues of a phantom and their MR properties."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType


class Tissue(IntEnum):
    """The tissues, by their row in the tissue maps."""

    CSF = 0
    GREY = 1
    WHITE = 2
    DEEP_GREY = 3
    OEDEMA = 4
    NECROSIS = 5
    ENHANCING = 6
    VESSEL = 7


@dataclass(frozen=True, kw_only=True)
class Relaxation:
    """MR properties of a tissue.

    Args:
        t1: longitudinal relaxation time, ms.
        t2: transverse relaxation time, ms.
        density: proton density, relative to water.
    """

    t1: float
    t2: float
    density: float


#: Values at 3 T. Healthy tissue follows Wansapura et al., JMRI 9:531 (1999) and Stanisz et al.,
#: MRM 54:507 (2005). Tumour tissue is chosen to give the contrasts of clinical images.
TISSUES: Mapping[Tissue, Relaxation] = MappingProxyType(
    {
        Tissue.CSF: Relaxation(t1=4000, t2=1800, density=1.00),
        Tissue.GREY: Relaxation(t1=1380, t2=95, density=0.81),
        Tissue.WHITE: Relaxation(t1=840, t2=75, density=0.70),
        Tissue.DEEP_GREY: Relaxation(t1=1150, t2=80, density=0.79),
        Tissue.OEDEMA: Relaxation(t1=1600, t2=150, density=0.87),
        Tissue.NECROSIS: Relaxation(t1=2800, t2=300, density=0.93),
        Tissue.ENHANCING: Relaxation(t1=1430, t2=115, density=0.86),
        Tissue.VESSEL: Relaxation(t1=1650, t2=60, density=0.80),
    }
)
