"""Prediction of whole volumes with MONAI's sliding window, on each case's own grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prism_meta.cases import Case, Volume
from prism_meta.data import Prepared, Preprocessing
from prism_meta.files import atomic
from prism_meta.labels import BRATS_LABELS, LabelSet


class Predictor:
    """A model with what it needs to read cases and write labels.

    Args:
        model: ``model.segment(image, mask)`` gives logits; or ``model(image, mask).fused`` does.
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
        self.preprocessing = preprocessing or Preprocessing((2.0, 2.0, 2.0))
        self.patch, self.overlap, self.batch_size = tuple(patch), overlap, batch_size

    @torch.inference_mode()
    def classes(self, case: Case, volume: Volume, prepared: Prepared, shown: Tensor) -> Tensor:
        """Class indices, uint8 (D, H, W), on the case's own grid, from the modalities ``shown``, (M,).

        Raises:
            ValueError: the case lacks a shown modality.
        """
        if (shown & ~case.availability).any():
            raise ValueError(f"shown: {shown.tolist()} has modalities that case {case.id} lacks")
        image = torch.zeros(len(shown), *prepared.brain.shape)
        for name, channel in zip(prepared.names, prepared.image, strict=True):
            image[case.modalities.index(name)] = channel
        # The box is that of the shown modalities: a hidden one has no say in the result.
        box = _bounding_box((image[shown] != 0).any(0))
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        logits = self._windows(image[(slice(None), *box)].to(device), shown.to(device))
        maps = torch.zeros(logits.shape[0], *prepared.brain.shape)
        maps[0] = 1.0  # outside the brain: background
        maps[(slice(None), *box)] = logits.softmax(0).float().cpu()
        return self.preprocessing.restore(maps, prepared, volume).argmax(0).to(torch.uint8)

    def _windows(self, image: Tensor, shown: Tensor) -> Tensor:
        """Logits (K, d, h, w) of image (M, d, h, w)."""
        from monai.inferers.utils import sliding_window_inference

        def segment(windows: Tensor) -> Tensor:
            mask = shown.expand(len(windows), -1)
            if hasattr(self.model, "segment"):
                logits: Tensor = self.model.segment(windows, mask)  # type: ignore[operator]
            else:
                logits = self.model(windows, mask).fused
            return logits.contiguous()

        axial = len(self.patch) == 2
        inputs = image.movedim(-1, 0) if axial else image[None]
        outputs = sliding_window_inference(
            inputs, self.patch, self.batch_size, segment, overlap=self.overlap, mode="gaussian"
        )
        maps = torch.as_tensor(outputs)
        return maps.movedim(0, -1) if axial else maps[0]


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
    if not shown.any():
        raise ValueError("subset: got no modality, expected at least one")
    predictor = Predictor(
        model, preprocessing=preprocessing, labels=labels, patch=patch, overlap=overlap
    )
    if (shown & ~case.availability).any():
        raise ValueError(f"subset: {shown.tolist()} has modalities that case {case.id} lacks")
    volume = case.restrict(shown).read(with_label=False)
    prepared = predictor.preprocessing(volume)
    return labels.decode(predictor.classes(case, volume, prepared, shown))


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


def _bounding_box(inside: Tensor) -> tuple[slice, ...]:
    """The smallest box around True voxels; everything if there is none."""
    if not inside.any():
        return tuple(slice(0, n) for n in inside.shape)
    voxels = inside.nonzero()
    low, high = voxels.amin(0).tolist(), (voxels.amax(0) + 1).tolist()
    return tuple(slice(a, b) for a, b in zip(low, high, strict=True))
