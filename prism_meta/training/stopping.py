"""Ending a training early: by a signal or a time limit, after the step that is under way."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from prism_meta.errors import ConfigError

_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}


class TrainingStopped(Exception):  # noqa: N818, it is no error
    """The training ended before its last step because it was asked to; its state is saved.

    Args:
        step: outer steps that are done; 0 if the cases were still being prepared.
        total: outer steps of the whole training.
    """

    def __init__(self, step: int, total: int) -> None:
        super().__init__(f"stopped after step {step} of {total}")
        self.step, self.total = step, total

    def __reduce__(self) -> tuple[type[TrainingStopped], tuple[int, int]]:
        return type(self), (self.step, self.total)


class StopRequest:
    """Whether a training should stop: ``fit`` and ``train`` ask it after every step.

    Args:
        limit: seconds from now after which it should. Defaults to no limit.

    Example:
        >>> StopRequest(limit=3600)(), StopRequest(limit=0)()
        (False, True)
    """

    def __init__(self, limit: float | None = None) -> None:
        self._deadline = None if limit is None else time.monotonic() + limit
        #: The signal that came; SIGTERM stands for the time limit, too.
        self.signal: signal.Signals | None = None
        #: What asked to stop, for messages.
        self.reason = ""

    def __call__(self) -> bool:
        late = self._deadline is not None and time.monotonic() >= self._deadline
        if self.signal is None and late:
            self.signal, self.reason = signal.SIGTERM, "the time limit"
        return self.signal is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the context SIGINT and SIGTERM ask to stop. A second signal ends the process at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may handle signals
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self.signal is not None:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self.signal = signal.Signals(number)
            self.reason = self.signal.name

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def duration(text: str) -> float:
    """The seconds that a text such as ``11h30m`` means; the units are d, h, m and s.

    Raises:
        ConfigError: the text is no duration.

    Example:
        >>> duration("11h30m"), duration("90s")
        (41400.0, 90.0)
    """
    parts = re.fullmatch(
        r"\s*(?:(\d{1,6})d)?\s*(?:(\d{1,6})h)?\s*(?:(\d{1,6})m)?\s*(?:(\d{1,9})s)?\s*", text.lower()
    )
    seconds = 0.0
    if parts is not None:
        seconds = sum(
            int(count) * unit
            for count, unit in zip(parts.groups(), _UNITS.values(), strict=True)
            if count is not None
        )
    if seconds <= 0:
        raise ConfigError(
            f"time limit: got {text!r}; give days, hours, minutes or seconds, e.g. 11h30m"
        )
    return seconds
