"""``predict`` and ``evaluate`` as functions of a model, for use without a ``Predictor``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from prism_meta.data.cases import Case
from prism_meta.data.labels import BRATS_LABELS, LabelSet
from prism_meta.data.preprocessing import Preprocessing
from prism_meta.empty_masks import EmptyPolicy
from prism_meta.evaluation.predictor import OnPrediction, Predictor
from prism_meta.evaluation.subsets import Subset
from prism_meta.evaluation.windows import OVERLAP
from prism_meta.records import Record


def predict(
    model: nn.Module,
    case: Case,
    *,
    subset: Subset | None = None,
    preprocessing: Preprocessing | None = None,
    labels: LabelSet = BRATS_LABELS,
    patch: Sequence[int] | None = None,
    overlap: float = OVERLAP,
) -> NDArray[np.integer[Any]]:
    """Predict the labels of one case from any subset of its modalities.

    Args:
        model: a trained ``PrismNet`` or wrapped net.
        case: its label, if there is one, is not read.
        subset: a name such as ``"flair+t1"``, or bool (M,). Defaults to all modalities of the case.
        preprocessing: see ``Predictor``.
        labels: see ``Predictor``.
        patch: see ``Predictor``.
        overlap: see ``Predictor``.

    Returns:
        Label volume (D, H, W), int16, in the values of the label files, on the case's own grid.

    Raises:
        CaseError: a file of the case cannot be read.
        ValueError: the case lacks a modality of the subset, or the subset is empty.
    """
    predictor = Predictor(
        model, preprocessing=preprocessing, labels=labels, patch=patch, overlap=overlap
    )
    return predictor.predict(case, subset=subset)


def evaluate(
    model: nn.Module,
    cases: Sequence[Case],
    subsets: Tensor | Sequence[Subset] | None = None,
    *,
    preprocessing: Preprocessing | None = None,
    labels: LabelSet = BRATS_LABELS,
    patch: Sequence[int] | None = None,
    overlap: float = OVERLAP,
    empty: EmptyPolicy | None = None,
    on_prediction: OnPrediction | None = None,
) -> list[Record]:
    """Measure every case, subset and region; see ``Predictor.evaluate``.

    Args:
        model: a trained ``PrismNet`` or wrapped net.
        cases: cases with labels.
        subsets: bool (S, M), or a list such as ``["flair", "flair+t1"]``. Defaults to all 2^M - 1.
        preprocessing: see ``Predictor``.
        labels: see ``Predictor``.
        patch: see ``Predictor``.
        overlap: see ``Predictor``.
        empty: see ``Predictor``.
        on_prediction: called after each prediction, for pictures and progress.

    Returns:
        One record per case, subset and region; subset by subset in the order given.

    Raises:
        CaseError: there is no case, a case has no label, or files cannot be read.
    """
    predictor = Predictor(
        model,
        preprocessing=preprocessing,
        labels=labels,
        patch=patch,
        overlap=overlap,
        empty=empty,
    )
    return predictor.evaluate(cases, subsets, on_prediction=on_prediction)
