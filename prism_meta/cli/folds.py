"""``train --fold``: one fold of a cross-validation, or several one after the other."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from prism_meta.cli.output import note
from prism_meta.cli.usage import tell
from prism_meta.errors import ConfigError, PrismError
from prism_meta.training.cleanup.file import CLEANUP
from prism_meta.training.config import Config
from prism_meta.training.folder.facts import changed_keys
from prism_meta.training.planning.plan import PLANNED
from prism_meta.training.run import Run

#: Number of folds if neither ``--folds`` nor the configuration says it, as in nnU-Net.
FOLDS = 5
#: Part of the message for a configuration that sets only one of data.fold and data.folds.
_ALONE = "got one without the other"
#: Trains one fold in its folder: its configuration, and whether it goes on.
TrainOne = Callable[[Config, Path, bool], None]


def parse_folds(text: str) -> list[int]:
    """The folds that ``--fold`` names.

    Raises:
        ConfigError: it is neither a number nor a range.

    Example:
        >>> parse_folds("3"), parse_folds("0..2")
        ([3], [0, 1, 2])
    """
    found = re.fullmatch(r"([0-9]{1,6})(?:\.\.([0-9]{1,6}))?", text.strip())
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if last < first:
        raise ConfigError(
            f"fold: got {text!r}, expected a number such as 0, or a range such as 0..4; correct it"
        )
    return list(range(first, last + 1))


def is_range(text: str) -> bool:
    """Whether ``--fold`` names a range, whose folds have a folder each."""
    return ".." in text


def fold_overrides(
    load: Callable[[Sequence[str]], Config], number: int, folds: int | None
) -> list[str]:
    """The overrides that choose a fold.

    Args:
        load: makes the configuration with further overrides.
        number: the fold.
        folds: number of folds. Defaults to the configuration's ``data.folds``, and to ``FOLDS`` without it.

    Raises:
        ConfigError: the configuration has faults, or no such fold.
    """
    one = f"data.fold={number}"
    if folds is not None:
        return [f"data.folds={folds}", one]
    try:
        load([one])
    except ConfigError as error:
        if not any(_ALONE in fault for fault in error.faults):
            raise
        return [f"data.folds={FOLDS}", one]
    return [one]


def existing_fold(out: Path, numbers: Sequence[int]) -> Run | None:
    """The first of the folds that was started before."""
    for number in numbers:
        if (fold_folder(out, number) / "run.json").exists():
            return Run.open(fold_folder(out, number))
    return None


def with_sizes_of(config: Config, planned: Config) -> Config:
    """``config`` with the keys that a plan chooses from ``planned``, so that all folds have the same."""
    values, sizes = config.model_dump(), planned.model_dump()
    for section, _, name in (key.partition(".") for key in PLANNED):
        values[section][name] = sizes[section][name]
    return Config.model_validate(values)


def fold_folder(out: Path, number: int) -> Path:
    """The run folder of a fold in a range.

    Example:
        >>> fold_folder(Path("runs/a"), 2).as_posix()
        'runs/a/fold2'
    """
    return out / f"fold{number}"


def train_folds(configs: Mapping[int, Config], out: Path, train_one: TrainOne) -> None:
    """Train folds one after the other, each in its own folder. Done ones are skipped, interrupted ones go on.

    Args:
        configs: fold -> its configuration.
        out: folder of the run folders.
        train_one: trains one of them.

    Raises:
        PrismError: a fold was started with other settings, or training uses several processes; or see
            ``train``. The folds before it are kept.
    """
    runs: dict[int, Run] = {}
    for number, config in configs.items():
        folder = fold_folder(out, number)
        if config.fabric.devices not in (1, "1") or config.fabric.nodes > 1:
            raise PrismError(
                f"train --fold: trains several folds in one process, and got fabric.devices="
                f"{config.fabric.devices} on {config.fabric.nodes} nodes; give each fold a call of its own"
            )
        if (folder / "run.json").exists():
            runs[number] = Run.open(folder)
            _check_same(runs[number], config)
        else:
            Run.check_new(folder)
    for number, config in configs.items():
        run, folder = runs.get(number), fold_folder(out, number)
        if run is not None and _has_ended(run):
            note(f"{folder} is trained already")
            continue
        try:
            train_one(config, folder, run is not None)
        except SystemExit:
            tell("the same command goes on with this fold and those after it")
            raise


def _check_same(run: Run, config: Config) -> None:
    then, now = (c.model_dump(mode="json") for c in (run.config, config))
    changed = changed_keys(then, now)
    if changed:
        listed = ", ".join(f"{key} is {a}, not {b}" for key, (a, b) in changed.items())
        raise ConfigError(
            f"{run.folder}: was started with other settings ({listed}); give the same ones, or another --out"
        )


def _has_ended(run: Run) -> bool:
    """Whether a training wrote all its files."""
    chosen = not run.config.validation.is_on or (run.folder / CLEANUP).exists()
    return run.weights("last").exists() and chosen
