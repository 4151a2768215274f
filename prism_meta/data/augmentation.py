"""Augmentation: random changes of training patches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812, torch's own convention

#: Largest angle of rotation about each axis in radians, 15 degrees.
_ANGLE = 0.26
#: Largest change of size along each axis.
_SCALE = 0.15
#: Largest change of intensities, by a factor and by a term.
_INTENSITY = 0.2
_GAMMA = (0.7, 1.5)
_NOISE = 0.1


class Augmentation:
    """Random flips, rotation, scaling, and intensity changes per modality.

    Each change runs once for a batch, on those samples that it changes, each by its own amount. MONAI's
    random transforms run once per patch, and most of their time is bookkeeping: with them a patch took
    five times as long. What they compute for intensities is still computed by MONAI.

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
        # The target goes through flips as the last channel, so that each runs once.
        maps = torch.cat((image.float(), target[:, None].float()), 1)
        with _without_tracking():
            for axis in range(self.spatial_dims):
                rows = _chosen(maps, 0.5, random)
                maps[rows] = maps[rows].flip(axis + 2)
            self._warp(maps, random)
            image = _rescaled(maps[:, :-1], random)
            _contrast(image, random)
            _add_noise(image, random)
        return image, maps[:, -1].round().long()

    def _warp(self, maps: Tensor, random: np.random.RandomState) -> None:
        """Rotate and scale about the centre; what comes from outside of the patch is 0."""
        from monai.transforms.utils import create_rotate, create_scale

        rows, dims = _chosen(maps, self.probability, random), self.spatial_dims
        if not len(rows):
            return
        angles = random.uniform(-_ANGLE, _ANGLE, (len(rows), 1 if dims == 2 else 3))
        sizes = 1 + random.uniform(-_SCALE, _SCALE, (len(rows), dims))
        theta = np.stack(
            [
                (create_rotate(dims, angle) @ create_scale(dims, size))[:dims]
                for angle, size in zip(angles.tolist(), sizes.tolist(), strict=True)
            ]
        )
        chosen = maps[rows]
        # From voxels to torch's grids, on which each axis is 2 long and the last axis comes first.
        lengths = np.maximum(np.array(maps.shape[2:]) - 1, 1)
        theta[..., :dims] *= lengths / lengths[:, None]
        theta[..., :dims] = theta[:, ::-1, dims - 1 :: -1]
        # One grid for image and target: MONAI's AffineTransform would compute it for each.
        grid = F.affine_grid(
            torch.from_numpy(theta).float(), list(chosen.shape), align_corners=True
        )
        image, labels = (
            F.grid_sample(part, grid, mode=mode, align_corners=True)
            for part, mode in ((chosen[:, :-1], "bilinear"), (chosen[:, -1:], "nearest"))
        )
        maps[rows] = torch.cat((image, labels), 1)


def _rescaled(image: Tensor, random: np.random.RandomState) -> Tensor:
    """Multiply and shift each modality of a sample by its own numbers."""
    from monai.transforms.intensity.array import ScaleIntensity, ShiftIntensity

    factor, offset = (_per_modality(image, 0.8, random) for _ in range(2))
    changed: Tensor = ShiftIntensity(offset)(
        ScaleIntensity(minv=None, maxv=None, factor=factor)(image)
    )
    return changed


def _contrast(image: Tensor, random: np.random.RandomState) -> None:
    """Change the contrast of a sample, and keep the mean and the standard deviation."""
    from monai.transforms.intensity.array import AdjustContrast

    for row in _chosen(image, 0.2, random).tolist():
        gamma = random.uniform(*_GAMMA)
        image[row] = AdjustContrast(gamma, retain_stats=True)(image[row])


def _add_noise(image: Tensor, random: np.random.RandomState) -> None:
    """Add Gaussian noise to a sample, with a standard deviation of its own."""
    rows = _chosen(image, 0.2, random)
    deviation = torch.from_numpy(random.uniform(0, _NOISE, len(rows))).float()
    # Torch draws float32 three times as fast as numpy's random state draws float64.
    generator = torch.Generator().manual_seed(random.randint(2**31))
    noise = torch.randn(len(rows), *image.shape[1:], generator=generator)
    image[rows] += noise * deviation.view(-1, *[1] * (image.ndim - 1))


def _chosen(image: Tensor, probability: float, random: np.random.RandomState) -> Tensor:
    """Indices of the samples to change."""
    return torch.from_numpy(np.flatnonzero(random.random_sample(len(image)) < probability))


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
