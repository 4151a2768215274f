"""Validation of one subset of modalities, in the regions that a case has."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor, nn

from prism_meta.data.cache import CachedCase
from prism_meta.training.validation.validation import Validation, truth_of


@dataclass(frozen=True)
class OneSubsetValidation(Validation):
    """Measures the Dice of one subset, as the mean over the regions that a case has.

    Unlike that of ``Validation``, the mean of a case leaves out regions with an empty truth: a case without
    enhancing tumour would have Dice 1 or 0 there, which would outweigh everything else among a few cases.
    A case without any region has Dice 1 if nothing is predicted, and otherwise 0 in the regions that are.

    Args:
        subset: bool (M,); all cases have its modalities.
    """

    _: KW_ONLY
    subset: Tensor = field(default_factory=lambda: torch.ones(0, dtype=torch.bool))

    def _subsets(self) -> Tensor:
        return self.subset[None]

    def _of_case(self, model: nn.Module, case: CachedCase) -> dict[str, float]:
        truth = self._regions(truth_of(case))[0].flatten(1)
        there = truth.any(1)
        kept = there if there.any() else torch.ones_like(there)
        found = {}
        for name, classes in self.predictions(model, case):
            predicted = self._regions(classes.cpu())[0].flatten(1)
            size = (predicted.sum(1) + truth.sum(1)).double()
            dice = torch.where(size > 0, 2 * (predicted & truth).sum(1) / size.clamp(min=1), 1.0)
            found[name] = float(dice[kept].mean())
        return found
