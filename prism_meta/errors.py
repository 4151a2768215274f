"""Errors that a user can mend: each line says what was found, what was expected, and the fix."""

from __future__ import annotations

from collections.abc import Sequence


class PrismError(ValueError):
    """One or more faults of an input, one line each; the command line prints them and exits with 2.

    Args:
        faults: one message, or all the messages of one config or data set (reported together).

    Example:
        >>> print(PrismError(["a is empty: give a name", "b < 0: use b >= 0"]))
        a is empty: give a name
        b < 0: use b >= 0
    """

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults: tuple[str, ...] = (faults,) if isinstance(faults, str) else tuple(faults)
        super().__init__("\n".join(self.faults))

    def __reduce__(self) -> tuple[type[PrismError], tuple[tuple[str, ...]]]:
        return type(self), (self.faults,)


class ConfigError(PrismError):
    """A configuration that cannot be used."""


class CaseError(PrismError):
    """Cases on disk that cannot be used."""


class OutputError(PrismError):
    """A place that cannot be written."""


def raise_faults(kind: type[PrismError], faults: Sequence[str]) -> None:
    """Raise ``kind`` with all ``faults``, or return when there are none."""
    if faults:
        raise kind(faults)
