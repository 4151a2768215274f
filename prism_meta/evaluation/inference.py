"""Prediction of whole volumes with MONAI's sliding window, on each case's own grid."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prism_meta.data.cases import Case, Volume
from prism_meta.data.labels import BRATS_LABELS, LabelSet
from prism_meta.data.preprocessing import Prepared, Preprocessing
from prism_meta.data.restore import Box, bounding_box, restore_classes
from prism_meta.files import atomic

#: Bytes of logits at a time: 15 subsets of a brain at 1 mm and 4 classes are about 1 GiB.
_LOGITS_BYTES = 2**31


class Predictor:
    """A model with what it needs to read cases and write labels.

    A case is read and preprocessed once for all its subsets. ``model.segment_subsets`` serves a window
    to all of them, as ``PrismNet`` does with one pass of its encoders; other models see a window
    once per subset.

    Args:
        model: ``model.segment_subsets(image, subsets)`` gives logits (S, B, K, *S), whole or one
            subset after the other; or ``model.segment(image, mask)`` gives (B, K, *S); or
            ``model(image, mask).fused`` does.
        preprocessing: as in training.
        labels: as in training.
        patch: window in voxels, as in training; two numbers for axial slices, three for volumes.
        overlap: of neighbouring windows, in [0, 1).
        batch_size: windows per call of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        preprocessing: Preprocessing | None = None,
        labels: LabelSet = BRATS_LABELS,
        patch: Sequence[int] = (96, 96),
        overlap: float = 0.5,
        batch_size: int = 16,
    ) -> None:
        self.model, self.labels = model, labels
        self.preprocessing = preprocessing or Preprocessing()
        self.patch, self.overlap, self.batch_size = tuple(patch), overlap, batch_size

    def predict(self, case: Case, subsets: Tensor) -> list[NDArray[np.int16]]:
        """Label volumes (D, H, W) of one case, from files to values, one for each of ``subsets``.

        Args:
            case: only the modalities that a subset shows are read.
            subsets: bool (S, M), each with a modality.

        Raises:
            CaseError: a file of the case cannot be read.
            ValueError: the case lacks a modality of a subset, or a subset is empty.
        """
        self._check(case, subsets)
        volume = case.restrict(subsets.any(0)).read(with_label=False)
        prepared = self.preprocessing(volume)
        return [self.labels.decode(c) for c in self.classes(case, volume, prepared, subsets)]

    @torch.inference_mode()
    def classes(self, case: Case, volume: Volume, prepared: Prepared, subsets: Tensor) -> Tensor:
        """Class indices on the case's own grid, for each of ``subsets``, bool (S, M).

        Each is what the case would give if it had the modalities of that subset alone.

        Returns:
            uint8 (S, D, H, W).

        Raises:
            ValueError: the case lacks a modality of a subset, or a subset is empty.
        """
        self._check(case, subsets)
        image = torch.zeros(subsets.shape[1], *prepared.brain.shape)
        for name, channel in zip(prepared.names, prepared.image, strict=True):
            image[case.modalities.index(name)] = channel
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        result = torch.zeros(len(subsets), *volume.shape, dtype=torch.uint8)
        # The box is that of the shown modalities: a hidden one has no say in the result.
        for box, rows in _by_box(image != 0, subsets).items():
            span = tuple(slice(*ends) for ends in box)
            inputs = image[(slice(None), *span)].to(device)
            for some in rows.split(self._at_a_time(inputs)):
                logits = self._windows(inputs, subsets[some].to(device))
                for row, maps in zip(some.tolist(), logits, strict=True):
                    result[row] = restore_classes(maps, span, prepared=prepared, volume=volume)
        return result

    def _check(self, case: Case, subsets: Tensor) -> None:
        if subsets.ndim != 2 or subsets.shape[1] != len(case.modalities):
            raise ValueError(
                f"subsets: got {tuple(subsets.shape)}, expected (S, {len(case.modalities)}), a column "
                f"for each of {', '.join(case.modalities)}"
            )
        for shown in subsets:
            if not shown.any():
                raise ValueError("subset: got no modality, expected at least one")
            if (shown & ~case.availability).any():
                raise ValueError(
                    f"subset: {shown.tolist()} has modalities that case {case.id} lacks"
                )

    def _at_a_time(self, image: Tensor) -> int:
        """How many subsets' logits to hold together: those of the image and of a batch of windows."""
        window = math.prod(self.patch) * self.batch_size
        each = (image[0].numel() + window) * len(self.labels.names) * image.element_size()
        return max(1, _LOGITS_BYTES // each)

    def _windows(self, image: Tensor, subsets: Tensor) -> Tensor:
        """Logits (S, K, d, h, w) of image (M, d, h, w)."""
        from monai.inferers.utils import sliding_window_inference

        def segment(windows: Tensor) -> Tensor:
            # One map after the other along the channels: the windows are cut and blended once.
            return torch.cat([maps.contiguous() for maps in self._segment(windows, subsets)], 1)

        axial = len(self.patch) == 2
        inputs = image.movedim(-1, 0) if axial else image[None]
        outputs = sliding_window_inference(
            inputs, self.patch, self.batch_size, segment, overlap=self.overlap, mode="gaussian"
        )
        maps = torch.as_tensor(outputs)
        maps = maps.movedim(0, -1) if axial else maps[0]
        return maps.reshape(len(subsets), -1, *maps.shape[1:])

    def _segment(self, windows: Tensor, subsets: Tensor) -> Iterable[Tensor]:
        """Logits (B, K, *S) for each of the subsets."""
        model: Any = self.model
        if hasattr(model, "segment_subsets"):
            every: Iterable[Tensor] = model.segment_subsets(windows, subsets)
            return every
        masks = (shown.expand(len(windows), -1) for shown in subsets)
        if hasattr(model, "segment"):
            return (model.segment(windows, mask) for mask in masks)
        return (model(windows, mask).fused for mask in masks)


def predict(
    model: nn.Module,
    case: Case,
    *,
    subset: Sequence[bool] | Tensor | None = None,
    preprocessing: Preprocessing | None = None,
    labels: LabelSet = BRATS_LABELS,
    patch: Sequence[int] = (96, 96),
    overlap: float = 0.5,
) -> NDArray[np.int16]:
    """Predict the labels of one case, with any subset of modalities.

    Args:
        model: a trained ``PrismNet`` or wrapped net.
        case: its label, if there is one, is not read.
        subset: (M,) bool, what to show of the case; all that it has unless given.
        preprocessing: as in training.
        labels: as in training.
        patch: window in voxels, as in training; two numbers for axial slices.
        overlap: of neighbouring windows, in [0, 1).

    Returns:
        Label volume (D, H, W), int16, in the values of the label files, on the case's own grid.

    Raises:
        CaseError: a file of the case cannot be read.
        ValueError: the case lacks a modality of the subset, or the subset is empty.
    """
    shown = case.availability if subset is None else torch.as_tensor(subset).bool()
    predictor = Predictor(
        model, preprocessing=preprocessing, labels=labels, patch=patch, overlap=overlap
    )
    return predictor.predict(case, shown[None])[0]


def save_labels(path: Path | str, labels: NDArray[np.int16], case: Case) -> None:
    """Write a label volume with the affine and the coordinate codes of the case's files."""
    source: Any = nib.load(next(iter(case.files.values())))
    image = nib.Nifti1Image(labels, source.affine)
    if isinstance(source.header, nib.Nifti1Header):
        for kind in ("sform", "qform"):
            affine, code = getattr(source, f"get_{kind}")(coded=True)
            if affine is not None:
                getattr(image, f"set_{kind}")(affine, code=int(code))
        image.header.set_xyzt_units(*source.header.get_xyzt_units())
    with atomic(path) as partial:
        nib.save(image, partial)


def box_or_whole(inside: Tensor) -> tuple[slice, ...]:
    """The smallest box around True voxels, bool (D, H, W); everything if there is none."""
    found = bounding_box(inside) or tuple((0, n) for n in inside.shape)
    return tuple(slice(*ends) for ends in found)


def _by_box(inside: Tensor, subsets: Tensor) -> dict[Box, Tensor]:
    """The subsets, (n,) indices, by the box around what they show of inside, bool (M, D, H, W)."""
    boxes = [bounding_box(channel) for channel in inside]
    rows: dict[Box, list[int]] = {}
    for row, shown in enumerate(subsets.tolist()):
        parts = [box for box, s in zip(boxes, shown, strict=True) if s and box is not None]
        ends = zip(*parts, strict=True)
        around = tuple((min(a for a, _ in axis), max(b for _, b in axis)) for axis in ends)
        rows.setdefault(around or tuple((0, n) for n in inside.shape[1:]), []).append(row)
    return {box: torch.tensor(some) for box, some in rows.items()}
