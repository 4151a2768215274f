"""Preprocessing: from the voxels of a case to normalised images on the model's grid."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prism_meta.data.cases import Volume
from prism_meta.data.labels import LabelSet

#: Default voxel size of the model's grid, mm.
DEFAULT_SPACING = (2.0, 2.0, 2.0)


@dataclass(frozen=True)
class Prepared:
    """A preprocessed case, on the model's grid.

    Args:
        image: (m, D, H, W) float32, the z-scored modalities in ``names``.
        names: the m modalities that exist.
        brain: (D, H, W) bool, where any modality is not 0.
        affine: (4, 4), from voxel indices of this grid to mm.
        target: (D, H, W) uint8 class indices. Defaults to None.
    """

    image: Tensor
    _: KW_ONLY
    names: tuple[str, ...]
    brain: Tensor
    affine: Tensor
    target: Tensor | None = None


@dataclass(frozen=True)
class Preprocessing:
    """Brings a case to the model's grid: z-score inside the brain, RAS orientation, resampling.

    Each modality is clipped to percentiles of its non-zero voxels and scaled to mean 0 and standard
    deviation 1 there. The background stays 0. Images are resampled linearly. Labels are resampled
    linearly per class, and each voxel gets the most probable class.

    Args:
        spacing: voxel size of the model's grid in mm, along right, anterior and superior. Defaults
            to 2 mm.
        percentiles: intensities are clipped to these two percentiles. Defaults to (0.5, 99.5).

    Example:
        >>> image = np.random.default_rng(0).random((8, 8, 8), np.float32)
        >>> volume = Volume({"t1": image}, affine=np.eye(4), shape=(8, 8, 8))
        >>> Preprocessing()(volume).image.shape
        torch.Size([1, 4, 4, 4])
    """

    spacing: tuple[float, float, float] = DEFAULT_SPACING
    _: KW_ONLY
    percentiles: tuple[float, float] = (0.5, 99.5)

    def __call__(self, volume: Volume, labels: LabelSet | None = None) -> Prepared:
        """Preprocess one case.

        Args:
            volume: the case on its own grid.
            labels: label set of the case. Defaults to None, which leaves the label out.

        Raises:
            CaseError: a label value is not in ``labels``.
        """
        # Computed before the z-score, which also gives 0 for brain voxels that have the mean value.
        brain = torch.stack([torch.from_numpy(x != 0) for x in volume.images.values()]).any(0)
        images = [torch.from_numpy(self._z_score(x)) for x in volume.images.values()]
        affine = torch.from_numpy(volume.affine)
        image, new_affine = self._resample(torch.stack(images), affine)
        inside = self._resample(brain[None].float(), affine)[0][0] > 0.5
        target = None
        if labels is not None and volume.label is not None:
            # Not nearest-neighbour: at a factor of 2 the neighbours are equally near, and the choice
            # would shift the labels by up to half a voxel against the images.
            one_hot = torch.nn.functional.one_hot(
                labels.encode(volume.label).long(), len(labels.names)
            )
            shares, _ = self._resample(one_hot.movedim(-1, 0).float(), affine)
            target = shares.argmax(0).to(torch.uint8)
        return Prepared(
            image,
            names=tuple(volume.images),
            brain=inside,
            affine=new_affine,
            target=target,
        )

    def _z_score(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """Clip and standardise the non-zero voxels of one modality."""
        inside = image != 0
        if not inside.any():
            return image
        low, high = np.percentile(image[inside], self.percentiles)
        clipped = np.clip(image[inside], low, high)
        result = np.zeros_like(image)
        # A constant image becomes 0. Dividing would amplify the rounding error of its mean.
        if clipped.min() < clipped.max():
            result[inside] = (clipped - clipped.mean()) / clipped.std()
        return result

    def _resample(self, maps: Tensor, affine: Tensor) -> tuple[Tensor, Tensor]:
        """Reorient and resample maps (C, D, H, W); also returns the new affine."""
        from monai.data.meta_tensor import MetaTensor
        from monai.transforms.spatial.array import Orientation, Spacing

        # labels=None: MONAI takes the names of the axes from the affine, as NIfTI defines them.
        oriented = Orientation(axcodes="RAS", labels=None)(MetaTensor(maps, affine=affine))
        resample = Spacing(self.spacing, mode="bilinear", scale_extent=True, dtype=torch.float32)
        result = resample(oriented)
        return torch.as_tensor(result.as_tensor()), torch.as_tensor(result.affine)
