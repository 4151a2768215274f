"""The worst cases of an evaluation in three planes, collected while it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from prism_meta.data.axes import patient_axes, slice_axis
from prism_meta.data.cases import Case, Volume
from prism_meta.records import Record
from prism_meta.report.cases import CaseScores, score_cases
from prism_meta.report.overlays import Overlay
from prism_meta.report.slices import Slice


@dataclass(frozen=True)
class WorstCase:
    """A case and its slices.

    Args:
        scores: those of the case.
        planes: one overlay per plane, with the prediction from all modalities that the case has.
    """

    scores: CaseScores
    planes: tuple[Overlay, ...]


class WorstCases:
    """Keeps the cases with the lowest Dice from all modalities that they have.

    Pass it to ``evaluate_case`` as ``on_prediction``, and each case's records to ``add``. It keeps slices of
    only the worst cases so far and of the last case, so that many cases need little memory.

    Args:
        cases: number of cases to keep. Defaults to 3.
    """

    def __init__(self, cases: int = 3) -> None:
        self.cases = cases
        self._kept: list[WorstCase] = []
        self._last: tuple[Overlay, ...] = ()

    def __call__(
        self, case: Case, volume: Volume, subset: str, truth: Tensor, prediction: Tensor
    ) -> None:
        """Cut the planes if ``subset`` has all modalities of the case."""
        if subset.count("+") + 1 == len(case.files):
            self._last = cut_planes(case.id, volume, subset, truth, prediction)

    def wants(self, records: Sequence[Record]) -> bool:
        """Whether a case with these records is one of the worst so far. One without a Dice never is."""
        (scores,) = score_cases(records)
        if math.isnan(scores.dice):
            return False
        return len(self._kept) < self.cases or scores.dice < self._kept[-1].scores.dice

    def add(
        self, records: Sequence[Record], planes: tuple[Overlay, ...] | None = None
    ) -> tuple[Overlay, ...] | None:
        """Keep a case if it is one of the worst so far.

        Args:
            records: those of the case.
            planes: its planes from an earlier evaluation. Defaults to those that were cut last.

        Returns:
            The planes if the case is kept, to be given when the evaluation is resumed; otherwise None.
        """
        if not self.wants(records):
            return None
        (scores,) = score_cases(records)
        if planes is None:  # never those of another patient
            planes = tuple(plane for plane in self._last if plane.case == scores.case)
        found = WorstCase(scores, planes)
        # The sort is stable: of equally bad cases the first stay.
        self._kept = sorted([*self._kept, found], key=lambda kept: kept.scores.dice)[: self.cases]
        return found.planes

    def found(self) -> list[WorstCase]:
        """The worst cases, the worst first."""
        return list(self._kept)


def cut_planes(
    name: str, volume: Volume, subset: str, truth: Tensor, prediction: Tensor
) -> tuple[Overlay, ...]:
    """Cut the axial, the coronal and the sagittal slice with the most true voxels.

    If there are none, the predicted voxels count. A plane that is one voxel thin is left out, unless it is
    that of the acquisition.

    Args:
        name: name of the case.
        volume: its images.
        subset: the modalities that the prediction was made from.
        truth: (D, H, W), class indices.
        prediction: (D, H, W), class indices.
    """
    labels, predicted = truth.numpy(), prediction.numpy()
    counted = labels if (labels > 0).any() else predicted
    nearest, acquired = patient_axes(volume.affine), slice_axis(volume.shape, volume.affine)
    planes = []
    for axis in sorted(range(3), key=lambda axis: -nearest[axis]):
        if axis != acquired and min(n for a, n in enumerate(volume.shape) if a != axis) < 2:
            continue
        cut = Slice(volume, counted, axis)
        overlay = Overlay(
            name, cut.background, cut.cut(labels), {subset: cut.cut(predicted)}, cut.name
        )
        planes.append(replace(overlay, plane=cut.plane, pixel=cut.pixel))
    return tuple(planes)
