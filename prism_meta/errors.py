"""Errors that the user can fix. Each message says what was found, what was expected, and the fix."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence


def one_line(text: str) -> str:
    r"""Replace characters that would break a line or cannot be written (control characters, bytes of
    file names that are not UTF-8) by their escapes.

    Example:
        >>> print(one_line("p0\nt1\udcff"))
        p0\nt1\udcff
    """
    kinds = ("Cc", "Cs", "Zl", "Zp")
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in kinds else c for c in text)


class Fault(str):
    """One message of a ``PrismError``, and the arguments that the user can change to fix it.

    A library function names its own arguments. A caller whose users set configuration keys instead
    translates them with ``PrismError.with_keys``.

    Args:
        message: what was found, what was expected, and the fix, on one line (see ``one_line``).
        arguments: names of the arguments to change; none if the fix is elsewhere.

    Example:
        >>> fault = Fault("patch (9, 9) is larger than the volume; use a smaller patch", "patch")
        >>> fault.arguments
        ('patch',)
    """

    arguments: tuple[str, ...]

    def __new__(cls, message: str, *arguments: str) -> Fault:
        fault = super().__new__(cls, one_line(message))
        fault.arguments = arguments
        return fault

    def prefixed(self, prefix: str) -> Fault:
        """The same fault with ``prefix`` and a colon before its message."""
        return Fault(f"{prefix}: {self}", *self.arguments)


class PrismError(ValueError):
    """One or more faults of an input, one line each. The command line prints them and exits with 2.

    Args:
        faults: one message, or all the messages of one config or data set (reported together).

    Example:
        >>> print(PrismError(["a is empty: give a name", "b < 0: use b >= 0"]))
        a is empty: give a name
        b < 0: use b >= 0
    """

    def __init__(self, faults: str | Sequence[str]) -> None:
        listed = (faults,) if isinstance(faults, str) else faults
        self.faults: tuple[Fault, ...] = tuple(
            fault if isinstance(fault, Fault) else Fault(fault) for fault in listed
        )
        super().__init__("\n".join(self.faults))

    def __reduce__(self) -> tuple[type[PrismError], tuple[tuple[Fault, ...]]]:
        return type(self), (self.faults,)

    def with_keys(self, keys: Mapping[str, str]) -> PrismError:
        """The same error, naming after each fault the configuration keys that set its arguments.

        Args:
            keys: argument name -> configuration key. Other arguments stay as they are.

        Example:
            >>> error = PrismError([Fault("the patch is too large", "patch"), "no case was found"])
            >>> print(error.with_keys({"patch": "data.patch"}))
            the patch is too large (set data.patch)
            no case was found
        """
        translated = []
        for fault in self.faults:
            named = [keys[argument] for argument in fault.arguments if argument in keys]
            ending = f" (set {' or '.join(named)})" if named else ""
            translated.append(Fault(f"{fault}{ending}"))
        return type(self)(translated)


class ConfigError(PrismError):
    """Arguments or a configuration that cannot be used."""


class CaseError(PrismError):
    """Cases on disk that cannot be used."""


class OutputError(PrismError):
    """A file or folder that cannot be written."""


def raise_faults(kind: type[PrismError], faults: Sequence[str]) -> None:
    """Raise ``kind`` with all ``faults``, or return if there are none."""
    if faults:
        raise kind(faults)
