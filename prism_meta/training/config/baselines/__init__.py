"""Baseline methods, each a small configuration that ``--baseline`` starts from."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import tomlkit

from prism_meta.errors import ConfigError

#: Names of the baselines, the simplest first; ``<name>.toml`` in this folder describes each.
BASELINES = (
    "zero_fill",
    "modality_dropout",
    "conditioned_unet",
    "passion",
    "prism",
    "meta_drop_first_order",
    "meta_drop_second_order",
    "brats2020",
)


def read_baseline(name: str) -> dict[str, Any]:
    """Read the keys that the baseline ``name`` sets; all other keys keep their defaults.

    Raises:
        ConfigError: there is no such baseline.

    Example:
        >>> read_baseline("prism")["meta"]
        {'strategy': 'single_level'}
    """
    if name not in BASELINES:
        raise ConfigError(
            f"baseline: got {name!r}, expected one of {', '.join(BASELINES)}; choose one of them"
        )
    text = files(__name__).joinpath(f"{name}.toml").read_text(encoding="utf-8")
    return dict(tomlkit.parse(text).unwrap())
