"""The numbers of the log and the settings of a run, by names as loggers take them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from prism_meta.training.folder.facts import flat


def numbers_of(line: Mapping[str, Any]) -> dict[str, float]:
    """All numbers of a line of the log but its step; names of nested ones are joined by a slash.

    Args:
        line: see ``log.line``. What is no number is left out, e.g. the name of a subset.

    Example:
        >>> line = {"step": 2, "lr": 0.1, "terms": {"beta": [1.0, 2.0]}, "best": {"weights": "ema"}}
        >>> numbers_of(line)
        {'lr': 0.1, 'terms/beta/0': 1.0, 'terms/beta/1': 2.0}
    """
    return dict(_numbers({name: value for name, value in line.items() if name != "step"}, ""))


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, (int, float)):
        yield name, float(value)
    inside = value.items() if isinstance(value, Mapping) else ()
    for key, part in enumerate(value) if isinstance(value, list) else inside:
        yield from _numbers(part, f"{name}/{key}" if name else str(key))


def settings_of(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """The values of a configuration by ``section.key``; lists and tables are JSON.

    Example:
        >>> settings_of({"seed": 0, "data": {"patch": [96, 96], "cache": None}})
        {'seed': 0, 'data.patch': '[96, 96]'}
    """
    return {
        key: value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
        for key, value in flat(config).items()
        if value is not None
    }
