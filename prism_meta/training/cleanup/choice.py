"""Chooses a clean-up at the end of a training, on validation cases only."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prism_meta.data.labels import LabelSet
from prism_meta.evaluation.cleanup import (
    Cleanup,
    Components,
    RegionRule,
    outer_first,
    replacement,
)
from prism_meta.evaluation.windows import evaluation_mode
from prism_meta.training.cleanup.file import Chosen, write_cleanup
from prism_meta.training.processes.agreement import Processes
from prism_meta.training.validation.validation import Validation, truth_of

#: Tells what was chosen; the commands print it on standard error.
_log = logging.getLogger(__name__)
#: What is tried in each region. Of equally good rules the first is kept, and the first does nothing.
#: Volumes end at 0.5 ml, that of the rule of BraTS: few cases cannot tell that no larger lesion is ever real.
CANDIDATES: tuple[RegionRule, ...] = (
    RegionRule(),
    *(RegionRule(component_ml=ml) for ml in (0.05, 0.1, 0.2, 0.5)),
    *(RegionRule(total_ml=ml) for ml in (0.05, 0.1, 0.2, 0.5)),
    RegionRule(largest=True),
)


def choose_cleanup(
    validation: Validation, model: nn.Module, *, voxel: float, processes: Processes
) -> Chosen:
    """The clean-up with the best mean Dice over the validation cases, subsets of modalities and regions.

    Regions are decided one after the other, from the outside in, on what the rules before have left. A rule
    is kept only if it raises the mean Dice. Every process must call it; each predicts its share of the cases.

    Args:
        validation: cases that were not trained on.
        model: with the weights that the run predicts with.
        voxel: volume of a voxel of the model's grid in mm^3.
        processes: all of them return the same.

    Source: nnU-Net (Isensee et al., Nature Methods 2021) decides in this way whether to keep only the
    largest component.
    """
    labels, cases = validation.labels, validation.cases
    rank, world = processes.fabric.global_rank, processes.fabric.world_size
    own: list[list[_Kept]] = []
    with torch.inference_mode(), evaluation_mode(model):
        for case in cases[rank::world]:
            truth = truth_of(case)
            maps = validation.predictions(model, case)
            own.append([_Kept.of(name, classes, truth) for name, classes in maps])
    rules: dict[str, RegionRule] = {}
    raw = cleaned = 0.0
    for region in outer_first(labels):
        tables = [
            {one.subset: one.dice(labels, region, voxel=voxel) for one in kept} for kept in own
        ]
        told = processes.gather(tables)
        measured = [told[k % world][k // world] for k in range(len(cases))]
        scores = [
            validation.score([{s: dice[i] for s, dice in of.items()} for of in measured])["dice"]
            for i in range(len(CANDIDATES))
        ]
        best = max(range(len(CANDIDATES)), key=scores.__getitem__)  # the first of equal ones
        raw, cleaned = (raw if rules else scores[0]), scores[best]
        rules[region] = CANDIDATES[best]
        if best:
            step = Cleanup({region: CANDIDATES[best]})
            own = [[one.cleaned(step, labels, voxel=voxel) for one in kept] for kept in own]
    return Chosen(Cleanup({name: rules[name] for name in labels.regions}), raw, cleaned)


def keep_cleanup(
    chosen: Chosen, validation: Validation, processes: Processes, folder: Path | None
) -> Cleanup:
    """Write what ``choose_cleanup`` returned to a run folder, and tell it.

    Args:
        chosen: what was chosen.
        validation: the cases it was chosen on.
        processes: the first one writes.
        folder: the run folder. None for no file.

    Raises:
        OutputError: the file cannot be written.
    """
    with processes.together():
        if processes.fabric.is_global_zero:
            names = [case.id for case in validation.cases]
            if folder is not None:
                write_cleanup(folder, chosen, cases=names)
            if chosen.cleanup.is_on:
                _log.info(
                    "clean-up by %d validation cases: %s (Dice %.3f, without it %.3f)",
                    len(names), chosen.cleanup, chosen.cleaned, chosen.raw,
                )  # fmt: skip
    return chosen.cleanup


class _Kept(NamedTuple):
    """A prediction and its truth, compressed: all of them are kept, and they are mostly background."""

    subset: str
    shape: tuple[int, ...]
    classes: bytes
    truth: bytes

    @classmethod
    def of(cls, subset: str, classes: Tensor, truth: Tensor) -> _Kept:
        return cls(subset, tuple(truth.shape), _packed(classes), _packed(truth))

    def cleaned(self, cleanup: Cleanup, labels: LabelSet, *, voxel: float) -> _Kept:
        classes = torch.from_numpy(self._unpacked(self.classes))
        return self._replace(classes=_packed(cleanup(classes, labels, voxel=voxel)))

    def dice(self, labels: LabelSet, region: str, *, voxel: float) -> list[float]:
        """The mean Dice over all regions, if each of ``CANDIDATES`` is applied to ``region``."""
        classes, truth = self._unpacked(self.classes), self._unpacked(self.truth)
        return list(map(float, candidate_dice(classes, truth, labels, region, voxel=voxel)))

    def _unpacked(self, content: bytes) -> NDArray[np.uint8]:
        flat = np.frombuffer(bytearray(zlib.decompress(content)), dtype=np.uint8)
        return flat.reshape(self.shape)


def candidate_dice(
    classes: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    labels: LabelSet,
    region: str,
    *,
    voxel: float,
    candidates: Sequence[RegionRule] = CANDIDATES,
) -> NDArray[np.float64]:
    """The mean Dice over regions after each of several rules for one region.

    Rules remove whole components, so components are found once for all rules: what each of them changes in
    the sums of Dice is counted, and then added up for those that a rule removes.

    Args:
        classes: predicted class indices (D, H, W).
        truth: true ones.
        labels: classes and regions. A region that is empty in both has Dice 1.
        region: the region that the rules are for.
        voxel: volume of a voxel in mm^3.
        candidates: the rules.

    Returns:
        One number for each of ``candidates``.
    """
    found = Components.of(labels.region(torch.from_numpy(classes), region))
    gone = np.array([rule.removed(found.voxels, voxel=voxel) for rule in candidates], dtype=float)
    predicted, true = classes.reshape(-1)[found.flat], truth.reshape(-1)[found.flat]
    new, count, dice = replacement(labels, region), len(found.voxels), []
    for name in labels.regions:
        member = np.isin(
            np.arange(len(labels.names)), [*map(labels.names.index, labels.regions[name])]
        )
        p, t = member[classes], member[truth]
        change = float(member[new]) - member[predicted]
        size = p.sum() + gone @ _per(found, change, count)
        both = (p & t).sum() + gone @ _per(found, change * member[true], count)
        total = size + t.sum()
        dice.append(np.divide(2 * both, total, out=np.ones(len(gone)), where=total > 0))
    mean: NDArray[np.float64] = np.mean(dice, axis=0)
    return mean


def _per(found: Components, values: NDArray[Any], count: int) -> NDArray[np.float64]:
    """The sum of the values of each component's voxels."""
    sums: NDArray[np.float64] = np.bincount(
        found.component, weights=values.astype(np.float64), minlength=count
    ).astype(np.float64)
    return sums


def _packed(classes: Tensor) -> bytes:
    return zlib.compress(classes.to("cpu", torch.uint8).contiguous().numpy().tobytes(), 1)
