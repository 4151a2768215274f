"""Augmentation: random changes of training patches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


class Augmentation:
    """Random flips, rotation, scaling, and intensity changes per modality. It uses MONAI's transforms.

    Args:
        spatial_dims: 2 or 3.
        probability: probability of rotation and scaling. Defaults to 0.3.

    Example:
        >>> import torch
        >>> augment = Augmentation(2)
        >>> augment.seed(0)
        >>> image, target = augment(torch.rand(4, 16, 16), torch.zeros(16, 16).long())
        >>> image.shape, target.shape
        (torch.Size([4, 16, 16]), torch.Size([16, 16]))
    """

    def __init__(self, spatial_dims: int, *, probability: float = 0.3) -> None:
        from monai.transforms.compose import Compose
        from monai.transforms.intensity.dictionary import (
            RandAdjustContrastd,
            RandGaussianNoised,
            RandScaleIntensityd,
            RandShiftIntensityd,
        )
        from monai.transforms.spatial.dictionary import RandAffined, RandFlipd

        keys, axes = ("image", "target"), range(spatial_dims)
        angle = 0.26  # radians, 15 degrees
        self._transform: Any = Compose(
            [
                *(RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in axes),
                RandAffined(
                    keys,
                    prob=probability,
                    rotate_range=[angle] * (1 if spatial_dims == 2 else 3),
                    scale_range=[0.15] * spatial_dims,
                    mode=("bilinear", "nearest"),
                    padding_mode="zeros",
                ),
                RandScaleIntensityd("image", factors=0.2, prob=0.8, channel_wise=True),
                RandShiftIntensityd("image", offsets=0.2, prob=0.8, channel_wise=True),
                RandAdjustContrastd("image", gamma=(0.7, 1.5), prob=0.2, retain_stats=True),
                RandGaussianNoised("image", std=0.1, prob=0.2),
            ]
        )

    def seed(self, seed: int) -> None:
        """Seed the random changes. This takes longer than a patch, so call it once per episode."""
        self._transform.set_random_state(seed=seed)

    def __call__(self, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Change an image (M, *S) and its target (*S) in the same way; returns float32 and long."""
        with _without_tracking():
            out = self._transform({"image": image, "target": target[None].float()})
        return out["image"].float(), out["target"][0].round().long()


@contextmanager
def _without_tracking() -> Iterator[None]:
    """Turn off MONAI's record of applied transforms, which takes a third of the time of an episode."""
    from monai.data.meta_obj import get_track_meta, set_track_meta

    tracked = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(tracked)
