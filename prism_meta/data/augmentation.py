"""Augmentation: random changes of training patches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Largest angle of rotation about each axis in radians, 15 degrees.
_ANGLE = 0.26
#: Largest change of size along each axis.
_SCALE = 0.15
#: Largest change of intensities, by a factor and by a term.
_INTENSITY = 0.2
_GAMMA = (0.7, 1.5)
_NOISE = 0.1


class Augmentation:
    """Random flips, rotation, scaling, and intensity changes per modality. It uses MONAI's transforms.

    Each transform runs once for a batch, on those samples that it changes, each by its own amount.
    MONAI's random transforms would run once per patch, and most of their time is bookkeeping.

    Args:
        spatial_dims: 2 or 3.
        probability: probability of rotation and scaling. Defaults to 0.3.

    Example:
        >>> random = np.random.RandomState(0)
        >>> image, target = torch.rand(2, 4, 16, 16), torch.zeros(2, 16, 16).long()
        >>> image, target = Augmentation(2)(image, target, random)
        >>> image.shape, target.shape
        (torch.Size([2, 4, 16, 16]), torch.Size([2, 16, 16]))
    """

    def __init__(self, spatial_dims: int, *, probability: float = 0.3) -> None:
        self.spatial_dims, self.probability = spatial_dims, probability

    def __call__(
        self, image: Tensor, target: Tensor, random: np.random.RandomState
    ) -> tuple[Tensor, Tensor]:
        """Change images (B, M, *S) and their targets (B, *S) in the same way.

        Args:
            image: (B, M, *S) float.
            target: (B, *S) integers.
            random: source of the random numbers.

        Returns:
            New tensors, float32 and long.
        """
        image = image.to(torch.float32, copy=True)
        labels = target[:, None].to(torch.float32, copy=True)
        with _without_tracking():
            for axis in range(self.spatial_dims):
                image, labels = _flipped(image, labels, axis, _chosen(image, 0.5, random))
            image, labels = self._warped(image, labels, random)
            image = _rescaled(image, random)
            image = _contrasted(image, random)
            image = _noisy(image, random)
        return image, labels[:, 0].round().long()

    def _warped(
        self, image: Tensor, labels: Tensor, random: np.random.RandomState
    ) -> tuple[Tensor, Tensor]:
        """Rotate and scale about the centre; what comes from outside of the patch is 0."""
        from monai.networks.layers.spatial_transforms import AffineTransform
        from monai.transforms.utils import create_rotate, create_scale

        rows, dims = _chosen(image, self.probability, random), self.spatial_dims
        if not len(rows):
            return image, labels
        angles = random.uniform(-_ANGLE, _ANGLE, (len(rows), 1 if dims == 2 else 3))
        sizes = 1 + random.uniform(-_SCALE, _SCALE, (len(rows), dims))
        matrices = [
            create_rotate(dims, angle) @ create_scale(dims, size)
            for angle, size in zip(angles.tolist(), sizes.tolist(), strict=True)
        ]
        theta = torch.as_tensor(np.stack(matrices), dtype=torch.float32)
        options: dict[str, Any] = {"normalized": False, "zero_centered": True}
        for maps, mode in ((image, "bilinear"), (labels, "nearest")):
            maps[rows] = AffineTransform(mode=mode, **options)(maps[rows], theta)
        return image, labels


def _flipped(image: Tensor, labels: Tensor, axis: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    from monai.transforms.spatial.array import Flip

    flip = Flip(axis + 1)  # the axis of modalities comes first
    for maps in (image, labels):
        maps[rows] = flip(maps[rows])
    return image, labels


def _rescaled(image: Tensor, random: np.random.RandomState) -> Tensor:
    """Multiply and shift each modality of a sample by its own numbers."""
    from monai.transforms.intensity.array import ScaleIntensity, ShiftIntensity

    factor, offset = (_per_modality(image, 0.8, random) for _ in range(2))
    changed: Tensor = ShiftIntensity(offset)(
        ScaleIntensity(minv=None, maxv=None, factor=factor)(image)
    )
    return changed


def _contrasted(image: Tensor, random: np.random.RandomState) -> Tensor:
    """Change the contrast of a sample, and keep the mean and the standard deviation."""
    from monai.transforms.intensity.array import AdjustContrast

    for row in _chosen(image, 0.2, random).tolist():
        gamma = random.uniform(*_GAMMA)
        image[row] = AdjustContrast(gamma, retain_stats=True)(image[row])
    return image


def _noisy(image: Tensor, random: np.random.RandomState) -> Tensor:
    from monai.transforms.intensity.array import RandGaussianNoise

    for row in _chosen(image, 0.2, random).tolist():
        noise = RandGaussianNoise(prob=1.0, std=_NOISE)
        noise.set_random_state(state=random)
        image[row] = noise(image[row])
    return image


def _chosen(image: Tensor, probability: float, random: np.random.RandomState) -> Tensor:
    """Indices of the samples to change."""
    return torch.from_numpy(random.random_sample(len(image)) < probability).nonzero().flatten()


def _per_modality(image: Tensor, probability: float, random: np.random.RandomState) -> Tensor:
    """A random number for each modality of the samples to change, 0 for the others: (B, M, 1, ...)."""
    drawn: NDArray[np.float64] = random.uniform(-_INTENSITY, _INTENSITY, image.shape[:2])
    drawn[random.random_sample(len(image)) >= probability] = 0.0
    return torch.from_numpy(drawn).float().view(*image.shape[:2], *[1] * (image.ndim - 2))


@contextmanager
def _without_tracking() -> Iterator[None]:
    """Turn off MONAI's record of applied transforms, which takes longer than most of them."""
    from monai.data.meta_obj import get_track_meta, set_track_meta

    tracked = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(tracked)
