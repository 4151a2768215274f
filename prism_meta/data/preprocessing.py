"""From cases to patches: preprocessing, and a cache of which only what is asked for is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from prism_meta.data.cases import Case, Volume
from prism_meta.data.labels import LabelSet
from prism_meta.errors import CaseError, raise_faults
from prism_meta.files import atomic

#: Voxels kept per class to centre patches on; more would only make the cache larger.
_CENTRES_PER_CLASS = 10_000
#: Raise it when preprocessing changes, so that old caches are not used.
_CACHE_VERSION = 3
#: Voxels: what lies closer to a voxel's centre lies on it. Affines are often stored in float32.
_ON_GRID = 1e-3
#: Slices whose maps are interpolated together: few enough for a processor's cache.
_SLICES = 8
#: First and behind the last voxel along each axis; slices cannot be keys before Python 3.12.
Box: TypeAlias = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Prepared:
    """A case on the model's grid.

    Args:
        image: (m, D, H, W) float32, z-scored, of the modalities in ``names``.
        names: the m modalities that exist.
        brain: (D, H, W) bool, where any modality is not 0.
        target: (D, H, W) uint8 class indices, or None.
        affine: (4, 4), voxel of this grid to mm.
    """

    image: Tensor
    names: tuple[str, ...]
    brain: Tensor
    target: Tensor | None
    affine: Tensor


@dataclass(frozen=True)
class Preprocessing:
    """Reorientation to RAS, z-score inside the brain, resampling.

    Each modality is clipped to the percentiles of its non-zero voxels and scaled to mean 0 and
    standard deviation 1 there; the background stays 0. Images are resampled linearly, and so is
    each class of the labels, of which the likeliest is taken.

    Args:
        spacing: of the model's grid in mm, along right, anterior, superior.
        percentiles: outside these, intensities are clipped.
    """

    spacing: tuple[float, float, float] = (2.0, 2.0, 2.0)
    percentiles: tuple[float, float] = (0.5, 99.5)

    def __call__(self, volume: Volume, labels: LabelSet | None = None) -> Prepared:
        """Bring ``volume`` to the model's grid; the label too, if ``labels`` says what it means."""
        # Before the z-score, which is 0 inside the brain too where a voxel has the mean.
        brain = torch.stack([torch.from_numpy(x != 0) for x in volume.images.values()]).any(0)
        images = [torch.from_numpy(self._normalise(x)) for x in volume.images.values()]
        affine = torch.from_numpy(volume.affine)
        image, new_affine = self._resample(torch.stack(images), affine)
        inside = self._resample(brain[None].float(), affine)[0][0] > 0.5
        target = None
        if labels is not None and volume.label is not None:
            # Each class linearly and then the likeliest: nearest voxels would be ties at a factor
            # of 2, and shift the labels by up to half a voxel against the images.
            one_hot = torch.nn.functional.one_hot(
                labels.encode(volume.label).long(), len(labels.names)
            )
            shares, _ = self._resample(one_hot.movedim(-1, 0).float(), affine)
            target = shares.argmax(0).to(torch.uint8)
        return Prepared(image, tuple(volume.images), inside, target, new_affine)

    def restore(self, maps: Tensor, prepared: Prepared, volume: Volume) -> Tensor:
        """Resample maps (C, d, h, w) on the model's grid to the case's own: (C, D, H, W)."""
        from monai.data.meta_tensor import MetaTensor
        from monai.transforms.spatial.array import SpatialResample

        back = SpatialResample(mode="bilinear", padding_mode="border", dtype=torch.float32)
        resampled = back(
            MetaTensor(maps, affine=prepared.affine),
            dst_affine=torch.from_numpy(volume.affine),
            spatial_size=volume.shape,
        )
        return torch.as_tensor(resampled.as_tensor())

    def restore_classes(
        self, logits: Tensor, box: Sequence[slice], *, prepared: Prepared, volume: Volume
    ) -> Tensor:
        """The likeliest class on the case's own grid, from logits in a box of the model's grid.

        It is ``restore(maps, ...).argmax(0)`` of the classes' probabilities, with background outside
        the box. A linear interpolation lies between the corners of its cell: where these are all
        background, so is the cell, and only the box around the foreground is interpolated, axis by
        axis. An oblique grid has no such boxes and takes the way above.

        Args:
            logits: (K, d, h, w), class 0 is the background.
            box: of the model's grid, (d, h, w) voxels.
            prepared: the case on the model's grid.
            volume: the case on its own.

        Returns:
            Class indices, uint8 (D, H, W), on the device of ``logits``.
        """
        likeliest = _likeliest(logits)
        result = likeliest.new_zeros(volume.shape)
        found = box_of(likeliest != 0)
        if found is None:
            return result
        around = zip(box, found, strict=True)
        foreground = tuple((b.start + low, b.start + high) for b, (low, high) in around)
        axes = _axes(foreground, prepared, volume)
        if axes is None:
            maps = torch.zeros(len(logits), *prepared.brain.shape)
            maps[0] = 1.0
            maps[(slice(None), *box)] = logits.softmax(0).float().cpu()
            return _likeliest(self.restore(maps, prepared, volume)).to(logits.device)
        if any(axis.weight.any() for axis in axes):
            classes = _interpolated(_probabilities(logits, found), axes)
        else:  # every voxel of the case is one of the model's
            classes = likeliest[tuple(slice(*ends) for ends in found)]
            for dim, axis in enumerate(axes):
                classes = classes.index_select(dim, axis.lower.to(classes.device))
        first, second, third = (axis.run for axis in axes)
        result.permute([axis.target for axis in axes])[first, second, third] = classes
        return result

    def _normalise(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        inside = image != 0
        if not inside.any():
            return image
        low, high = np.percentile(image[inside], self.percentiles)
        clipped = np.clip(image[inside], low, high)
        result = np.zeros_like(image)
        # A constant image carries nothing: it becomes 0, and not the noise of its rounded mean.
        if clipped.min() < clipped.max():
            result[inside] = (clipped - clipped.mean()) / clipped.std()
        return result

    def _resample(self, maps: Tensor, affine: Tensor) -> tuple[Tensor, Tensor]:
        from monai.data.meta_tensor import MetaTensor
        from monai.transforms.spatial.array import Orientation, Spacing

        # labels=None: the axes' names come from the affine's own space, as NIfTI defines it.
        oriented = Orientation(axcodes="RAS", labels=None)(MetaTensor(maps, affine=affine))
        resample = Spacing(self.spacing, mode="bilinear", scale_extent=True, dtype=torch.float32)
        result = resample(oriented)
        return torch.as_tensor(result.as_tensor()), torch.as_tensor(result.affine)


@dataclass(frozen=True)
class _Axis:
    """How an axis of a case's grid reads an axis of a box of the model's grid, linearly.

    Args:
        target: which axis of the case's grid.
        run: the voxels of that axis that the box has a say in.
        lower: (n,) long, for each of them the box's voxel at or below it; -1 is the one before it.
        weight: (n,) float32, in [0, 1), of the voxel above.
    """

    target: int
    run: slice
    lower: Tensor
    weight: Tensor

    def matrix(self, size: int) -> Tensor:
        """(n, size + 2), from the box's ``size`` voxels with one before and one behind to the run."""
        rows = torch.arange(len(self.lower))
        matrix = torch.zeros(len(rows), size + 2)
        matrix[rows, self.lower + 1] = 1 - self.weight
        matrix[rows, self.lower + 2] = self.weight
        return matrix


def _axes(box: Box, prepared: Prepared, volume: Volume) -> list[_Axis] | None:
    """One for each axis of the model's grid; None if the grids are oblique to each other."""
    change = np.linalg.solve(prepared.affine.numpy(), volume.affine)[:3]  # voxels to voxels
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
        places = places.clip(0, size - 1)  # beyond the grid its border goes on
        nearest = places.round()
        places = np.where(np.abs(places - nearest) < _ON_GRID, nearest, places)
        lower = np.floor(places)
        weight = places - lower
        seen = np.flatnonzero((lower < end) & (lower + (weight > 0) >= start))
        run = slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(0, 0)
        below = torch.from_numpy(lower[run].astype(np.int64) - start)
        axes.append(_Axis(int(target), run, below, torch.from_numpy(weight[run]).float()))
    return axes


def _likeliest(maps: Tensor) -> Tensor:
    """``maps.argmax(0)`` of (K, ...) as uint8; torch's own takes ten times as long."""
    best = maps[0]
    classes = torch.zeros_like(best, dtype=torch.uint8)
    for k in range(1, len(maps)):
        better = (maps[k] > best).to(torch.uint8).mul_(k)
        torch.maximum(classes, better, out=classes)
        best = torch.maximum(best, maps[k])
    return classes


def _probabilities(logits: Tensor, box: Box) -> Tensor:
    """Of every class in a box of the logits and one voxel around it; beyond the logits, background."""
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


def _interpolated(maps: Tensor, axes: Sequence[_Axis]) -> Tensor:
    """The likeliest class at each voxel of the axes' runs, from maps with a voxel around the box."""
    sizes = (n - 2 for n in maps.shape[1:])
    first, second, third = (a.matrix(n).to(maps) for a, n in zip(axes, sizes, strict=True))
    maps = second @ (maps @ third.T)
    parts = [_likeliest(rows @ maps.flatten(2)) for rows in first.split(_SLICES)]
    return torch.cat(parts).view(-1, *maps.shape[2:])


def box_of(inside: Tensor) -> Box | None:
    """The smallest box around the True voxels of (D, H, W); None if there is none."""
    voxels = inside.cpu().numpy()  # a tenth of the time of torch's any and nonzero
    plane = voxels.any(0)
    along = (voxels.reshape(len(voxels), -1).any(1), plane.any(1), plane.any(0))
    found = [np.flatnonzero(axis) for axis in along]
    if not len(found[0]):
        return None
    return tuple((int(indices[0]), int(indices[-1]) + 1) for indices in found)


@dataclass(frozen=True)
class CachedCase:
    """A prepared case on disk, of which only the patches that are asked for are read.

    Args:
        id: name of the case.
        availability: bool (M,).
        shape: (D, H, W) of the prepared volume.
        path: the safetensors file.
    """

    id: str
    availability: Tensor
    shape: tuple[int, int, int]
    path: Path

    def centres(self) -> list[Tensor]:
        """Flat voxel indices to centre patches on: of the brain, then of each foreground class."""
        with safe_open(self.path, framework="pt") as stored:
            count = int(stored.metadata()["centres"])
            return [stored.get_tensor(f"centres_{k}") for k in range(count)]

    def patch(
        self, corner: Sequence[int], size: Sequence[int], shown: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Image (M, *size) and target (*size) of a box; what is not shown is zero, and not read."""
        box = tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))
        image = torch.zeros(len(shown), *size)
        with safe_open(self.path, framework="pt") as stored:
            for m in shown.nonzero().flatten().tolist():
                image[m] = stored.get_slice(f"image_{m}")[box]
            return image, stored.get_slice("target")[box].long()


def prepare(
    cases: Sequence[Case],
    preprocessing: Preprocessing,
    labels: LabelSet,
    cache: Path | str,
    *,
    on_case: Callable[[str], None] | None = None,
) -> list[CachedCase]:
    """Preprocess every case once; a later call, or another run, finds it in the cache.

    Args:
        cases: with labels.
        preprocessing: of all of them.
        labels: what the label files hold.
        cache: folder of the prepared volumes; made if need be.
        on_case: called with the id of each case when it is ready.

    Raises:
        CaseError: the faults of all cases together: no label file, unreadable or NaN volumes,
            labels outside the label set.
    """
    prepared: list[CachedCase] = []
    faults: list[str] = []
    for case in cases:
        try:
            prepared.append(_prepare_one(case, preprocessing, labels, Path(cache)))
        except CaseError as error:
            faults.extend(error.faults)
        if on_case is not None:
            on_case(case.id)
    raise_faults(CaseError, faults)
    return prepared


def _prepare_one(
    case: Case, preprocessing: Preprocessing, labels: LabelSet, cache: Path
) -> CachedCase:
    if case.label is None:
        raise CaseError(f"case {case.id}: no label file; training and evaluation need one")
    path = cache / f"{case.id}-{_fingerprint(case, preprocessing, labels)}.safetensors"
    if not path.exists():
        volume = case.read()
        try:
            ready = preprocessing(volume, labels)
        except CaseError as error:
            raise CaseError(
                [f"case {case.id}: {case.label.name}: {f}" for f in error.faults]
            ) from error
        _store(path, case, ready, num_classes=len(labels.names))
    with safe_open(path, framework="pt") as stored:
        d, h, w = stored.get_slice("target").get_shape()
    return CachedCase(case.id, case.availability, (d, h, w), path)


def _store(path: Path, case: Case, ready: Prepared, *, num_classes: int) -> None:
    if ready.target is None:
        raise CaseError(f"case {case.id}: no label was read")
    if not ready.brain.any():
        names = ", ".join(p.name for p in case.files.values())
        raise CaseError(
            f"case {case.id}: nothing but zeros in {names}; restore the files or remove the case"
        )
    # One tensor per modality, so that a hidden one is not read; half precision halves the reading.
    tensors = {
        f"image_{case.modalities.index(name)}": image.half().contiguous()
        for name, image in zip(ready.names, ready.image, strict=True)
    }
    tensors["target"] = ready.target.contiguous()
    inside = [ready.brain, *(ready.target == k for k in range(1, num_classes))]
    for k, voxels in enumerate(inside):
        flat = voxels.flatten().nonzero().flatten()
        every = max(1, len(flat) // _CENTRES_PER_CLASS)
        tensors[f"centres_{k}"] = flat[::every].contiguous() if k else _even_over_slices(voxels)
    content = save(tensors, metadata={"case": case.id, "centres": str(len(inside))})
    with atomic(path) as partial:
        # save_file's own error would not be an OSError, and so not be explained.
        partial.write_bytes(content)


def _even_over_slices(brain: Tensor) -> Tensor:
    """Flat indices of brain voxels, as many from each axial slice.

    Drawn evenly over voxels, the small slices at the top and bottom of a brain would hardly be seen,
    and that is where a model of axial slices then finds tumours.
    """
    flat = brain.flatten().nonzero().flatten()
    axial = flat % brain.shape[2]
    weights = 1 / torch.bincount(axial)[axial].double()
    drawn = torch.multinomial(
        weights, _CENTRES_PER_CLASS, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    return flat[drawn]


def _fingerprint(case: Case, preprocessing: Preprocessing, labels: LabelSet) -> str:
    """Changes with the files, the modalities, the preprocessing or the labels."""
    files = [*case.files.items(), ("label", case.label)]
    stats = [(n, str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for n, p in files if p]
    facts = (
        _CACHE_VERSION, case.modalities, stats, preprocessing.spacing, preprocessing.percentiles,
        list(labels.values.items()),  # their order gives the class indices
    )  # fmt: skip
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
