"""``survey``: what a data set has, and every fault that training, evaluation or prediction would meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prism_meta.data.axes import slice_axis
from prism_meta.data.cache import CachedCase
from prism_meta.data.cases import Case, Volume
from prism_meta.data.checks import brain_faults, check_case, no_label
from prism_meta.data.grids import Notes
from prism_meta.data.labels import LabelSet
from prism_meta.data.nifti import NiftiError, read_header
from prism_meta.errors import PrismError, one_line
from prism_meta.training.build import (
    build_episodes,
    build_label_set,
    build_preprocessing,
)
from prism_meta.training.config import Config
from prism_meta.training.config.keys import ARGUMENT_KEYS
from prism_meta.training.setup.cases import file_names, search_configured, training_faults
from prism_meta.training.setup.splitting import both_shown, split
from prism_meta.training.survey.result import CaseSurvey, Survey

#: Called with the number of read cases, the number of all cases, and a name.
OnCase = Callable[[int, int, str], None]


def survey(
    config: Config, root: Path | str, *, fast: bool = False, on_case: OnCase | None = None
) -> Survey:
    """Look through a data set, and find what training, evaluation and prediction would refuse.

    Each case is read to its end, once, and no two are in memory together. The cases are split, and the
    episodes are planned, as training does it. Faults of the model and of the machine are not looked for.

    Args:
        config: names of modalities and labels, the layout, the split, and the kind of episodes.
        root: folder of cases, or a manifest.
        fast: read headers only, which finds no damaged voxels and no unknown label values.
        on_case: called after each case, with its name on one line.

    Example:
        >>> import tempfile
        >>> from prism_meta.data.phantom import write_phantoms
        >>> folder = tempfile.mkdtemp()
        >>> _ = write_phantoms(folder, [[True] * 4, [True, False] * 2], shape=(40, 48, 36), spacing=4.0)
        >>> found = survey(Config(), folder)
        >>> found.missing_rates["t1ce"], found.faults
        (0.5, ())
    """
    names = file_names(config, label=True)
    found = search_configured(config, root, names)
    cases = sorted([*found.cases, *found.refused], key=lambda case: case.id)
    faults = _with_keys(training_faults(found, names))
    plan, more = _planned(config, cases)
    faults += more
    predicted, more = _only_predicted(config, root, cases) if found.only_predicted else ([], [])
    faults += more
    look = _Look(config, plan, fast=fast)
    surveys: list[CaseSurvey] = []
    total = len(cases) + len(predicted)
    lack = bool(found.label_faults(names))  # said once, and not of every case
    for number, case in enumerate(cases, start=1):
        one, own = look(case)
        own = [fault for fault in own if not (lack and fault == no_label(case))]
        faults += own
        surveys.append(replace(one, usable=not own and case not in found.refused))
        if on_case is not None:
            on_case(number, total, one_line(case.id))
    for number, case in enumerate(predicted, start=len(cases) + 1):
        faults += look(case, labelled=False)[1]
        if on_case is not None:
            on_case(number, total, one_line(case.id))
    notes = [*names.notes.lines(), *_notes(surveys, predicted)]
    return Survey(
        found.layout,
        modalities=config.data.modalities,
        cases=tuple(surveys),
        faults=PrismError(list(dict.fromkeys(faults))).faults,
        notes=tuple(one_line(note) for note in notes),
        voxels=not fast,
    )


class _Plan(NamedTuple):
    """The cases by name, as the train batches show them, and as they are prepared for both batches."""

    shown: dict[str, Case]
    prepared: dict[str, Case]


def _planned(config: Config, cases: Sequence[Case]) -> tuple[_Plan, list[str]]:
    """Split the cases and plan the episodes, as training does, and the faults of that.

    Cases that have a fault take part, because the fault may be repaired.
    """
    plan = _Plan({case.id: case for case in cases}, {case.id: case for case in cases})
    if not cases:
        return plan, []
    try:
        training, _, _, meta, _ = split(config, cases)
        meta = meta or training
        plan.shown.update({case.id: case for case in training})
        plan.prepared.update({case.id: case for case in both_shown(training, meta)})
        build_episodes(
            config,
            [
                CachedCase(  # no patch of it is read
                    case.id,
                    case.availability,
                    (1, 1, 1),
                    Path(),
                    other.availability,
                    site=case.site,
                    patient=case.patient,
                )
                for case, other in zip(training, meta, strict=True)
            ],
        )
    except PrismError as error:
        return plan, list(error.faults)
    return plan, []


def _only_predicted(
    config: Config, root: Path | str, cases: Sequence[Case]
) -> tuple[list[Case], list[str]]:
    """The cases without labels, which only predictions use, and the faults of their headers."""
    found = search_configured(config, root, file_names(config, label=False))
    known = {case.id for case in cases}
    return [case for case in found.cases if case.id not in known], _with_keys(found.faults)


class _Look:
    """Reads cases, one after the other."""

    def __init__(self, config: Config, plan: _Plan, *, fast: bool) -> None:
        self.plan, self.fast = plan, fast
        self.labels = build_label_set(config.data)
        self.preprocessing = build_preprocessing(config.data)

    def __call__(self, case: Case, *, labelled: bool = True) -> tuple[CaseSurvey, list[str]]:
        """What a case has, and its faults."""
        one = CaseSurvey(
            case.id,
            patient=case.patient,
            site=case.site,
            modalities=tuple(self.plan.shown.get(case.id, case).files),
            label=case.label is not None,
        )
        if self.fast:
            return _with_header(one, case), [no_label(case)] * (labelled and case.label is None)
        labels = self.labels if labelled else None
        checked = check_case(case, preprocessing=self.preprocessing, labels=labels)
        faults, volume = list(checked.faults), checked.volume
        if volume is None:
            return _with_header(one, case), _with_keys(faults)
        faults += self._hidden_faults(case, volume, labels)
        classes, regions = _ml(checked.classes, volume, self.labels), self.labels.regions
        one = replace(
            one,
            shape=volume.shape,
            spacing=volume.spacing,
            slice_axis=slice_axis(volume.shape, volume.affine),
            classes=classes,
            regions={r: sum(classes[c] for c in set(own)) for r, own in regions.items() if classes},
            intensities={m: (float(x.min()), float(x.max())) for m, x in volume.images.items()},
        )
        return one, _with_keys(faults)

    def _hidden_faults(self, case: Case, volume: Volume, labels: LabelSet | None) -> list[str]:
        """The faults that a case has only because training hides some of its modalities."""
        prepared = self.plan.prepared.get(case.id, case)
        images = {name: x for name, x in volume.images.items() if name in prepared.files}
        if not images or len(images) == len(volume.images):
            return []
        return brain_faults(prepared, replace(volume, images=images), self.preprocessing, labels)


def _with_header(one: CaseSurvey, case: Case) -> CaseSurvey:
    """The grid of a case by its first header that can be read."""
    for path in dict.fromkeys([case.reference, *case.files.values()]):
        with suppress(NiftiError):
            header = read_header(path)
            return replace(
                one,
                shape=header.shape,
                spacing=header.spacing,
                slice_axis=slice_axis(header.shape, header.affine),
            )
    return one


def _ml(classes: Tensor | None, volume: Volume, labels: LabelSet) -> dict[str, float]:
    """The volume of each class, in ml; empty without a label."""
    if classes is None:
        return {}
    voxel = abs(float(np.linalg.det(volume.affine[:3, :3]))) / 1000  # mm^3 to ml
    counts = torch.bincount(classes.flatten(), minlength=len(labels.names)).tolist()
    return {name: voxel * n for name, n in zip(labels.values, counts[1:], strict=True)}


def _notes(cases: Sequence[CaseSurvey], predicted: Sequence[Case]) -> list[str]:
    """What is odd about the voxels, and which cases are not in the survey."""
    notes = Notes()
    for case in cases:
        for name, (low, high) in case.intensities.items():
            if low == high:
                notes.add(
                    "all voxels have the same value, so that the model learns nothing from them; restore "
                    "the files, or remove them (a missing modality is allowed)",
                    f"case {case.id}: {name}",
                )
    listed = list(notes.lines())
    if predicted:
        listed.append(
            f"{len(predicted)} cases without labels are for predictions only, and in no count: "
            f"{', '.join(case.id for case in predicted[:3])}{' ...' if len(predicted) > 3 else ''}"
        )
    return listed


def _with_keys(faults: Sequence[str]) -> list[str]:
    return list(PrismError(faults).with_keys(ARGUMENT_KEYS).faults)
