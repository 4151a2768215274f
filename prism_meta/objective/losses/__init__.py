"""PRISM's losses (E5-E9) and the distance of E11 as pure functions, one number per sample.

All functions take logits or features with channels in dimension 1 and any number of spatial dimensions
``*S``, and labels as class indices. They never reduce the batch, because E10 weights the samples first.
"""

from prism_meta.objective.losses.distillation import Direction, pixel_distillation
from prism_meta.objective.losses.prototypes import (
    prototype_distance,
    prototype_l2,
    prototype_similarity,
)
from prism_meta.objective.losses.supervised import (
    segmentation,
    soft_dice,
    weighted_cross_entropy,
)

__all__ = [
    "Direction",
    "pixel_distillation",
    "prototype_distance",
    "prototype_l2",
    "prototype_similarity",
    "segmentation",
    "soft_dice",
    "weighted_cross_entropy",
]
