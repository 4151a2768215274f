"""The cases of a run: loaded, split into training and test cases, and prepared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from prism_meta.data.availability import apply_availability, drop_modalities
from prism_meta.data.cache import CachedCase, prepare
from prism_meta.data.cases import Case
from prism_meta.data.layouts.folders import find_cases, load_cases
from prism_meta.errors import CaseError, ConfigError
from prism_meta.files import writable_folder
from prism_meta.training.build import build_label_set, build_preprocessing, configuration_keys
from prism_meta.training.config import Config
from prism_meta.training.config.keys import ARGUMENT_KEYS
from prism_meta.training.processes import Processes
from prism_meta.training.stopping import TrainingStopped


def load_configured(config: Config, root: Path | str) -> list[Case]:
    """Load the cases of a folder with the modalities and the label that the configuration names."""
    with configuration_keys():
        data = config.data
        return load_cases(Path(root), data.modalities, label=data.label, align=data.align)


def find_configured(
    config: Config, root: Path | str, *, label: bool
) -> tuple[list[Case], list[str]]:
    """The cases of a folder without faults, and the faults of the others; see ``load_configured``.

    Args:
        config: names of the modalities and of the label.
        root: the folder.
        label: False leaves the labels out, so that a damaged one is no fault.
    """
    data = config.data
    cases, faults = find_cases(
        Path(root), data.modalities, label=data.label if label else None, align=data.align
    )
    return cases, list(CaseError(faults).with_keys(ARGUMENT_KEYS).faults)


def split(config: Config, cases: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    """Split cases into training and test cases.

    The configuration can make modalities of the training cases missing.

    Raises:
        ConfigError: a test case does not exist, or no case is left to train on.
        CaseError: the availability table does not fit the cases.
    """
    data = config.data
    by_id = {case.id: case for case in cases}
    unknown = [name for name in data.test_cases if name not in by_id]
    if unknown:
        raise ConfigError(
            f"data.test_cases: no such case: {', '.join(unknown)}; name cases of the folder"
        )
    if max(data.holdout, len(data.test_cases)) >= len(cases):
        raise ConfigError(
            f"data.holdout: leaves none of {len(cases)} cases to train on; hold fewer out"
        )
    held = set(data.test_cases)
    if data.holdout:
        order = torch.randperm(len(cases), generator=torch.Generator().manual_seed(config.seed))
        held = {cases[i].id for i in order[: data.holdout].tolist()}
    training = [case for case in cases if case.id not in held]
    with configuration_keys():
        if data.availability is not None:
            training = apply_availability(training, data.availability)
        elif data.missing_rates is not None:
            training = drop_modalities(training, data.missing_rates, seed=config.seed)
    return training, [case for case in cases if case.id in held]


def prepare_configured(
    config: Config,
    cases: Sequence[Case],
    cache: Path,
    *,
    processes: Processes,
    on_case: Callable[[int, int, str], None],
    should_stop: Callable[[], bool] | None = None,
) -> list[CachedCase]:
    """Preprocess cases once; cases that are in the cache are not read again.

    Args:
        config: preprocessing and labels.
        cases: with labels.
        cache: folder of the prepared volumes.
        processes: the first process of a node prepares, and the others find the cases in the cache.
        on_case: called with the number of prepared cases, the number of all cases, and a name.
        should_stop: asked after each case.

    Raises:
        CaseError: see ``prepare``; all processes raise what one of them found.
        TrainingStopped: ``should_stop`` was true.
    """
    done = 0

    def prepared(name: str) -> None:
        nonlocal done
        done += 1
        on_case(done, len(cases), name)
        if should_stop is not None and should_stop():
            raise TrainingStopped(0, config.training.steps)

    cached: list[CachedCase] = []
    for first in (True, False):
        with processes.together(), configuration_keys():
            if (processes.fabric.local_rank == 0) == first:
                cached = prepare(
                    cases,
                    writable_folder(cache),
                    preprocessing=build_preprocessing(config.data),
                    labels=build_label_set(config.data),
                    on_case=prepared,
                )
    return cached
