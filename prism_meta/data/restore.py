"""Restoring: from maps on the model's grid back to the case's own grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from prism_meta.data.cases import Volume
from prism_meta.data.preprocessing import Prepared

#: Voxels. A point this close to the centre of a voxel counts as on it, because affines are often
#: stored in float32.
_ON_GRID = 1e-3
#: Slices that are interpolated together: few enough to stay in the processor's cache.
_SLICES_PER_CHUNK = 8
#: (first, last + 1) along each axis. Slices cannot be dictionary keys before Python 3.12.
Box: TypeAlias = tuple[tuple[int, int], ...]


def restore_maps(maps: Tensor, *, prepared: Prepared, volume: Volume) -> Tensor:
    """Resample maps from the model's grid to the case's own, linearly.

    Args:
        maps: (C, d, h, w) on the model's grid.
        prepared: the case on the model's grid.
        volume: the case on its own grid.

    Returns:
        (C, D, H, W), the shape of ``volume``.
    """
    from monai.data.meta_tensor import MetaTensor
    from monai.transforms.spatial.array import SpatialResample

    resample = SpatialResample(mode="bilinear", padding_mode="border", dtype=torch.float32)
    resampled = resample(
        MetaTensor(maps, affine=prepared.affine),
        dst_affine=torch.from_numpy(volume.affine),
        spatial_size=volume.shape,
    )
    return torch.as_tensor(resampled.as_tensor())


def restore_probabilities(
    logits: Tensor, box: Sequence[slice], *, prepared: Prepared, volume: Volume
) -> Tensor:
    """Return the class probabilities of each voxel on the case's own grid, with background outside the box.

    Args:
        logits: see ``restore_classes``.
        box: see ``restore_classes``.
        prepared: see ``restore_classes``.
        volume: see ``restore_classes``.

    Returns:
        (K, D, H, W) float32 on the CPU, interpolated linearly, with sum 1 over the classes.
    """
    maps = torch.zeros(len(logits), *prepared.brain.shape)
    maps[0] = 1.0
    maps[(slice(None), *box)] = logits.softmax(0).float().cpu()
    return restore_maps(maps, prepared=prepared, volume=volume)


def restore_classes(
    logits: Tensor, box: Sequence[slice], *, prepared: Prepared, volume: Volume
) -> Tensor:
    """Return the most probable class of each voxel on the case's own grid.

    The result equals ``restore_maps(probabilities, ...).argmax(0)``, with background outside the
    box, but takes a fraction of its time. A linearly interpolated value lies between the values at
    the corners of its cell. If all corners are background, so is the cell. Hence only the box
    around the foreground is interpolated, one axis at a time. On oblique grids the axes cannot be
    separated, and all maps are resampled.

    Args:
        logits: (K, d, h, w) inside the box; class 0 is the background.
        box: where the logits lie on the model's grid, one slice per axis.
        prepared: the case on the model's grid.
        volume: the case on its own grid.

    Returns:
        uint8 class indices (D, H, W), on the device of ``logits``.

    Example:
        >>> import numpy as np
        >>> affine = np.eye(4)
        >>> volume = Volume({}, affine=affine, shape=(2, 1, 1))
        >>> grid = torch.ones(2, 1, 1).bool()
        >>> prepared = Prepared(
        ...     grid[None].float(), names=("t1",), brain=grid, affine=torch.from_numpy(affine)
        ... )
        >>> logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).reshape(2, 2, 1, 1)
        >>> whole = (slice(0, 2), slice(0, 1), slice(0, 1))
        >>> restore_classes(logits, whole, prepared=prepared, volume=volume).flatten().tolist()
        [0, 1]
    """
    most_probable = _argmax(logits)
    result = most_probable.new_zeros(volume.shape)
    found = bounding_box(most_probable != 0)
    if found is None:
        return result
    foreground = tuple(
        (part.start + low, part.start + high) for part, (low, high) in zip(box, found, strict=True)
    )
    axes = _match_axes(foreground, prepared, volume)
    if axes is None:
        maps = restore_probabilities(logits, box, prepared=prepared, volume=volume)
        return _argmax(maps).to(logits.device)
    if any(axis.weight.any() for axis in axes):
        classes = _interpolate_argmax(_padded_probabilities(logits, found), axes)
    else:  # every voxel of the case lies on a voxel of the model's grid
        classes = most_probable[tuple(slice(*ends) for ends in found)]
        for dim, axis in enumerate(axes):
            classes = classes.index_select(dim, axis.lower.to(classes.device))
    first, second, third = (axis.run for axis in axes)
    result.permute([axis.target for axis in axes])[first, second, third] = classes
    return result


def bounding_box(inside: Tensor) -> Box | None:
    """Return the smallest box around the True voxels, or None if all are False.

    Args:
        inside: bool (D, H, W).

    Example:
        >>> inside = torch.zeros(4, 4, 4, dtype=torch.bool)
        >>> inside[1:3, 2, 0] = True
        >>> bounding_box(inside)
        ((1, 3), (2, 3), (0, 1))
    """
    voxels = inside.cpu().numpy()  # ten times as fast as torch's any and nonzero
    plane = voxels.any(0)
    along = (voxels.reshape(len(voxels), -1).any(1), plane.any(1), plane.any(0))
    found = [np.flatnonzero(axis) for axis in along]
    if not len(found[0]):
        return None
    return tuple((int(indices[0]), int(indices[-1]) + 1) for indices in found)


@dataclass(frozen=True)
class _Axis:
    """Linear interpolation along one axis, from a box of the model's grid to the case's grid.

    Args:
        target: the axis of the case's grid.
        run: the voxels along ``target`` whose values depend on the box.
        lower: (n,) long, index in the box of the voxel at or below each voxel of ``run``. It is -1
            for the voxel before the box.
        weight: (n,) float32 in [0, 1), weight of the voxel above ``lower``.
    """

    target: int
    run: slice
    lower: Tensor
    weight: Tensor

    def matrix(self, size: int) -> Tensor:
        """Interpolation matrix (n, size + 2) for a box of ``size`` voxels, padded by one at both ends."""
        rows = torch.arange(len(self.lower))
        matrix = torch.zeros(len(rows), size + 2)
        matrix[rows, self.lower + 1] = 1 - self.weight
        matrix[rows, self.lower + 2] = self.weight
        return matrix


def _match_axes(box: Box, prepared: Prepared, volume: Volume) -> list[_Axis] | None:
    """The interpolation along each axis of the model's grid; None if the grids are oblique."""
    # From voxel indices of the case to voxel indices of the model's grid.
    change = np.linalg.solve(prepared.affine.numpy(), volume.affine)[:3]
    targets = np.abs(change[:, :3]).argmax(1)
    oblique = np.abs(change[:, :3]) * (np.array(volume.shape) - 1)
    oblique[range(3), targets] = 0
    if len(set(targets.tolist())) < 3 or oblique.sum(1).max() > _ON_GRID:
        return None
    axes = []
    for row, target, size, (start, end) in zip(
        change, targets, prepared.brain.shape, box, strict=True
    ):
        places = row[target] * np.arange(volume.shape[target]) + row[3]
        places = places.clip(0, size - 1)  # values beyond the grid equal its border
        nearest = places.round()
        places = np.where(np.abs(places - nearest) < _ON_GRID, nearest, places)
        lower = np.floor(places)
        weight = places - lower
        touched = np.flatnonzero((lower < end) & (lower + (weight > 0) >= start))
        run = slice(int(touched[0]), int(touched[-1]) + 1) if len(touched) else slice(0, 0)
        below = torch.from_numpy(lower[run].astype(np.int64) - start)
        axes.append(_Axis(int(target), run, below, torch.from_numpy(weight[run]).float()))
    return axes


def _argmax(maps: Tensor) -> Tensor:
    """``maps.argmax(0)`` of (K, ...) as uint8, ten times as fast as torch's own."""
    best = maps[0]
    classes = torch.zeros_like(best, dtype=torch.uint8)
    for k in range(1, len(maps)):
        better = (maps[k] > best).to(torch.uint8).mul_(k)
        torch.maximum(classes, better, out=classes)
        best = torch.maximum(best, maps[k])
    return classes


def _padded_probabilities(logits: Tensor, box: Box) -> Tensor:
    """Class probabilities in a box and one voxel around it; background beyond the logits."""
    shape = [end - start + 2 for start, end in box]
    maps = logits.new_zeros(len(logits), *shape, dtype=torch.float32)
    maps[0] = 1.0
    inside, target = [slice(None)], [slice(None)]
    for (start, end), size in zip(box, logits.shape[1:], strict=True):
        low, high = max(start - 1, 0), min(end + 1, size)
        inside.append(slice(low, high))
        target.append(slice(low - start + 1, high - start + 1))
    maps[tuple(target)] = logits[tuple(inside)].softmax(0)
    return maps


def _interpolate_argmax(maps: Tensor, axes: Sequence[_Axis]) -> Tensor:
    """The most probable class at each voxel of the axes' runs, from maps padded by one voxel."""
    sizes = (n - 2 for n in maps.shape[1:])
    first, second, third = (a.matrix(n).to(maps) for a, n in zip(axes, sizes, strict=True))
    maps = second @ (maps @ third.T)
    parts = [_argmax(rows @ maps.flatten(2)) for rows in first.split(_SLICES_PER_CHUNK)]
    return torch.cat(parts).view(-1, *maps.shape[2:])
