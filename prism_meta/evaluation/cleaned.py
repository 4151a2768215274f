"""Records of cleaned labels, measured beside those of the labels as predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from prism_meta.data.cases import Case, Volume
from prism_meta.evaluation.regions import measure, voxel_volume
from prism_meta.records import Record

if TYPE_CHECKING:
    from prism_meta.evaluation.predictor import Predictor


class CleanedRecords:
    """Cleans predictions up and measures them. Pass it to ``evaluate`` as ``on_prediction``.

    A prediction is cleaned and measured again only if the clean-up changes it, so that most take no time.

    Args:
        predictor: its clean-up, labels and policy for empty masks are used.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.cleanup, self.labels = predictor.cleanup, predictor.labels
        self.empty = predictor.empty
        self._changed: dict[tuple[str, str, str], Record] = {}

    def __call__(
        self, case: Case, volume: Volume, subset: str, truth: Tensor, prediction: Tensor
    ) -> None:
        """Measure a prediction, class indices (D, H, W), after the clean-up."""
        cleaned = self.cleanup(prediction, self.labels, voxel=voxel_volume(volume.affine))
        if cleaned is prediction:
            return
        measured = measure(cleaned, truth, volume, labels=self.labels, empty=self.empty)
        for region, scores in measured.items():
            self._changed[case.id, subset, region] = Record(case.id, subset, region, *scores)

    def records(self, raw: Sequence[Record]) -> list[Record]:
        """The records after the clean-up, for those that ``evaluate`` returned."""
        return [self._changed.get((r.case, r.subset, r.region), r) for r in raw]
