"""Reading a configuration from a TOML file and overrides, with a message for each fault.

The module knows no section and no key; ``schema`` defines them.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomlkit
from pydantic import BaseModel, ValidationError
from tomlkit.exceptions import TOMLKitError

from prism_meta.errors import ConfigError

_Schema = TypeVar("_Schema", bound=BaseModel)


def read_config(
    schema: type[_Schema],
    path: Path | str | None = None,
    overrides: Sequence[str] = (),
    *,
    start: Mapping[str, Any],
) -> _Schema:
    """Read a TOML file, apply ``section.key=value`` overrides, and validate the result.

    Args:
        schema: a pydantic model; its fields may be models, the sections.
        path: TOML file. Defaults to no file.
        overrides: values are TOML (``[64, 64]``, ``true``, ``0.1``); a bare word is a string.
        start: initial values by section. The file and then the overrides replace them.

    Raises:
        ConfigError: the file or an override cannot be read, or values are invalid. All invalid values
            are reported together, each with its key.

    Example:
        >>> class Size(BaseModel, extra="forbid"):
        ...     width: int = 8
        >>> read_config(Size, overrides=["width=4"], start={})
        Size(width=4)
        >>> read_config(Size, overrides=["widht=4"], start={})
        Traceback (most recent call last):
        ...
        prism_meta.errors.ConfigError: widht: unknown key; did you mean width?
    """
    values = copy.deepcopy(dict(start))
    if path is not None:
        values = _merged(values, _read(path))
    for override in overrides:
        _override(values, override)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError([_explain(fault, schema) for fault in error.errors()]) from error


def _read(path: Path | str) -> dict[str, Any]:
    try:
        return dict(tomlkit.parse(Path(path).read_text(encoding="utf-8")).unwrap())
    except (OSError, UnicodeDecodeError, TOMLKitError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read as TOML ({reason}); correct the file") from error


def _merged(values: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """``more`` over ``values``, key by key within a section."""
    both = {**values, **more}
    for name in values.keys() & more.keys():
        if isinstance(values[name], dict) and isinstance(more[name], dict):
            both[name] = {**values[name], **more[name]}
    return both


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{override!r}: expected section.key=value, e.g. training.steps=500")
    try:
        value = tomlkit.parse(f"value = {text}").unwrap()["value"]
    except TOMLKitError:
        value = text.strip()
    *sections, last = key.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{key.strip()}: {section} is a value, not a section")
    values[last] = value


def _explain(fault: Any, schema: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"{key}: unknown key; did you mean {_nearest(key, list(_keys(schema)))}?"
    message = fault["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if fault["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: got {fault['input']!r}; {message}"


def _nearest(key: str, known: Sequence[str]) -> str:
    """The known key most like ``key``, first by its whole path, then by its last part."""
    found = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not found:
        last = {k.rpartition(".")[2]: k for k in known}
        found = [
            last[n]
            for n in difflib.get_close_matches(key.rpartition(".")[2], last, n=1, cutoff=0.0)
        ]
    return found[0]


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _keys(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name
