"""Overlays: slices of cases with true and predicted labels, collected during an evaluation."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from prism_meta.data.axes import slice_axis
from prism_meta.data.cases import Case, Volume
from prism_meta.errors import PrismError, raise_faults
from prism_meta.report.slices import Slice


@dataclass(frozen=True)
class Overlay:
    """One slice of one case: an image, the true labels, and the prediction from each subset.

    Args:
        case: name of the case.
        background: (H, W) float, the image, in any unit; NaN is drawn black.
        truth: (H, W) int, class indices.
        predictions: subset name -> (H, W) int, class indices.
        background_name: name of the image, e.g. ``flair``.
        plane: ``axial``, ``coronal`` or ``sagittal``. Defaults to "", not named.
        pixel: height and width of a pixel in mm, or their ratio. Defaults to squares.

    Raises:
        PrismError: the shapes differ.

    Example:
        >>> labels = np.zeros((4, 4), dtype=np.int64)
        >>> Overlay("case1", np.ones((4, 4)), labels, {"t1": labels}, "flair").case
        'case1'
    """

    case: str
    background: NDArray[np.floating[Any]]
    truth: NDArray[np.integer[Any]]
    predictions: Mapping[str, NDArray[np.integer[Any]]]
    background_name: str
    plane: str = ""
    pixel: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        shape = self.background.shape
        maps = {"truth": self.truth, **{f"prediction {k}": v for k, v in self.predictions.items()}}
        faults = [
            f"overlay of {self.case}: {name} is {labels.shape}, expected the background's {shape}, "
            "two sizes; cut all from the same slice"
            for name, labels in maps.items()
            if labels.shape != shape or len(shape) != 2
        ]
        raise_faults(PrismError, faults)

    def to_dict(self) -> dict[str, Any]:
        """The overlay as JSON values, from which ``from_dict`` makes an equal one."""
        return {
            "case": self.case,
            "background": _packed(self.background),
            "truth": _packed(self.truth),
            "predictions": {name: _packed(labels) for name, labels in self.predictions.items()},
            "background_name": self.background_name,
            "plane": self.plane,
            "pixel": self.pixel,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Overlay:
        """The overlay that ``to_dict`` gave.

        Example:
            >>> labels = np.zeros((4, 4), dtype=np.uint8)
            >>> overlay = Overlay("case1", np.ones((4, 4)), labels, {"t1": labels}, "flair")
            >>> Overlay.from_dict(overlay.to_dict()).predictions["t1"].shape
            (4, 4)
        """
        maps = {name: _unpacked(labels) for name, labels in values["predictions"].items()}
        return cls(
            values["case"],
            _unpacked(values["background"]),
            _unpacked(values["truth"]),
            maps,
            values["background_name"],
            values["plane"],
            tuple(values["pixel"]),
        )


def _packed(array: NDArray[Any]) -> dict[str, Any]:
    """An array as JSON values."""
    content = base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes())).decode()
    return {"shape": array.shape, "dtype": array.dtype.str, "zlib": content}


def _unpacked(values: Mapping[str, Any]) -> NDArray[Any]:
    content = zlib.decompress(base64.b64decode(values["zlib"]))
    return np.frombuffer(content, np.dtype(values["dtype"])).reshape(values["shape"])


def check_overlays(overlays: Sequence[Overlay], class_names: Sequence[str]) -> None:
    """Check that ``class_names`` names every class of the overlays.

    Raises:
        PrismError: a class has no name (the faults of all overlays together).
    """
    faults = []
    for overlay in overlays:
        for name, labels in {"truth": overlay.truth, **overlay.predictions}.items():
            if labels.size and not 0 <= labels.min() <= labels.max() < len(class_names):
                faults.append(
                    f"overlay of {overlay.case}: {name} has classes {labels.min()} to "
                    f"{labels.max()}, expected 0 to {len(class_names) - 1}; name every class in "
                    "class_names"
                )
    raise_faults(PrismError, faults)


class OverlayCollector:
    """Keeps one slice of the first few cases, as acquired. Pass it to ``evaluate`` as ``on_prediction``.

    It keeps the slice with the most foreground in the true labels.

    Args:
        cases: number of cases to keep. Defaults to 3.
    """

    def __init__(self, cases: int = 3) -> None:
        self.cases = cases
        self._kept: dict[str, Overlay] = {}
        self._slices: dict[str, Slice] = {}

    def __call__(
        self, case: Case, volume: Volume, subset: str, truth: Tensor, prediction: Tensor
    ) -> None:
        """Keep the slice of ``prediction`` if the case is one of the first ``cases``."""
        if case.id not in self._kept:
            if self.full:
                return
            found = Slice(volume, truth.numpy(), slice_axis(volume.shape, volume.affine))
            self._slices[case.id] = found
            self._kept[case.id] = Overlay(
                case.id, found.background, found.truth, {}, found.name, pixel=found.pixel
            )
        kept = self._kept[case.id]
        maps = {**kept.predictions, subset: self._slices[case.id].cut(prediction.numpy())}
        self._kept[case.id] = replace(kept, predictions=maps)

    @property
    def full(self) -> bool:
        """Whether no more cases are kept."""
        return len(self._kept) >= self.cases

    def get(self, case: str) -> Overlay | None:
        """The overlay of a case with the predictions from all its subsets; None if it is not kept."""
        return self._kept.get(case)

    def add(self, overlay: Overlay) -> None:
        """Keep the overlay of a case from an earlier evaluation, if it is one of the first ``cases``."""
        if not self.full:
            self._kept[overlay.case] = overlay

    def discard(self, case: str) -> None:
        """Keep nothing of a case, because it could not be measured as a whole."""
        self._kept.pop(case, None)

    def overlays(self, subsets: list[str]) -> list[Overlay]:
        """Return an overlay per case, with the predictions from ``subsets`` in that order."""
        return [
            replace(
                kept,
                predictions={s: kept.predictions[s] for s in subsets if s in kept.predictions},
            )
            for kept in self._kept.values()
        ]
