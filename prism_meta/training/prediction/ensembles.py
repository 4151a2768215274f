"""Predictors of several runs, and of mirrored images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from prism_meta.errors import ConfigError, raise_faults
from prism_meta.evaluation.cleanup import BRATS_CLEANUP, Cleanup
from prism_meta.evaluation.predictor import Predictor
from prism_meta.networks.ensemble import Ensemble
from prism_meta.training.build import build_label_set, build_predictor
from prism_meta.training.cleanup.file import read_cleanup
from prism_meta.training.folder.facts import changed_keys
from prism_meta.training.folder.weights import Kind
from prism_meta.training.run import Run

#: Which clean-up to use: the one that the run chose, the rule of BraTS tables, or none.
CleanupChoice = Literal["run", "brats", "none"]
#: What runs must have in common, so that their probabilities can be averaged.
_COMMON = ("modalities", "labels", "regions", "spacing", "patch")


def ensemble_predictor(
    runs: Sequence[Run],
    device: torch.device | str | None = None,
    *,
    weights: Kind | None = None,
    flips: bool = False,
    cleanup: Cleanup | None = None,
) -> Predictor:
    """A predictor that averages the class probabilities of several runs, e.g. of the folds of one data set.

    Args:
        runs: at least one.
        device: device of the models. Defaults to the GPU if there is one.
        weights: see ``Run.load_model``.
        flips: average over mirrored images, too, see ``Ensemble``.
        cleanup: see ``Predictor``.

    Raises:
        ConfigError: the runs differ in modalities, labels, regions, spacing or patch.
        PrismError: see ``Run.load_model``.
    """
    first = runs[0].config.data.model_dump(mode="json", include=set(_COMMON))
    faults = []
    for run in runs[1:]:
        other = run.config.data.model_dump(mode="json", include=set(_COMMON))
        faults += [
            f"{run.folder}: data.{key} is {there}, but {runs[0].folder} has {here}; average runs that have "
            "the same"
            for key, (here, there) in changed_keys(first, other).items()
        ]
    raise_faults(ConfigError, faults)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    models = [run.load_model(device, weights=weights) for run in runs]
    model = models[0] if len(models) == 1 and not flips else Ensemble(models, flips=flips)
    return build_predictor(runs[0].config, model.eval(), cleanup=cleanup)


def member_predictors(runs: Sequence[Run], predictor: Predictor, *, flips: bool) -> list[Predictor]:
    """A predictor for each of several runs, with the models that their ``ensemble_predictor`` has.

    Args:
        runs: those of the predictor.
        predictor: what ``ensemble_predictor`` returned.
        flips: see there.
    """
    if len(runs) == 1:
        return [predictor]
    models = predictor.model.models
    members = [Ensemble([model], flips=True).eval() if flips else model for model in models]  # type: ignore[union-attr]
    return [build_predictor(runs[0].config, member) for member in members]


def cleanup_of(runs: Sequence[Run], choice: CleanupChoice) -> Cleanup:
    """The clean-up of predicted labels.

    Args:
        runs: at least one. Several runs do only what all of them chose.
        choice: ``run``, what the runs chose on their validation cases; ``brats``, the rule of BraTS tables;
            or ``none``.

    Raises:
        PrismError: the file of a run's clean-up is missing or damaged, or there is no region ET.
    """
    if choice == "none":
        return Cleanup()
    if choice == "run":
        return Cleanup.common([read_cleanup(run.folder, run.config) for run in runs])
    regions = build_label_set(runs[0].config.data).regions
    if not set(BRATS_CLEANUP.rules) <= set(regions):
        raise ConfigError(
            f"clean-up: brats is a rule for the region ET, and {runs[0].folder} has "
            f"{', '.join(regions)}; use run or none"
        )
    return BRATS_CLEANUP
