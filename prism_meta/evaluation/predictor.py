"""A trained model with everything it needs to read cases, predict their labels and be measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prism_meta.data.cases import Case, Volume
from prism_meta.data.checks import no_label
from prism_meta.data.labels import BRATS_LABELS, LabelSet
from prism_meta.data.preprocessing import Prepared, Preprocessing, label_classes
from prism_meta.data.restore import restore_classes, restore_probabilities
from prism_meta.empty_masks import BratsEmpty, EmptyPolicy
from prism_meta.errors import CaseError, raise_faults
from prism_meta.evaluation.cleanup import Cleanup
from prism_meta.evaluation.faults import (
    check_finite,
    evaluation_faults,
    memory_as_case_error,
)
from prism_meta.evaluation.regions import measure, voxel_volume
from prism_meta.evaluation.subsets import (
    Subset,
    as_mask,
    as_masks,
    check_subsets,
    in_order,
    shown_rows,
)
from prism_meta.evaluation.windows import OVERLAP, Windows, by_box, evaluation_mode, patch_of
from prism_meta.modalities import subset_name
from prism_meta.modalities import subsets as all_subsets
from prism_meta.records import Record

#: Called with the case, its volume, the subset's name, and truth and prediction as class indices.
OnPrediction = Callable[[Case, Volume, str, Tensor, Tensor], None]


class PredictedMaps(NamedTuple):
    """Predicted labels with the probabilities behind them, on the case's own grid.

    Args:
        labels: (D, H, W), see ``Predictor.predict``.
        probabilities: float32 (K, D, H, W), of the background and of each class, with sum 1.
    """

    labels: NDArray[np.integer[Any]]
    probabilities: Tensor


class Predictor:
    """A model with its preprocessing, labels and window, so that a case is all it asks for.

    ``train`` and ``Run.predictor`` return one that is set up as in training. A case is read and
    preprocessed once for all its subsets. The model is used in evaluation mode and gets its own mode
    back.

    Args:
        model: a ``PrismNet``, or ``wrap(net)``.
        modalities: names of the M modalities in the model's order; cases with others are refused.
            Defaults to no check.
        preprocessing: as in training. Defaults to ``Preprocessing()``.
        labels: classes and regions, as in training.
        patch: window in voxels, as in training; two numbers for slices, three for volumes.
            Defaults to (96, 96) or (64, 64, 64), whichever fits the model's ``spatial_dims``.
        overlap: overlap of neighbouring windows, in [0, 1).
        empty: what an empty mask gives in ``evaluate``. Defaults to ``BratsEmpty()``.
        batch_size: windows per call of the model.
        cleanup: what is removed from predicted labels. The records of ``evaluate`` are those of the labels
            as predicted; see ``CleanedRecords``. Defaults to nothing.

    Raises:
        TypeError: the model is a bare net; use ``wrap(net)``.
        ValueError: the patch does not fit the model, or it is missing and the model does not say how
            many spatial dimensions it has.

    Example:
        >>> import tempfile
        >>> from prism_meta.data.layouts.folders import load_cases
        >>> from prism_meta.data.phantom import write_phantoms
        >>> from prism_meta.networks.prism import PrismNet
        >>> folder = tempfile.mkdtemp()
        >>> _ = write_phantoms(folder, [[True] * 4], shape=(40, 48, 36), spacing=4.0)
        >>> net = PrismNet(spatial_dims=2, width=1)
        >>> predictor = Predictor(net, preprocessing=Preprocessing((4.0, 4.0, 4.0)), patch=(32, 32))
        >>> [case] = load_cases(folder)
        >>> predictor.predict(case, subset="flair+t1").shape
        (40, 48, 36)
        >>> [record.subset for record in predictor.evaluate([case], ["flair+t1"])]
        ['flair+t1', 'flair+t1', 'flair+t1']
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        modalities: Sequence[str] | None = None,
        preprocessing: Preprocessing | None = None,
        labels: LabelSet = BRATS_LABELS,
        patch: Sequence[int] | None = None,
        overlap: float = OVERLAP,
        empty: EmptyPolicy | None = None,
        batch_size: int = 16,
        cleanup: Cleanup | None = None,
    ) -> None:
        self.model, self.labels = model, labels
        self.cleanup = cleanup or Cleanup()
        self.modalities = None if modalities is None else tuple(modalities)
        self.preprocessing = preprocessing or Preprocessing()
        self.empty = empty or BratsEmpty()
        self.windows = Windows(
            model, patch=patch_of(model, patch), overlap=overlap, batch_size=batch_size
        )

    def predict(self, case: Case, *, subset: Subset | None = None) -> NDArray[np.integer[Any]]:
        """Predict the labels of one case.

        Args:
            case: its label, if there is one, is not read.
            subset: modalities to use: a name such as ``"flair+t1"``, or bool (M,). Defaults to all
                modalities that the case has.

        Returns:
            Label volume (D, H, W) of integers, in the values of the label files, on the case's own grid.

        Raises:
            CaseError: a file of the case cannot be read, or the model's output is not finite.
            ValueError: the case lacks a modality of the subset, or the subset is empty.
        """
        shown = case.availability if subset is None else as_mask(subset, case.modalities)
        return self.predict_subsets(case, shown[None])[0]

    def predict_subsets(
        self, case: Case, subsets: Tensor | Sequence[Subset]
    ) -> list[NDArray[np.integer[Any]]]:
        """Predict the labels of one case from each of several subsets of its modalities.

        Args:
            case: only the modalities that a subset shows are read.
            subsets: bool (S, M), or a list of subsets; each has at least one modality.

        Returns:
            S label volumes, see ``predict``.

        Raises:
            CaseError: see ``predict``.
            ValueError: the case lacks a modality of a subset, or a subset is empty.
        """
        rows = shown_rows(case, subsets, self.modalities)
        with memory_as_case_error(case):
            volume = case.restrict(rows.any(0)).read(with_label=False)
            classes = self._classes(case, volume, rows)
            voxel = voxel_volume(volume.affine)
            cleaned = [self.cleanup(one, self.labels, voxel=voxel) for one in classes]
        return [self.labels.decode(prediction) for prediction in cleaned]

    def predict_maps(self, case: Case, *, subset: Subset | None = None) -> PredictedMaps:
        """Predict the labels of one case with the class probabilities that they come from.

        Args:
            case: see ``predict``.
            subset: see ``predict``.

        Returns:
            The labels that ``predict`` returns, and the probabilities, to which no clean-up applies.

        Raises:
            CaseError: see ``predict``.
            ValueError: see ``predict``.
        """
        shown = case.availability if subset is None else as_mask(subset, case.modalities)
        rows = shown_rows(case, shown[None], self.modalities)
        with memory_as_case_error(case):
            volume = case.restrict(rows.any(0)).read(with_label=False)
            ((_, logits, span, prepared),) = self._logits(case, volume, rows)
            grids: Any = {"prepared": prepared, "volume": volume}
            with torch.inference_mode():
                classes = restore_classes(logits, span, **grids).cpu()
                probabilities = restore_probabilities(logits, span, **grids)
            cleaned = self.cleanup(classes, self.labels, voxel=voxel_volume(volume.affine))
        return PredictedMaps(self.labels.decode(cleaned), probabilities)

    def evaluate(
        self,
        cases: Sequence[Case],
        subsets: Tensor | Sequence[Subset] | None = None,
        *,
        on_prediction: OnPrediction | None = None,
    ) -> list[Record]:
        """Measure every case, subset and region on each case's own grid; ``Record`` lists the numbers.

        A subset is evaluated on the cases that have all its modalities.

        Args:
            cases: cases with labels.
            subsets: bool (S, M), or a list of subsets. Defaults to all 2^M - 1.
            on_prediction: called after each prediction, for pictures and progress.

        Returns:
            One record per case, subset and region; subset by subset in the order given.

        Raises:
            CaseError: there is no case, or a case has a fault (see ``evaluate_case``). The faults of all
                cases are reported together; those of headers are found before the first prediction.
        """
        nothing = "cases: got none, expected at least one; give a folder of cases"
        raise_faults(CaseError, evaluation_faults(cases) if cases else [nothing])
        modalities = cases[0].modalities
        chosen = all_subsets(len(modalities)) if subsets is None else as_masks(subsets, modalities)
        for case in cases:
            check_subsets(case, chosen, self.modalities)
        records: list[Record] = []
        faults: list[str] = []
        for case in cases:
            try:
                if (
                    faults
                ):  # the records are lost, so that other cases are only read, for their faults
                    self._read(case)
                else:
                    records += self.evaluate_case(case, chosen, on_prediction=on_prediction)
            except CaseError as error:
                faults += error.faults
        raise_faults(CaseError, faults)
        return in_order(records, [subset_name(row, modalities) for row in chosen.tolist()])

    def evaluate_case(
        self,
        case: Case,
        subsets: Tensor | Sequence[Subset] | None = None,
        *,
        on_prediction: OnPrediction | None = None,
    ) -> list[Record]:
        """Measure one case from each subset whose modalities it has.

        ``evaluate`` calls it for every case. Call it yourself to keep the records of other cases when
        a case has a fault, or to store them as soon as they are there.

        Args:
            case: a case with a label.
            subsets: see ``evaluate``.
            on_prediction: see ``evaluate``.

        Returns:
            One record per subset and region; subset by subset in the order given.

        Raises:
            CaseError: the case has no label, its files cannot be read, its label has unknown values,
                or the model's output is not finite.
        """
        names = case.modalities
        chosen = all_subsets(len(names)) if subsets is None else as_masks(subsets, names)
        check_subsets(case, chosen, self.modalities)
        possible = chosen[~(chosen & ~case.availability).any(1)]
        records: list[Record] = []
        with memory_as_case_error(case):
            volume, truth = self._read(case)
            predictions = self._classes(case, volume, possible)
            for shown, prediction in zip(possible.tolist(), predictions, strict=True):
                name = subset_name(shown, names)
                measured = measure(prediction, truth, volume, labels=self.labels, empty=self.empty)
                records += [
                    Record(case.id, name, region, *scores) for region, scores in measured.items()
                ]
                if on_prediction is not None:
                    on_prediction(case, volume, name, truth, prediction)
        return records

    def _read(self, case: Case) -> tuple[Volume, Tensor]:
        """The voxels of a case and its true classes."""
        if not case.label:
            raise CaseError(no_label(case))
        volume = case.read()
        return volume, label_classes(volume, self.labels)

    def _classes(self, case: Case, volume: Volume, subsets: Tensor) -> Tensor:
        """Class indices, uint8 (S, D, H, W) on the case's own grid, for subsets, bool (S, M).

        Each equals the prediction for a case that has only the modalities of that subset.
        """
        result = torch.zeros(len(subsets), *volume.shape, dtype=torch.uint8)
        with torch.inference_mode():
            for row, logits, span, prepared in self._logits(case, volume, subsets):
                result[row] = restore_classes(logits, span, prepared=prepared, volume=volume)
        return result

    def _logits(
        self, case: Case, volume: Volume, subsets: Tensor
    ) -> Iterator[tuple[int, Tensor, tuple[slice, ...], Prepared]]:
        """Yield each subset's row, its logits (K, d, h, w), and their box on the model's grid."""
        prepared = self.preprocessing(volume)
        image = torch.zeros(subsets.shape[1], *prepared.brain.shape)
        for name, channel in zip(prepared.names, prepared.image, strict=True):
            image[case.modalities.index(name)] = channel
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        # The box is that of the shown modalities, so a hidden one cannot influence the result.
        for box, rows in by_box(image != 0, subsets).items():
            span = tuple(slice(*ends) for ends in box)
            inputs = image[(slice(None), *span)].to(device)
            count = self.windows.at_a_time(inputs, num_classes=len(self.labels.names))
            for some in rows.split(count):
                with torch.inference_mode(), evaluation_mode(self.model):
                    logits = self.windows.logits(inputs, subsets[some].to(device))
                check_finite(logits, case)
                for row, maps in zip(some.tolist(), logits, strict=True):
                    yield row, maps, span, prepared
