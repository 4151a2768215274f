"""What is said of invalid values: the key, what was found, what was expected, and the fix."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from tomlkit import inline_table, item

#: Type of a pydantic error -> what was expected; the names in braces are from the error's context.
_EXPECTED: Mapping[str, str] = MappingProxyType(
    {
        "bool_parsing": "true or false",
        "bool_type": "true or false",
        "dict_type": "a table of keys and values",
        "finite_number": "a finite number",
        "float_parsing": "a number",
        "float_type": "a number",
        "greater_than": "a number > {gt}",
        "greater_than_equal": "a number >= {ge}",
        "int_from_float": "a whole number",
        "int_parsing": "a whole number",
        "int_parsing_size": "a smaller whole number",
        "int_type": "a whole number",
        "less_than": "a number < {lt}",
        "less_than_equal": "a number <= {le}",
        "literal_error": "{expected}",
        "model_attributes_type": "a section of keys",
        "model_type": "a section of keys",
        "path_type": "a path in quotes",
        "string_type": "text in quotes",
        "too_long": "at most {max_length} values",
        "too_short": "at least {min_length} values",
        "tuple_type": "a list in brackets",
    }
)
#: Longest quotation of a value, in characters.
_LONGEST = 80


def messages(error: ValidationError, schema: type[BaseModel]) -> list[str]:
    """One message for each invalid key, in the order of the schema.

    Args:
        error: what pydantic found.
        schema: the model that was validated.

    Example:
        >>> class Size(BaseModel):
        ...     width: int = 8
        >>> try:
        ...     Size.model_validate({"width": "wide"})
        ... except ValidationError as error:
        ...     messages(error, Size)
        ["width: got 'wide', expected a whole number; e.g. width = 8"]
    """
    fields = dict(fields_by_key(schema))
    by_key: dict[str, list[Any]] = {}
    for fault in error.errors():
        by_key.setdefault(_key(fault["loc"], fields), []).append(fault)
    return [line for key, faults in by_key.items() for line in _explain(key, faults, fields)]


def _explain(key: str, faults: Sequence[Any], fields: Mapping[str, FieldInfo]) -> Iterator[str]:
    first = faults[0]
    if first["type"] == "missing" and isinstance(first["loc"][-1], str):
        yield f"{key}: lacks {first['loc'][-1]}; give it"
        return
    if first["type"] == "extra_forbidden":
        sections = dict.fromkeys(name.rpartition(".")[0] for name in fields if "." in name)
        kind, known = ("section", sections) if isinstance(first["input"], dict) else ("key", fields)
        yield f"{key}: unknown {kind}; did you mean {_nearest(key, list(known or fields))}?"
        return
    if first["type"] == "value_error":
        raised = first["ctx"]["error"]
        for message in getattr(raised, "faults", (str(raised),)):
            yield f"{key}: {message}" if key else str(message)
        return
    # Each branch of a union has its fault. One about a size comes from the branch that was meant.
    meant = [f for f in faults if not f["type"].endswith(("_type", "_parsing"))][:1] or faults
    got = _short(repr(meant[0]["input"])) if meant[0]["type"] != "missing" else "too few values"
    expected = " or ".join(dict.fromkeys(_expected(fault) for fault in meant))
    yield f"{key}: got {got}, expected {expected}; {_example(key, fields)}"


def _expected(fault: Any) -> str:
    if fault["type"] == "missing":
        return f"at least {fault['loc'][-1] + 1} values"
    text = _EXPECTED.get(fault["type"])
    if text is None:
        return str(fault["msg"]).removeprefix("Input should be ")
    context = fault.get("ctx", {})
    bounds = {n: int(v) for n, v in context.items() if isinstance(v, float) and v.is_integer()}
    return text.format(**{**context, **bounds})


def _example(key: str, fields: Mapping[str, FieldInfo]) -> str:
    """The fix: the default, as a line of TOML."""
    info = fields.get(key)
    default = None if info is None else info.get_default()
    if isinstance(default, tuple):
        default = list(default)
    if info is None and not any(name.startswith(f"{key}.") for name in fields):
        return "correct it"  # a key of a table, whose values have no default
    if default in (None, [], {}, ()):
        return "correct it or leave the key out"
    if isinstance(default, dict):
        table = inline_table()
        table.update(default)
        default = table
    return f"e.g. {key} = {item(default).as_string()}"


def _key(loc: Sequence[int | str], fields: Mapping[str, FieldInfo]) -> str:
    """The key at ``loc``, without what pydantic adds: branches of unions and positions in lists."""
    parts: list[str] = []
    for part in map(str, loc):
        info = fields.get(".".join(parts))
        if info is not None and typing.get_origin(info.annotation) is not dict:
            break
        parts.append(part)
    return ".".join(parts)


def fields_by_key(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """The keys of a schema, e.g. ``training.steps``, each with its field."""
    for name, info in section.model_fields.items():
        kind = info.annotation
        # Python 3.10 takes tuple[str, ...] for a type.
        plain = typing.get_origin(kind) is None
        if plain and isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from fields_by_key(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, info


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


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
