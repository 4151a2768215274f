"""Collects the slices that a report shows while an evaluation runs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from prism_meta.data.cases import Case, Volume
from prism_meta.report.figures import Overlay


class OverlayCollector:
    """An ``on_prediction`` of ``evaluate`` that keeps one axial slice of the first few cases.

    The slice is the one with most foreground in the truth.

    Args:
        cases: how many cases to keep.
    """

    def __init__(self, cases: int = 3) -> None:
        self.cases = cases
        self._kept: dict[str, _Slice] = {}

    def __call__(
        self, case: Case, volume: Volume, subset: str, truth: Tensor, prediction: Tensor
    ) -> None:
        """Keep the slice of ``prediction``, if the case is one of those to show."""
        if case.id not in self._kept:
            if len(self._kept) >= self.cases:
                return
            self._kept[case.id] = _Slice(volume, truth)
        kept = self._kept[case.id]
        kept.predictions[subset] = kept.cut(prediction.numpy())

    def overlays(self, subsets: list[str]) -> list[Overlay]:
        """What was kept, with the predictions from ``subsets``, in that order."""
        return [
            Overlay(
                case=name,
                background=kept.background,
                truth=kept.truth,
                predictions={s: kept.predictions[s] for s in subsets if s in kept.predictions},
                background_name=kept.name,
            )
            for name, kept in self._kept.items()
        ]


class _Slice:
    def __init__(self, volume: Volume, truth: Tensor) -> None:
        # The axis nearest to up and down, whatever the order of axes in the file.
        self.axis = int(np.abs(volume.affine[2, :3]).argmax())
        others = tuple(a for a in range(3) if a != self.axis)
        self.index = int((truth > 0).numpy().sum(axis=others).argmax())
        self.swap, self.flips = self._orientation(volume.affine)
        self.name, image = next(iter(volume.images.items()))
        self.background = self.cut(image).astype(np.float32)
        self.truth = self.cut(truth.numpy())
        self.predictions: dict[str, NDArray[np.int64]] = {}

    def cut(self, array: NDArray[Any]) -> NDArray[Any]:
        """The slice with the nose up, and the patient's right on the left."""
        plane = np.take(array, self.index, axis=self.axis)
        if self.swap:
            plane = plane.T
        for axis in self.flips:
            plane = np.flip(plane, axis)
        return np.asarray(plane.T)

    def _orientation(self, affine: NDArray[np.float64]) -> tuple[bool, list[int]]:
        """Whether to swap the two axes left, and which of (x, y) to turn: x to the left, y to the back."""
        first, second = (a for a in range(3) if a != self.axis)
        swap = bool(abs(affine[0, first]) < abs(affine[0, second]))
        x, y = (second, first) if swap else (first, second)
        # NIfTI's x grows to the right and y to the front; radiologists look from the feet.
        return swap, [i for i, wrong in enumerate((affine[0, x] > 0, affine[1, y] > 0)) if wrong]
