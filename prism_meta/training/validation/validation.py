"""Validation: Dice on cases that the training does not see, from every subset of modalities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from prism_meta.data.cache import CachedCase
from prism_meta.data.labels import LabelSet
from prism_meta.evaluation.windows import OVERLAP, Windows, by_box, evaluation_mode
from prism_meta.modalities import subset_name
from prism_meta.modalities import subsets as all_subsets
from prism_meta.training.config.types import Select

#: Windows per call of the model.
_BATCH = 16


@dataclass(frozen=True)
class Validation:
    """What to validate on, how often, and what follows from it.

    Dice is measured on the model's grid, where no prediction has to be resampled. All subsets of a case
    share one pass. A subset that no case has is left out.

    Args:
        cases: prepared cases that are not trained on.
        modalities: their names, in the model's order.
        labels: classes and regions.
        patch: window in voxels; two numbers for slices, three for volumes.
        overlap: of neighbouring windows, in [0, 1).
        every: outer steps between validations; the last step is always followed by one.
        select: which Dice the best weights have.
        patience: training ends after this many validations in a row without a better one. Defaults to
            no early end.

    Raises:
        ValueError: there is no case.
    """

    cases: Sequence[CachedCase]
    modalities: Sequence[str]
    labels: LabelSet
    patch: Sequence[int]
    overlap: float = OVERLAP
    every: int = 100
    select: Select = "mean"
    patience: int | None = None

    def __post_init__(self) -> None:
        if not self.cases:
            raise ValueError("validation: got no cases, expected at least one")

    def dice(self, model: nn.Module, cases: Sequence[CachedCase]) -> list[dict[str, float]]:
        """The Dice of ``model`` on each of ``cases``: subset -> mean over regions, in [0, 1].

        A region that is empty in both masks has Dice 1, and one that is empty in one of them has 0.

        Args:
            model: a ``SegmentationModel``; its mode is kept, and no random number is drawn.
            cases: some of the cases.
        """
        with torch.inference_mode(), evaluation_mode(model):
            return [self._of_case(model, case) for case in cases]

    def score(self, measured: Sequence[dict[str, float]]) -> dict[str, Any]:
        """The means over cases.

        Args:
            measured: what ``dice`` returned, for all cases.

        Returns:
            ``dice``, the mean over subsets; ``worst``, that of the worst subset; ``worst_subset``, its
            name; and ``subsets``, the Dice of each.
        """
        names = [subset_name(row, self.modalities) for row in self._subsets().tolist()]
        found = {n: [case[n] for case in measured if n in case] for n in names}
        means = {name: fmean(values) for name, values in found.items() if values}
        worst = min(means, key=means.__getitem__)
        return {
            "dice": fmean(means.values()),
            "worst": means[worst],
            "worst_subset": worst,
            "subsets": means,
        }

    def slice_of_first(self, model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """The slice of the first case with the most label, predicted from all modalities of the case.

        Args:
            model: see ``dice``.

        Returns:
            The first of its modalities, the true and the predicted class indices, each (D, H).
        """
        case = self.cases[0]
        image, target = case.patch((0, 0, 0), case.shape, shown=case.availability)
        with torch.inference_mode(), evaluation_mode(model):
            ((_, classes),) = self._predictions(model, image, case.availability[None])
        k = int((target > 0).sum((0, 1)).argmax())
        first = int(case.availability.int().argmax())
        return image[first, ..., k], target[..., k], classes[..., k]

    def predictions(self, model: nn.Module, case: CachedCase) -> Iterator[tuple[str, Tensor]]:
        """The prediction from each subset that a case has: its name and class indices.

        The indices are long (D, H, W) on the model's grid, on the model's device. Call it within
        ``torch.inference_mode`` and ``evaluation_mode``.
        """
        image, _ = case.patch((0, 0, 0), case.shape, shown=case.availability)
        possible = self._subsets()
        possible = possible[~(possible & ~case.availability).any(1)]
        for shown, classes in self._predictions(model, image, possible):
            yield subset_name(shown, self.modalities), classes

    def _of_case(self, model: nn.Module, case: CachedCase) -> dict[str, float]:
        from monai.metrics.meandice import compute_dice

        truth = self._regions(truth_of(case).to(_device_of(model)))
        found: dict[str, float] = {}
        for name, classes in self.predictions(model, case):
            values = compute_dice(
                self._regions(classes), truth, include_background=True, ignore_empty=False
            )
            found[name] = float(values.mean())
        return found

    def _predictions(
        self, model: nn.Module, image: Tensor, subsets: Tensor
    ) -> Iterator[tuple[list[bool], Tensor]]:
        """Each of ``subsets``, bool (S, M), and the class indices (D, H, W) predicted from it."""
        device = _device_of(model)
        windows = Windows(model, patch=self.patch, overlap=self.overlap, batch_size=_BATCH)
        # As in prediction: the box is that of the shown modalities.
        for box, rows in by_box(image != 0, subsets).items():
            span = tuple(slice(*ends) for ends in box)
            inputs = image[(slice(None), *span)].to(device)
            count = windows.at_a_time(inputs, num_classes=len(self.labels.names))
            for some in rows.split(count):
                logits = windows.logits(inputs, subsets[some].to(device))
                for row, maps in zip(some.tolist(), logits, strict=True):
                    classes = torch.zeros(image.shape[1:], dtype=torch.long, device=device)
                    classes[span] = maps.argmax(0)
                    yield subsets[row].tolist(), classes

    def _regions(self, classes: Tensor) -> Tensor:
        """Bool (1, R, D, H, W): the regions of class indices (D, H, W)."""
        regions = [self.labels.region(classes, region) for region in self.labels.regions]
        return torch.stack(regions)[None]

    def _subsets(self) -> Tensor:
        return all_subsets(len(self.modalities))


def truth_of(case: CachedCase) -> Tensor:
    """The true class indices of a prepared case, long (D, H, W)."""
    nothing = torch.zeros_like(case.availability)
    return case.patch((0, 0, 0), case.shape, shown=nothing)[1]


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
