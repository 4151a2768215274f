"""The maps that ``predict`` writes beside label volumes on request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from prism_meta.data.cases import Case
from prism_meta.evaluation.predictor import Predictor
from prism_meta.evaluation.saving import save_maps, saved_origin
from prism_meta.evaluation.uncertainty import mutual_information, normalized_entropy


class MapFiles:
    """``CASE_probabilities.nii.gz``, ``CASE_uncertainty.nii.gz`` and ``CASE_disagreement.nii.gz``.

    Args:
        folder: folder of the label volumes.
        members: a predictor for each run. Several of them have a disagreement.
        probabilities: whether the class probabilities are wanted.
        uncertainty: whether their entropy is wanted, and the disagreement of several runs.
    """

    def __init__(
        self,
        folder: Path,
        members: Sequence[Predictor],
        *,
        probabilities: bool,
        uncertainty: bool,
    ) -> None:
        self.folder, self.members = folder, members
        self.kinds = [
            *(["probabilities"] if probabilities else []),
            *(["uncertainty"] if uncertainty else []),
            *(["disagreement"] if uncertainty and len(members) > 1 else []),
        ]

    def of(self, case: str) -> dict[str, Path]:
        """The files of a case by kind."""
        return {kind: self.folder / f"{case}_{kind}.nii.gz" for kind in self.kinds}

    def faults(self, cases: Sequence[Case]) -> dict[str, list[str]]:
        """Case -> what is wrong with the names of its files: they are those of another case's labels."""
        names = {case.id for case in cases}
        return {
            case.id: [
                f"case {case.id}: its file {file.name} is that of the labels of case "
                f"{case.id}_{kind}, too; rename one of the two cases"
                for kind, file in self.of(case.id).items()
                if f"{case.id}_{kind}" in names
            ]
            for case in cases
        }

    def lacking(self, case: str, origin: str) -> list[str]:
        """The kinds whose file is not there, or was not made from ``origin``."""
        return [kind for kind, file in self.of(case).items() if saved_origin(file) != origin]

    def write(
        self,
        case: Case,
        probabilities: Tensor,
        *,
        subset: Sequence[bool],
        kinds: Sequence[str],
        origin: str,
    ) -> None:
        """Write some of the files of a case.

        Args:
            case: the case that was predicted.
            probabilities: (K, D, H, W), averaged over all runs.
            subset: the modalities that were shown.
            kinds: which files.
            origin: what they were made from; see ``save_labels``.

        Raises:
            OutputError: a file cannot be written.
            CaseError: see ``Predictor.predict``.
        """
        files = self.of(case.id)
        for kind in kinds:
            maps = probabilities
            if kind == "uncertainty":
                maps = normalized_entropy(probabilities)
            elif kind == "disagreement":
                each = (member.predict_maps(case, subset=subset) for member in self.members)
                maps = mutual_information(found.probabilities for found in each)
            save_maps(files[kind], maps.numpy(), case, origin=origin)
