"""Preprocessing: from the voxels of a case to normalised images on the model's grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from nibabel import orientations
from numpy.typing import NDArray
from torch import Tensor

from prism_meta.data.axes import model_codes
from prism_meta.data.cases import ImageArray, Volume
from prism_meta.data.labels import LabelSet
from prism_meta.data.memory import excess
from prism_meta.data.nifti import VOXEL_SIZES
from prism_meta.errors import CaseError, ConfigError, Fault, raise_faults

#: Default voxel size of the model's grid, mm.
DEFAULT_SPACING = (2.0, 2.0, 2.0)
#: Smaller resampled z-scores are 0. torch computes places in float32, up to 3e-5 voxels off and differently
#: on each kind of processor. Where a place is that of a voxel, e.g. at 3 times the resolution, this mixed
#: traces of its neighbours into empty slices, which moved the crop and which InstanceNorm amplified.
TRACE = 1e-3


@dataclass(frozen=True)
class Prepared:
    """A preprocessed case, on the model's grid.

    Args:
        image: (m, D, H, W) float32, the z-scored modalities in ``names``. W counts the slices.
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
    """Brings a case to the model's grid: z-score inside the brain, order of the axes, resampling.

    The slices of a case (``slice_axis``) are stacked along the last axis of its grid, as they were
    acquired. The other two axes keep the order right, anterior, superior, and all three point there.
    So the model's grid of an isotropic volume with axial slices has the axes right, anterior, superior.

    Each modality is clipped to percentiles of its non-zero voxels and scaled to mean 0 and standard
    deviation 1 there. The background stays 0. Images are resampled linearly, and values under ``TRACE``
    become 0. Labels are resampled linearly per class, and each voxel gets the most probable class.

    Args:
        spacing: voxel size of the model's grid in mm: two numbers in the plane of a slice, then the
            distance of the slices. Defaults to 2 mm.
        percentiles: intensities are clipped to these two percentiles. Defaults to (0.5, 99.5).

    Raises:
        ConfigError: a spacing is not a usual voxel size, or the percentiles are not in order.

    Example:
        >>> image = np.random.default_rng(0).random((8, 8, 8), np.float32)
        >>> volume = Volume({"t1": image}, affine=np.eye(4), shape=(8, 8, 8))
        >>> Preprocessing()(volume).image.shape
        torch.Size([1, 4, 4, 4])
    """

    spacing: tuple[float, float, float] = DEFAULT_SPACING
    _: KW_ONLY
    percentiles: tuple[float, float] = (0.5, 99.5)

    def __post_init__(self) -> None:
        smallest, largest = VOXEL_SIZES
        faults = []
        if len(self.spacing) != 3 or not all(smallest <= s <= largest for s in self.spacing):
            faults.append(
                Fault(
                    f"spacing: got {self.spacing}, expected three voxel sizes of {smallest:g} to "
                    f"{largest:g} mm; use a spacing near that of the files, e.g. (1, 1, 1)",
                    "spacing",
                )
            )
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            faults.append(
                Fault(
                    f"percentiles: got {self.percentiles}, expected 0 <= low < high <= 100; use the "
                    "default, (0.5, 99.5)",
                    "percentiles",
                )
            )
        raise_faults(ConfigError, faults)

    def __call__(self, volume: Volume, labels: LabelSet | None = None) -> Prepared:
        """Preprocess one case.

        Args:
            volume: the case on its own grid.
            labels: label set of the case. Defaults to None, which leaves the label out.

        Raises:
            CaseError: a label value is not in ``labels``, the model's grid does not fit into memory, or
                an image has NaN or infinite voxels.
        """
        self.check_size(volume, num_classes=1 if labels is None else len(labels.names))
        images = [
            torch.from_numpy(self._z_score(x, f"{volume.name}: {name}"))
            for name, x in volume.images.items()
        ]
        affine = torch.from_numpy(volume.affine)
        image, new_affine = self._resample(torch.stack(images), affine)
        image = image.where(image.abs() >= TRACE, 0.0)
        target = None
        if labels is not None and volume.label is not None:
            # Not nearest-neighbour: at a factor of 2 the neighbours are equally near, and the choice
            # would shift the labels by up to half a voxel against the images.
            classes = label_classes(volume, labels)
            one_hot = torch.nn.functional.one_hot(classes.long(), len(labels.names))
            shares, _ = self._resample(one_hot.movedim(-1, 0).float(), affine)
            target = shares.argmax(0).to(torch.uint8)
        return Prepared(
            image,
            names=tuple(volume.images),
            brain=self.brain(volume),
            affine=new_affine,
            target=target,
        )

    def brain(self, volume: Volume) -> Tensor:
        """Where any modality of a volume is not 0, on the model's grid: bool (D, H, W)."""
        # Not of the z-scores, which are 0 for brain voxels that have the mean value, too.
        brain = torch.stack([torch.from_numpy(x != 0) for x in volume.images.values()]).any(0)
        inside, _ = self._resample(brain[None].float(), torch.from_numpy(volume.affine))
        return inside[0] > 0.5

    def check_size(self, volume: Volume, *, num_classes: int) -> None:
        """Check that the maps on both grids fit into memory, before any is made.

        Args:
            volume: the case on its own grid.
            num_classes: number of classes with the background; 1 for a volume without a label.

        Raises:
            CaseError: they do not fit.
        """
        shape, _ = self._grid(*_in_model_order(volume.shape, volume.affine))
        own, new = (math.prod(float(n) for n in grid) for grid in (volume.shape, shape))
        maps = len(volume.images) + num_classes
        problem = excess(16 * maps * own + (12 * maps + 24) * new)
        if problem:
            size = " x ".join(
                f"{n * s:.4g}" for n, s in zip(volume.shape, volume.spacing, strict=True)
            )
            raise CaseError(
                [
                    Fault(
                        f"{volume.name}: measures {size} mm and, at a spacing of {self.spacing} mm, "
                        f"{problem}; correct the voxel sizes in its headers, or use a coarser spacing",
                        "spacing",
                    )
                ]
            )

    def _z_score(self, image: ImageArray, name: str) -> NDArray[np.float32]:
        """Clip and standardise the non-zero voxels of one modality, with statistics in float64."""
        result = np.zeros(image.shape, np.float32)
        inside = image != 0
        if not inside.any():
            return result
        values = image[inside].astype(np.float64)
        if not np.isfinite(values).all():
            raise CaseError(
                f"{name} has voxels that are NaN or infinite; repair the file or remove it (a missing "
                "modality is allowed)"
            )
        # Scaled by a power of 2, which rounds nothing: squares of 1e200 or 1e-200 have no float64.
        _, exponent = np.frexp(np.abs(values).max())
        values = np.ldexp(values, -exponent)
        low, high = np.percentile(values, self.percentiles)
        clipped = np.clip(values, low, high)
        # A constant image becomes 0. Dividing would amplify the rounding error of its mean.
        if clipped.min() < clipped.max():
            result[inside] = (clipped - clipped.mean()) / clipped.std()
        return result

    def _grid(
        self, shape: Sequence[int], affine: NDArray[np.float64]
    ) -> tuple[tuple[int, ...], NDArray[np.float64]]:
        """Shape and affine of the model's grid, from those in its order of axes; the extent is the same.

        An axis that is thinner than a voxel keeps one voxel.
        """
        from monai.data.utils import zoom_affine

        sizes = np.linalg.norm(affine[:3, :3], axis=0)
        # A voxel size that differs by less than a thousandth of a mm is kept: no resampling is better.
        sizes = np.where(np.abs(sizes - self.spacing) <= 1e-3, sizes, self.spacing)
        directions: NDArray[np.float64] = zoom_affine(affine, sizes, diagonal=False)
        change = np.linalg.solve(directions[:3, :3], affine[:3, :3])
        extent = np.abs(change) @ np.asarray(shape, np.float64)
        new = tuple(max(1, int(n)) for n in np.round(extent))
        # The corners of both grids are at the same place.
        first = [0.5 * (n / m - 1) for n, m in zip(shape, new, strict=True)]
        directions[:3, 3] = (affine @ [*first, 1.0])[:3]
        return new, directions

    def _resample(self, maps: Tensor, affine: Tensor) -> tuple[Tensor, Tensor]:
        """Reorient and resample maps (C, D, H, W); also returns the new affine."""
        from monai.data.meta_tensor import MetaTensor
        from monai.transforms.spatial.array import Orientation, SpatialResample

        # labels=None: MONAI takes the names of the axes from the affine, as NIfTI defines them.
        codes = model_codes(maps.shape[1:], affine.numpy())
        oriented = Orientation(axcodes=codes, labels=None)(MetaTensor(maps, affine=affine))
        shape, new = self._grid(oriented.shape[1:], np.asarray(oriented.affine, np.float64))
        resample = SpatialResample(mode="bilinear", padding_mode="border", dtype=torch.float32)
        result = resample(oriented, dst_affine=torch.from_numpy(new), spatial_size=shape)
        return torch.as_tensor(result.as_tensor()), torch.from_numpy(new)


def label_classes(volume: Volume, labels: LabelSet) -> Tensor:
    """Class indices of a volume's label, on the volume's grid.

    Raises:
        CaseError: a label value is not in ``labels``.
    """
    if volume.label is None:
        raise CaseError(f"{volume.name}: no label was read; give a case with a label file")
    try:
        return labels.encode(volume.label)
    except CaseError as error:
        prefix = f"{volume.name}: {volume.label_name}"
        raise CaseError([fault.prefixed(prefix) for fault in error.faults]) from error


def _in_model_order(
    shape: Sequence[int], affine: NDArray[np.float64]
) -> tuple[list[int], NDArray[np.float64]]:
    """Shape and affine after reordering the axes as on the model's grid."""
    wanted = orientations.axcodes2ornt(tuple(model_codes(shape, affine)))
    change = orientations.ornt_transform(orientations.io_orientation(affine), wanted)
    moved = [0, 0, 0]
    for size, axis in zip(shape, change[:, 0], strict=True):
        moved[int(axis)] = size
    return moved, affine @ orientations.inv_ornt_aff(change, shape)
