"""What ``compare`` does, without a terminal: it reads runs, names them, and finds settings that differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prism_meta.errors import PrismError
from prism_meta.records import Record, read_records
from prism_meta.report.runs_page import Settings
from prism_meta.training.folder.facts import changed_keys, read_facts


def load_runs(paths: Sequence[Path]) -> dict[str, list[Record]]:
    """The records of runs, by short names that tell them apart.

    Raises:
        PrismError: one cannot be read.
    """
    return dict(zip(short_names(paths), map(load_records, paths), strict=True))


def load_records(path: Path) -> list[Record]:
    """Read the records of a run folder, an evaluation folder, or a CSV file.

    Raises:
        PrismError: there are none, or they cannot be read.
    """
    for candidate in (path / "evaluation" / "records.csv", path / "records.csv"):
        if candidate.exists():
            return read_records(candidate)
    if path.is_dir():
        raise PrismError(f"{path}: no records.csv here; run prism-meta evaluate {path} first")
    return read_records(path)


def short_names(paths: Sequence[Path]) -> list[str]:
    """As many last parts of the paths as are needed to tell them apart; a path given twice is numbered.

    Example:
        >>> short_names([Path("runs/first"), Path("runs/second")])
        ['first', 'second']
        >>> short_names([Path("runs/a/evaluation"), Path("runs/b/evaluation"), Path("runs/a/evaluation")])
        ['a/evaluation', 'b/evaluation', 'a/evaluation (2)']
    """
    whole = [path.resolve() for path in paths]
    count = 1
    while len({path.parts[-count:] for path in whole}) < len(set(whole)):
        count += 1
    names = ["/".join(path.parts[-count:]) for path in whole]
    return [
        name if (number := names[: i + 1].count(name)) == 1 else f"{name} ({number})"
        for i, name in enumerate(names)
    ]


def differing_settings(paths: Sequence[Path]) -> Settings:
    """The keys of the configuration that differ between runs, each with the values of all runs.

    There are none if one of the paths is not in a run folder.

    Raises:
        PrismError: a ``run.json`` is damaged.
    """
    configs = [_config(path) for path in paths]
    known = [config for config in configs if config is not None]
    if len(known) < len(paths):
        return {}
    first, *others = known
    changes = [changed_keys(first, other) for other in others]
    common = {key: values[0] for change in changes for key, values in change.items()}
    return {
        key: [_shown(value), *(_shown(change.get(key, (value, value))[1]) for change in changes)]
        for key, value in sorted(common.items())
    }


def _config(path: Path) -> dict[str, Any] | None:
    """The configuration of the run that ``path`` is, or lies in."""
    for folder in (path, *path.resolve().parents[:2]):
        file = folder / "run.json"
        if file.is_file():
            config: dict[str, Any] = read_facts(file)["config"]
            return config
    return None


def _shown(value: object) -> str:
    return "not set" if value is None else str(value)
