"""How the cases of a run are used: for training, for validation, or held out for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from prism_meta.data.availability import apply_availability, available, drop_modalities
from prism_meta.data.cases import Case
from prism_meta.data.splits import (
    draw_folds,
    draw_holdout,
    folds_json,
    read_folds,
    shared_patients,
)
from prism_meta.errors import ConfigError, Fault, PrismError, raise_faults
from prism_meta.modalities import composed
from prism_meta.training.build import configuration_keys
from prism_meta.training.config import Config


class Split(NamedTuple):
    """How the cases of a run are used.

    Args:
        training: training cases, with the modalities that they have in train batches.
        test: held-out cases.
        folds: the content of ``folds.json``, if there are folds.
        meta: the training cases with the modalities that they have in meta batches. Defaults to the same.
        validation: cases to validate on, with all modalities that have a file.
    """

    training: list[Case]
    test: list[Case]
    folds: str | None = None
    meta: list[Case] | None = None
    validation: Sequence[Case] = ()


def split(config: Config, cases: Sequence[Case]) -> Split:
    """Split cases into training, validation and test cases, so that no patient has cases in two sets.

    The configuration can make modalities of the training cases missing.

    Raises:
        ConfigError: a test or validation case does not exist, no case is left to train on, or there are
            too few patients or sites.
        CaseError: the availability table or the file of folds does not fit the cases.
    """
    data = config.data
    with configuration_keys():
        held, folds = _held_out(config, cases)
        test = [case for case in cases if case.id in held]
        rest = [case for case in cases if case.id not in held]
        if not rest:
            raise ConfigError(
                f"data.test_cases: leaves none of {len(cases)} cases to train on; hold fewer out"
            )
        watched = _validated(config, rest, test)
        training = [case for case in rest if case.id not in watched]
        validation = [case for case in rest if case.id in watched]
        _refuse_shared(
            ("data.test_cases", test), ("validation.cases", validation), ("training", training)
        )
        meta = None
        if data.meta_missing_rates is not None:
            # Another stream of random numbers than that of the train batches.
            try:
                meta = drop_modalities(training, data.meta_missing_rates, seed=2**32 + config.seed)
            except PrismError as error:
                raise error.with_keys(
                    {"rates": "data.meta_missing_rates", "seed": "seed"}
                ) from error
        if data.availability is not None:
            training = apply_availability(training, data.availability)
        elif data.missing_rates is not None:
            training = drop_modalities(training, data.missing_rates, seed=config.seed)
    return Split(training, test, folds, meta, validation)


def _refuse_shared(*sets: tuple[str, Sequence[Case]]) -> None:
    """Raise if a patient has cases in two sets; the key of the earlier one is named."""
    faults = [
        f"{key}: patient {patient} has cases in both sets ({', '.join(names)}); hold out all cases of "
        "the patient, or none"
        for (key, first), (_, second) in combinations(sets, 2)
        for patient, names in shared_patients(second, first).items()
    ]
    raise_faults(ConfigError, faults)


def _validated(config: Config, cases: Sequence[Case], test: Sequence[Case]) -> set[str]:
    """Names of the cases to validate on, among those that are not held out."""
    wanted, names = config.validation.cases, {composed(case.id): case.id for case in cases}
    if isinstance(wanted, int):
        key = {"holdout": "validation.cases"}
        try:
            table = _table(config, cases) if wanted else None
            drawn = draw_holdout(
                cases, wanted, by=config.data.split, seed=config.seed, availability=table
            )
        except PrismError as error:
            raise error.with_keys(key) from error
        return set(drawn)
    held = {composed(case.id) for case in test}
    faults = [
        f"validation.cases: {name} is a test case, too; leave it out of one of the two"
        for name in wanted
        if name in held
    ]
    unknown = [name for name in wanted if name not in names and name not in held]
    if unknown:
        faults.append(
            f"validation.cases: no such case: {', '.join(unknown)}; name cases of the folder"
        )
    if not faults and len(wanted) >= len(cases):
        faults.append(
            f"validation.cases: leaves none of {len(cases)} cases to train on; name fewer"
        )
    raise_faults(ConfigError, faults)
    return {names[name] for name in wanted}


def _table(config: Config, cases: Sequence[Case]) -> Mapping[str, Sequence[bool]] | None:
    """What draws are stratified by, if that is not what the cases have."""
    path = config.data.availability
    return None if path is None else available(cases, path)


def _held_out(config: Config, cases: Sequence[Case]) -> tuple[set[str], str | None]:
    """Names of the cases that are held out, and the content of ``folds.json``."""
    data, names = config.data, {composed(case.id): case.id for case in cases}
    unknown = [name for name in data.test_cases if name not in names]
    if unknown:
        raise ConfigError(
            f"data.test_cases: no such case: {', '.join(unknown)}; name cases of the folder"
        )
    if data.holdout >= max(1, len(cases)):
        raise ConfigError(
            f"data.holdout: leaves none of {len(cases)} cases to train on; hold fewer out"
        )
    drawn = bool(data.holdout) or data.folds is not None
    table = _table(config, cases) if drawn else None
    if data.folds is None:
        held = draw_holdout(
            cases, data.holdout, by=data.split, seed=config.seed, availability=table
        )
        return set(held) | {names[name] for name in data.test_cases}, None
    if isinstance(data.folds, Path):
        folds = read_folds(data.folds, cases)
    else:
        folds = draw_folds(cases, data.folds, by=data.split, seed=config.seed, availability=table)
    number = data.fold or 0
    if number >= len(folds):
        message = (
            f"got fold {number}, expected at most {len(folds) - 1}, because there are {len(folds)}"
        )
        raise ConfigError([Fault(f"{message} folds; give another", "fold")])
    content = folds_json(folds, fold=number, by=data.split, seed=config.seed)
    return set(folds[number]), content


def both_shown(training: Sequence[Case], meta: Sequence[Case]) -> list[Case]:
    """The cases with what either batch shows, which is what is prepared; see ``Split``."""
    return [
        replace(case, files={**other.files, **case.files})
        for case, other in zip(training, meta, strict=True)
    ]
