"""Loggers that follow the log of a training, and never end it."""

from __future__ import annotations

import json
import logging
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_meta.errors import one_line
from prism_meta.files import write_whole
from prism_meta.training.loggers.kinds import KINDS, Kind, Status
from prism_meta.training.loggers.numbers import numbers_of, settings_of
from prism_meta.training.stopping import TrainingStopped

#: The commands print its warnings on standard error.
_log = logging.getLogger(__name__)
#: Name of the folder in the run folder.
LOGGERS = "loggers"
#: Characters of an error that a warning quotes.
_LONGEST = 160
#: Makes a picture; called only if a logger wants it.
Draw = Callable[[], NDArray[np.uint8]]


class Loggers:
    """Passes the lines of the log on to loggers.

    A logger that fails is left out from then on, with one warning: its disk may be full, or its server
    down. A resumed training gives it what it missed. Files ``NAME.json`` beside the logger's own keep the
    last step that it has got, so that no step is logged twice.

    Loggers are opened when there is something to log. The processes that load data exist by then. Forked
    later, they would inherit threads, and W&B's hooks, which fail there.

    Args:
        kinds: the loggers to open.
        folder: their files go below it.
        run: name of the run.
        config: the settings of the run, see ``Config.model_dump``.
        resume: whether to go on with the loggers' runs that ``folder`` has.
    """

    def __init__(
        self,
        kinds: Sequence[type[Kind]],
        folder: Path,
        *,
        run: str,
        config: Mapping[str, Any],
        resume: bool = False,
    ) -> None:
        self.folder, self.run, self.config, self.resume = folder, run, config, resume
        self._waiting = list(kinds)
        self._earlier: Sequence[Mapping[str, Any]] = ()
        self._open: dict[str, Kind] = {}
        self._last: dict[str, int] = {}
        self._draws = True

    def begin(self, earlier: Sequence[Mapping[str, Any]]) -> None:
        """Lines of the log from before; loggers get those that they lack together with the first new ones."""
        self._earlier = earlier

    def add(self, lines: Sequence[Mapping[str, Any]], draw: Draw | None = None) -> None:
        """Log the steps that a logger does not have yet.

        Args:
            lines: of the log, see ``log.line``.
            draw: makes a picture that belongs to the last of them.
        """
        while self._waiting:
            self._open_one(self._waiting.pop(0))
        lines, self._earlier = [*self._earlier, *lines], ()
        last = max((line["step"] for line in lines), default=0)
        behind = [name for name in self._open if self._last[name] < last]
        picture = self._picture(draw) if behind and draw is not None else None
        for name in behind:
            logger = self._open[name]
            with self._guarded(name, f"failed at step {last}"):
                new = {n["step"]: numbers_of(n) for n in lines if n["step"] > self._last[name]}
                if picture is not None:
                    logger.log_numbers({step: new[step] for step in new if step < last})
                    logger.log_picture(picture, last)
                    new = {last: new[last]}
                logger.log_numbers(new)
                logger.save()
                self._last[name] = last
                self._write(name)

    def close(self, status: Status) -> None:
        """Say how the training ended."""
        if self._earlier:
            self.add([])
        while self._open:
            name, logger = self._open.popitem()
            with self._guarded(name, "failed at its end"):
                logger.close(status)

    def _open_one(self, kind: type[Kind]) -> None:
        name = kind.name
        with self._guarded(name, "cannot be opened"):
            state = self._read(name) if self.resume else {}
            self.folder.mkdir(parents=True, exist_ok=True)
            self._last[name] = state.get("step", 0)
            self._open[name] = kind(self.folder, run=self.run, id=state.get("id"))
            if not state:
                self._open[name].log_settings(settings_of(self.config))
            self._write(name)

    def _picture(self, draw: Draw) -> NDArray[np.uint8] | None:
        if not self._draws:
            return None
        try:
            return draw()
        except Exception as error:  # of a net or a library: any
            self._draws = False
            _log.warning("warning: no pictures for the loggers (%s)", _told(error))
            return None

    @contextmanager
    def _guarded(self, name: str, what: str) -> Iterator[None]:
        """Warn of an error in the block, and leave the logger out from then on."""
        try:
            yield
        except Exception as error:  # of a library that is not essential: any
            failed = self._open.pop(name, None)
            if failed is not None:
                with suppress(Exception):
                    failed.close("failed")
            _log.warning(
                "warning: %s %s (%s); the training goes on without it, metrics.jsonl has all numbers, and a "
                "resumed run gives it what it missed",
                *(name, what, _told(error)),
            )

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        state = json.loads(path.read_bytes()) if path.exists() else {}
        return {"id": str(state["id"]), "step": int(state["step"])} if state else {}

    def _write(self, name: str) -> None:
        state = {"id": self._open[name].id, "step": self._last[name]}
        write_whole(self.folder / f"{name}.json", json.dumps(state) + "\n")


def _told(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")
    # Those of servers are long.
    said = textwrap.shorten(one_line(first), _LONGEST, placeholder=" ...")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


@contextmanager
def following(
    names: Sequence[str], folder: Path, *, run: str, config: Mapping[str, Any], resume: bool
) -> Iterator[Loggers]:
    """The loggers of these names, which are closed after the block; see ``Loggers``."""
    kinds = [kind for kind in KINDS if kind.name in names]
    loggers = Loggers(kinds, folder, run=run, config=config, resume=resume)
    status: Status = "failed"
    try:
        yield loggers
        status = "success"
    except (TrainingStopped, KeyboardInterrupt):
        status = "stopped"
        raise
    finally:
        loggers.close(status)
