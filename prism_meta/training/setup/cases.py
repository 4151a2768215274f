"""The cases of a run: found and loaded as its configuration says, and prepared."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from prism_meta.data.cache import CachedCase, prepare
from prism_meta.data.cases import Case
from prism_meta.data.layouts.base import Found
from prism_meta.data.layouts.folders import find, search
from prism_meta.data.layouts.names import FileNames
from prism_meta.errors import CaseError, PrismError, one_line, raise_faults
from prism_meta.files import writable_folder
from prism_meta.training.build import build_label_set, build_preprocessing, configuration_keys
from prism_meta.training.config import Config
from prism_meta.training.config.keys import ARGUMENT_KEYS
from prism_meta.training.processes.agreement import Processes
from prism_meta.training.setup.splitting import both_shown
from prism_meta.training.stopping import TrainingStopped

#: Tells what was found, one line each; the commands print it on standard error.
_log = logging.getLogger(__name__)


def load_configured(config: Config, root: Path | str) -> list[Case]:
    """Load the cases to train on, as the configuration describes them.

    Raises:
        CaseError: cases have faults, no case has a modality, or most have no label.
    """
    names = file_names(config, label=True)
    with configuration_keys():
        found = find(root, names, layout=_layout(config))
        _log.info("%s", found.sentence())
        raise_faults(CaseError, training_faults(found, names))
    return found.cases


def search_configured(config: Config, root: Path | str, names: FileNames) -> Found:
    """What is found at ``root``, with its faults, in the layout that the configuration names.

    Args:
        config: the layout.
        root: a folder or a manifest.
        names: see ``file_names``.
    """
    found = search(root, names, layout=_layout(config))
    if names.label is not None:
        _log.info("%s", found.sentence())
    return found


def training_faults(found: Found, names: FileNames) -> list[str]:
    """What keeps a data set from being trained on, as far as names and headers tell."""
    return [*found.faults, *found.modality_faults(names), *found.label_faults(names)]


def find_configured(
    config: Config, root: Path | str, *, label: bool
) -> tuple[list[Case], list[str]]:
    """The cases of a folder without faults, and the faults of the others; see ``load_configured``.

    Any modality may be missing in all of them; a note says so if other files were found.

    Args:
        config: names of the modalities and of the label, and the layout.
        root: the folder.
        label: False leaves the labels out, so that a damaged one is no fault.
    """
    names, layout = file_names(config, label=label), _layout(config)
    found = find(root, names, layout=layout)
    if not found.cases and layout is not None:
        # A run that was trained on cases in one layout may predict cases in another.
        other = find(root, names)
        found = other if other.cases else found
    _log.info("%s", found.sentence())
    for note in found.notes(names):
        _log.info("%s", one_line(note))
    faults = [*found.faults, *(found.label_faults(names) if label else [])]
    return found.cases, list(PrismError(faults).with_keys(ARGUMENT_KEYS).faults)


def _layout(config: Config) -> str | None:
    return None if config.data.layout == "auto" else config.data.layout


def file_names(config: Config, *, label: bool) -> FileNames:
    """The names of the files of the modalities, and of the label if ``label`` is true."""
    data = config.data
    return FileNames(data.modalities, data.label if label else None, data.files, data.align)


def prepare_configured(
    config: Config,
    cases: Sequence[Case],
    cache: Path,
    *,
    meta: Sequence[Case] | None = None,
    processes: Processes,
    on_case: Callable[[int, int, str], None],
    should_stop: Callable[[], bool] | None = None,
) -> list[CachedCase]:
    """Preprocess cases once; cases that are in the cache are not read again.

    Args:
        config: preprocessing and labels.
        cases: with labels.
        cache: folder of the prepared volumes.
        meta: the same cases with the modalities that they have in meta batches, see ``Split``.
        processes: the first process of a node prepares, and the others find the cases in the cache.
        on_case: called with the number of prepared cases, the number of all cases, and a name.
        should_stop: asked after each case.

    Raises:
        CaseError: see ``prepare``; all processes raise what one of them found.
        TrainingStopped: ``should_stop`` was true.
    """
    done = 0
    whole = both_shown(cases, meta or cases)

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
                    whole,
                    writable_folder(cache),
                    preprocessing=build_preprocessing(config.data),
                    labels=build_label_set(config.data),
                    on_case=prepared,
                )
    return [
        replace(one, availability=case.availability, meta_availability=other.availability)
        for one, case, other in zip(cached, cases, meta or cases, strict=True)
    ]
