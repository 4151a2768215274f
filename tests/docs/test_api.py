"""Docstrings of the public API: everything has one, and all arguments and results are described."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest

import prism_meta as pm
from prism_meta.data.phantom import draw_phantom, write_phantoms
from prism_meta.integrations.higher import HigherStrategy
from prism_meta.integrations.learn2learn import Learn2LearnStrategy, PrismLearner
from prism_meta.objective import losses

PUBLIC = {name: getattr(pm, name) for name in pm.__all__} | {
    **{f"losses.{name}": getattr(losses, name) for name in losses.__all__},
    **{kind.__name__: kind for kind in (HigherStrategy, Learn2LearnStrategy, PrismLearner)},
    **{made.__name__: made for made in (draw_phantom, write_phantoms)},
}
CLASSES = {name: made for name, made in PUBLIC.items() if inspect.isclass(made)}
FUNCTIONS = {name: made for name, made in PUBLIC.items() if inspect.isfunction(made)}


def methods() -> Iterator[tuple[str, type, Any]]:
    """The public methods and properties that the public classes define themselves."""
    for kind in CLASSES.values():
        for name, member in vars(kind).items():
            function = getattr(member, "fget", None) or getattr(member, "__func__", member)
            function = getattr(function, "func", function)  # of a cached_property
            if not name.startswith("_") and inspect.isfunction(function):
                yield f"{kind.__name__}.{name}", kind, function


METHODS = {where: (kind, function) for where, kind, function in methods()}


def parameters(made: Any) -> list[str]:
    return [name for name in inspect.signature(made).parameters if name not in ("self", "cls")]


def undescribed(made: Any) -> list[str]:
    """Parameters that have no line of their own in the docstring, nor in that of a base class."""
    every = inspect.getmro(made) if inspect.isclass(made) else (made,)
    text = "\n".join(inspect.getdoc(each) or "" for each in every)
    return [p for p in parameters(made) if not re.search(rf"(?m)^ +\*{{0,2}}{p}: ", text)]


def test_the_public_api_is_found() -> None:
    assert len(CLASSES) > 50
    assert len(FUNCTIONS) > 20
    assert "SecondOrder.solve" in METHODS
    assert "PrismNet.segment_subsets" in METHODS


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_describes_its_arguments_and_its_result(name: str) -> None:
    function = FUNCTIONS[name]
    text = inspect.getdoc(function) or ""
    assert text.strip(), f"{name} has no docstring"
    assert not undescribed(function), f"{name}: Args lacks {undescribed(function)}"
    if function.__annotations__.get("return") not in (None, "None"):
        assert re.search(r"(?m)^(Returns|Yields):$", text), f"{name} has no Returns"


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_describes_its_arguments(name: str) -> None:
    kind = CLASSES[name]
    assert (vars(kind).get("__doc__") or "").strip(), f"{name} has no docstring"
    if "__init__" in vars(kind) and not getattr(kind, "_is_protocol", False):
        missing = [p for p in undescribed(kind) if not p.startswith("_")]
        assert not missing, f"{name}: Args lacks {missing}"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_a_docstring_that_names_its_arguments(name: str) -> None:
    kind, function = METHODS[name]
    if not function.__doc__:  # an override: the method that it replaces has one
        own = name.split(".")[1]
        replaced = [vars(base)[own] for base in kind.__mro__[1:] if own in vars(base)]
        assert any(inspect.getdoc(method) for method in replaced), f"{name} has no docstring"
        return
    missing = [p for p in parameters(function) if not re.search(rf"\b{p}\b", function.__doc__)]
    assert not missing, f"{name}: the docstring does not name {missing}"
