"""Reading a configuration from a TOML file and overrides, with a message for each fault.

The module knows no section and no key; ``schema`` defines them.
"""

from __future__ import annotations

import codecs
import copy
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomlkit
from pydantic import BaseModel, ValidationError
from tomlkit.exceptions import TOMLKitError

from prism_meta.errors import ConfigError
from prism_meta.training.config.messages import messages

_Schema = TypeVar("_Schema", bound=BaseModel)
#: No configuration is as long as this, in bytes; a volume or a device is.
_LONGEST = 10**6


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
        overrides: values are TOML (``[64, 64]``, ``true``, ``0.1``); a bare word is a string. The last
            one of a key counts.
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
        raise ConfigError(messages(error, schema)) from error


def is_set(key: str, path: Path | str | None, overrides: Sequence[str]) -> bool:
    """Whether the file or an override has ``section.key``.

    Raises:
        ConfigError: the file or an override cannot be read.

    Example:
        >>> is_set("size.width", None, ["size.width=4"])
        True
    """
    values: dict[str, Any] = {} if path is None else _read(path)
    for override in overrides:
        _override(values, override)
    section, _, name = key.partition(".")
    keys = values.get(section)
    return isinstance(keys, dict) and name in keys


def user_path(value: object) -> object:
    """A path as the user means it: ``~`` is the home folder, a relative path starts at the current folder.

    Args:
        value: of a key; anything but a string or a path is returned as it is.

    Raises:
        ConfigError: no file can have this path.

    Example:
        >>> user_path("/data/../tables/a.csv")
        PosixPath('/data/../tables/a.csv')
    """
    if not isinstance(value, (str, Path)):
        return value
    text = str(value)
    if not text.strip() or any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
        raise ConfigError(f"got {text!r}, expected the path of a file or folder; give one")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:  # a user who has no home
        raise ConfigError(
            f"got {text!r}, whose home folder is unknown; give the whole path"
        ) from error


def _read(path: Path | str) -> dict[str, Any]:
    try:
        with Path(path).expanduser().open("rb") as file:
            content = file.read(_LONGEST + 1)
        if len(content) > _LONGEST:
            raise ValueError(f"more than {_LONGEST} bytes")
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError("UTF-16, expected UTF-8")
        return dict(tomlkit.parse(content.decode("utf-8-sig")).unwrap())
    # ValueError: also a path with a NUL, no UTF-8, or a number of thousands of digits.
    except (OSError, ValueError, TOMLKitError, RecursionError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ConfigError(
            f"{path}: cannot be read as TOML ({reason}); correct the file".replace("\0", "\\0")
        ) from error


def _merged(values: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """``more`` over ``values``, key by key within a section."""
    both = {**values, **more}
    for name in values.keys() & more.keys():
        if isinstance(values[name], dict) and isinstance(more[name], dict):
            both[name] = {**values[name], **more[name]}
    return both


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise ConfigError(
            f"{override!r}: expected section.key=value; write e.g. training.steps=500"
        )
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in override):
        raise ConfigError(
            f"{override!r}: has a line break or another character that is not printed; give one --set "
            "per key"
        )
    value = _value(text)
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(
                f"{key}: {section} is a value, not a section; leave out what follows {section}"
            )
    both = not sections and isinstance(value, dict) and isinstance(values.get(last), dict)
    values[last] = {**values[last], **value} if both else value


def _value(text: str) -> Any:
    """The value of an override."""
    try:
        return tomlkit.parse(f"value = {text}").unwrap()["value"]
    except (TOMLKitError, ValueError, RecursionError):
        return text.strip()
