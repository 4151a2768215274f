"""The regions of one prediction, measured against the labels of its case."""

from __future__ import annotations

from torch import Tensor

from prism_meta.data.cases import Volume
from prism_meta.data.labels import LabelSet
from prism_meta.evaluation.metrics import EmptyPolicy, dice_hd95
from prism_meta.evaluation.windows import box_or_whole


def measure(
    prediction: Tensor, truth: Tensor, volume: Volume, *, labels: LabelSet, empty: EmptyPolicy
) -> dict[str, tuple[float, float]]:
    """Region -> Dice and HD95 in mm.

    Args:
        prediction: class indices, uint8 (D, H, W).
        truth: class indices, uint8 (D, H, W).
        volume: gives the spacing in mm.
        labels: which classes form a region.
        empty: what an empty mask gives.
    """
    # No region has a voxel outside this box; cropping is faster than measuring whole volumes.
    box = box_or_whole((prediction | truth) != 0)
    return {
        region: dice_hd95(
            labels.region(prediction[box], region),
            labels.region(truth[box], region),
            spacing=volume.spacing,
            empty=empty,
            shape=volume.shape,
        )
        for region in labels.regions
    }
