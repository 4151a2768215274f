"""Importing learn2learn, shared by both directions."""

from __future__ import annotations

import functools
import io
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

from torch import nn

from prism_meta.bilevel.functional.trees import Params
from prism_meta.integrations import MissingPackageError, load

#: learn2learn 0.2.0 has no wheels, and its C files do not compile on Python 3.11 and newer. This command
#: builds it from its .pyx files.
INSTALL = (
    "pip install cython setuptools wheel && pip install --no-build-isolation "
    '--config-settings="--global-option=build_ext" learn2learn==0.2.0'
)


@functools.cache
def learn2learn() -> Any:
    """The package. Importing it prints a notice of gym's, which is suppressed, and nothing else is."""
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            return load("learn2learn", INSTALL)
    finally:
        rest = printed.getvalue()
        for notice in _gym_notices():
            rest = rest.replace(notice, "")
        if rest.strip():
            sys.stderr.write(rest)


def _gym_notices() -> list[str]:
    try:
        return list(load("gym_notices.notices", INSTALL).notices.values())
    except MissingPackageError:
        return []


@contextmanager
def grad_of_clones() -> Iterator[None]:
    """Suppress torch's warning when learn2learn reads ``.grad`` of a clone's tensors, which are no leaves.

    MetaSGD stores gradients there, and copying a recurrent layer reads them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"The \.grad attribute of a Tensor that is not a leaf"
        )
        yield


def trainable(module: nn.Module) -> Params:
    """The parameters that require a gradient, by name."""
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def listed(names: Iterable[str]) -> str:
    """Names for a message."""
    return ", ".join(names) or "none"
