"""How every command ends: faults are a line each and code 2, signals a line and 128 + their number."""

from __future__ import annotations

import logging
import signal
from types import FrameType
from typing import Any

from prism_meta import training
from prism_meta.cli.output import command_output, note
from prism_meta.cli.usage import ErrorLines, is_first, tell
from prism_meta.errors import PrismError


class EndedGroup(ErrorLines):
    """A group of commands that writes their results and prints their errors, so that they only raise them."""

    def invoke(self, ctx: Any) -> Any:
        before = signal.signal(signal.SIGTERM, _terminate)
        said, told = logging.getLogger(training.__name__), _Told()
        said.setLevel(logging.INFO)
        if is_first():
            said.addHandler(told)
        try:
            with command_output():
                return super().invoke(ctx)
        except PrismError as error:
            if is_first():
                for fault in error.faults:
                    tell(f"error: {fault}")
            raise SystemExit(2) from error
        except (KeyboardInterrupt, _Terminated) as error:
            tell("interrupted; no file is half-written, run the same command again")
            number = signal.SIGTERM if isinstance(error, _Terminated) else signal.SIGINT
            raise SystemExit(128 + number) from error
        finally:
            said.removeHandler(told)
            signal.signal(signal.SIGTERM, before)


class _Terminated(BaseException):
    """SIGTERM came."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


class _Told(logging.Handler):
    """Prints on standard error what training says of its cases and its initial weights."""

    def emit(self, record: logging.LogRecord) -> None:
        write = tell if record.levelno >= logging.WARNING else note
        write(record.getMessage())
