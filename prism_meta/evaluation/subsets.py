"""Evaluation of a model on every subset of modalities."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from prism_meta.data.cases import Case, Volume
from prism_meta.data.labels import BRATS_LABELS, LabelSet
from prism_meta.data.preprocessing import Preprocessing
from prism_meta.errors import CaseError, raise_faults
from prism_meta.evaluation.inference import Predictor, box_or_whole
from prism_meta.evaluation.metrics import BratsEmpty, EmptyPolicy, dice_hd95
from prism_meta.modalities import subset_name
from prism_meta.modalities import subsets as all_subsets
from prism_meta.records import Record

#: Called with the case, its volume, the subset's name, and truth and prediction as class indices.
OnPrediction = Callable[[Case, Volume, str, Tensor, Tensor], None]


def evaluate(
    model: nn.Module,
    cases: Sequence[Case],
    subsets: Tensor | None = None,
    *,
    preprocessing: Preprocessing | None = None,
    labels: LabelSet = BRATS_LABELS,
    patch: Sequence[int] = (96, 96),
    overlap: float = 0.5,
    empty: EmptyPolicy | None = None,
    on_prediction: OnPrediction | None = None,
) -> list[Record]:
    """Dice and HD95 of every case, subset and region, on each case's own grid.

    A subset is evaluated on the cases that have all its modalities.

    Args:
        model: a trained ``PrismNet`` or wrapped net, in evaluation mode.
        cases: with labels.
        subsets: bool (S, M); all 2^M - 1 unless given.
        preprocessing: as in training.
        labels: classes and regions.
        patch: window in voxels, as in training.
        overlap: of neighbouring windows, in [0, 1).
        empty: what an empty mask gives; ``BratsEmpty`` unless told.
        on_prediction: called after each prediction, for pictures and progress.

    Returns:
        One record per case, subset and region; subset by subset in the order given.

    Raises:
        CaseError: no case, a case without a label, or files that cannot be read; all together.
    """
    faults = [f"case {c.id}: no label file; evaluation needs one" for c in cases if c.label is None]
    raise_faults(
        CaseError, faults if cases else ["cases: none to evaluate on; give a folder of cases"]
    )
    chosen = all_subsets(len(cases[0].modalities)) if subsets is None else subsets
    predictor = Predictor(
        model, preprocessing=preprocessing, labels=labels, patch=patch, overlap=overlap
    )
    empty = empty or BratsEmpty()
    by_subset: list[list[Record]] = [[] for _ in chosen]
    for case in cases:
        volume = case.read()
        truth = _truth(case, volume, labels)
        prepared = predictor.preprocessing(volume)
        possible = (~(chosen & ~case.availability).any(1)).nonzero()[:, 0]
        predictions = predictor.classes(case, volume, prepared, chosen[possible])
        for row, prediction in zip(possible.tolist(), predictions, strict=True):
            name = subset_name(chosen[row].tolist(), case.modalities)
            for region, (dice, hd95) in _measure(prediction, truth, volume, labels, empty).items():
                by_subset[row].append(Record(case.id, name, region, dice, hd95))
            if on_prediction is not None:
                on_prediction(case, volume, name, truth, prediction)
    return [record for records in by_subset for record in records]


def _measure(
    prediction: Tensor, truth: Tensor, volume: Volume, labels: LabelSet, empty: EmptyPolicy
) -> dict[str, tuple[float, float]]:
    """Dice and HD95 of every region of one prediction."""
    # Outside this box no region has a voxel, and finding them takes longer than measuring them.
    box = box_or_whole((prediction | truth) != 0)
    return {
        region: dice_hd95(
            labels.region(prediction[box], region),
            labels.region(truth[box], region),
            spacing=volume.spacing,
            empty=empty,
            shape=volume.shape,
        )
        for region in labels.regions
    }


def _truth(case: Case, volume: Volume, labels: LabelSet) -> Tensor:
    if volume.label is None:
        raise CaseError(f"case {case.id}: no label file; evaluation needs one")
    try:
        return labels.encode(volume.label)
    except CaseError as error:
        raise CaseError([f"case {case.id}: {fault}" for fault in error.faults]) from error
