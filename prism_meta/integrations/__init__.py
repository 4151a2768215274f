"""Integrations with other meta-learning libraries. ``import prism_meta`` imports none of them."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from prism_meta.errors import PrismError


class MissingPackageError(PrismError, ImportError):
    """An optional package cannot be imported; the message has the command that installs it."""


def load(package: str, install: str) -> Any:
    """Import an optional package at the place that uses it.

    Args:
        package: name of the package to import.
        install: the command that installs it.

    Returns:
        The module, typed ``Any``: these packages have no types.

    Raises:
        MissingPackageError: the package, or one that it needs, is missing.

    Example:
        >>> load("no_such_package", "pip install no-such-package")
        Traceback (most recent call last):
        ...
        prism_meta.integrations.MissingPackageError: no_such_package: cannot be imported (No module \
named 'no_such_package'); install it with: pip install no-such-package
    """
    try:
        with warnings.catch_warnings():
            # Old docstrings warn if the package was not compiled when it was installed.
            warnings.filterwarnings("ignore", message="invalid escape sequence")
            warnings.filterwarnings("ignore", message=".*is an invalid escape sequence")
            return importlib.import_module(package)
    except ImportError as error:
        raise MissingPackageError(
            f"{package}: cannot be imported ({error}); install it with: {install}"
        ) from error
