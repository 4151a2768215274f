"""What ``run.json`` says of a run: its schema, and what a new run writes there."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import BaseModel, ConfigDict, ValidationError

from prism_meta.errors import ConfigError, PrismError
from prism_meta.training.config import Config, load_config

#: Keys in one message.
_SHOWN = 4


class Facts(BaseModel):
    """The schema of ``run.json``."""

    model_config = ConfigDict(extra="allow", strict=True)

    started: str
    command: list[str]
    seed: int
    versions: dict[str, str]
    data: str | None
    train: dict[str, list[str]]
    test: list[str]
    validation: dict[str, list[str]] = {}
    own: dict[str, str] = {}
    adaptation: dict[str, Any] = {}
    config: dict[str, Any]


def read_facts(path: Path) -> dict[str, Any]:
    """The content of a ``run.json``.

    Raises:
        OSError: the file cannot be read.
        PrismError: it has another form.
    """
    try:
        # Not model_validate_json, which refuses paths that are not UTF-8.
        return Facts.model_validate(json.loads(path.read_bytes())).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        reason = f"{where}: {first['msg'].lower()}"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise PrismError(f"{path}: is damaged ({reason}); restore it, or train again")


def read_settings(path: Path) -> Config:
    """The configuration of a run, whose file has every key that has a value.

    Raises:
        ConfigError: the file cannot be read, is invalid, or lacks keys, as one does that was cut off.
    """
    config = load_config(path)
    # It was read once without a fault.
    there = flat(tomlkit.parse(path.read_text(encoding="utf-8-sig")).unwrap())
    wanted = flat(config.model_dump(mode="json", exclude_none=True))
    lost = [key for key in wanted if not any(k == key or k.startswith(f"{key}.") for k in there)]
    if lost:
        more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        raise ConfigError(
            f"{path}: lacks {', '.join(lost[:_SHOWN])}{more}, which a run writes; restore the file from the "
            "configuration in run.json"
        )
    return config


def check_unchanged(path: Path, config: Config, facts: Mapping[str, Any]) -> None:
    """Check that the configuration in ``path`` is that which the run was started with.

    Raises:
        ConfigError: keys were changed.
    """
    now = config.model_dump(mode="json")
    changed, before = changed_keys(facts["config"], now), facts.get("config_before")
    if changed and (before is None or changed_keys(before, now)):
        listed = ", ".join(f"{key} from {a} to {b}" for key, (a, b) in changed.items())
        raise ConfigError(
            f"{path}: was changed since the run was started ({listed}); undo that, and use --extend for more "
            "steps, or start a new run"
        )


def changed_keys(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Configuration keys whose values differ, each with both values; a key that is not set is None.

    Example:
        >>> changed_keys({"training": {"steps": 4}}, {"training": {"steps": 8}})
        {'training.steps': (4, 8)}
    """
    old, new = flat(then), flat(now)
    return {
        key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)
    }


def command_line() -> list[str]:
    """The command line of this process, with the program's name instead of its path."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return ["python", "-m", program.parent.name, *sys.argv[1:]]
    return [program.name, *sys.argv[1:]]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("prism-meta", "torch", "monai", "nibabel", "numpy", "lightning-fabric"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source folder that was not installed
            found[package] = "not installed"
    return found


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by ``section.key``; a key that is not set equals None."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and name not in ("labels", "regions"):
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[prefix + name] = value
    return found
