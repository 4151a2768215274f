"""The cases that an interrupted evaluation has measured, on disk, so that the next call skips them."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import astuple, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors.torch import save

from prism_meta.data.cases import Case
from prism_meta.errors import OutputError
from prism_meta.files import cannot_write, sync
from prism_meta.records import HEADER, Record
from prism_meta.report.overlays import Overlay
from prism_meta.training.folder.facts import versions
from prism_meta.training.run import Run

if TYPE_CHECKING:
    from prism_meta.evaluation.predictor import Predictor

#: Name of the file in the folder of the report. A finished evaluation removes it.
UNFINISHED = "unfinished.jsonl"


class Measured(NamedTuple):
    """What an evaluation keeps of a case.

    Args:
        records: those of all its subsets.
        overlay: its slice with the predictions from all subsets; None if the report does not draw it.
        cleaned: the records after the clean-up.
        planes: its slices in three planes; None if it was not one of the worst when it was measured.
    """

    records: list[Record]
    overlay: Overlay | None
    cleaned: list[Record]
    planes: tuple[Overlay, ...] | None = None


class Unfinished:
    """``unfinished.jsonl`` in the folder of a report: one line per case that was measured.

    A line is added and synced to disk as soon as a case is measured. It carries the hash of all that its
    numbers depend on, so that a line of another run, or of files that have changed, does not count. Neither
    does a line that was cut off.

    Args:
        folder: folder of the report.
        settings: what the numbers of every case depend on; see ``fingerprint``.

    Raises:
        OutputError: there is such a file, but it cannot be read.
    """

    def __init__(self, folder: Path, settings: str) -> None:
        self.path, self._settings = folder / UNFINISHED, settings
        self._lines = self._read()

    def get(self, case: Case) -> Measured | None:
        """What was measured of ``case``; None if it was not, or if one of its files has changed."""
        line = self._lines.get(self._key(case))
        if line is None:
            return None
        overlay, planes = line["overlay"], line["planes"]
        return Measured(
            [Record(*values) for values in line["records"]],
            None if overlay is None else Overlay.from_dict(overlay),
            [Record(*values) for values in line["cleaned"]],
            None if planes is None else tuple(map(Overlay.from_dict, planes)),
        )

    def add(self, case: Case, measured: Measured) -> None:
        """Write what was measured of ``case``.

        Raises:
            OutputError: the file cannot be written.
        """
        overlay, planes = measured.overlay, measured.planes
        line = {
            "key": self._key(case),
            "records": [astuple(record) for record in measured.records],
            "overlay": None if overlay is None else overlay.to_dict(),
            "cleaned": [astuple(record) for record in measured.cleaned],
            "planes": None if planes is None else [plane.to_dict() for plane in planes],
        }
        content = json.dumps(line).encode()
        new = not self.path.exists()
        try:
            with self.path.open("ab") as file:
                # The line break in front ends a line that was cut off.
                file.write(b"\n%s %s\n" % (_digest(content), content))
                file.flush()
                os.fsync(file.fileno())
            if new:
                sync(self.path.parent)
        except OSError as error:
            if new:  # half a line alone is of no use
                with suppress(OSError):
                    self.path.unlink()
            raise cannot_write(self.path, error) from error

    def remove(self) -> None:
        """Remove the file, because the report is written.

        Raises:
            OutputError: it cannot be removed.
        """
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def _key(self, case: Case) -> str:
        paths = [*case.files.values(), *filter(None, (case.label, case.grid))]
        content = (self._settings, repr(case), [_stamp(path) for path in paths])
        return hashlib.sha256(repr(content).encode("utf-8", "surrogateescape")).hexdigest()

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return {}
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise OutputError(
                f"cannot read {self.path}: {reason}; delete it, or give another --out"
            ) from error
        parts = [line.partition(b" ") for line in lines]
        whole = [json.loads(content) for digest, _, content in parts if digest == _digest(content)]
        return {line["key"]: line for line in whole}


def fingerprint(run: Run, predictor: Predictor, *, flips: bool) -> str:
    """What the numbers of every case depend on: weights, configuration, clean-up, versions, kind of device.

    Args:
        run: a run whose training has ended.
        predictor: one with the weights that are evaluated.
        flips: whether it averages over mirrored images.
    """
    state = {
        name: tensor.cpu().contiguous() for name, tensor in predictor.model.state_dict().items()
    }
    device = next((p.device.type for p in predictor.model.parameters()), "cpu")
    weights = hashlib.sha256(save(state)).hexdigest()
    # The columns and the parts of a line, so that a line of an older version does not count.
    parts = (HEADER, Measured._fields, [field.name for field in fields(Overlay)])
    config, cleanup = run.config.model_dump(mode="json"), predictor.cleanup
    return repr((weights, flips, config, cleanup, versions(), device, parts))


def _stamp(path: Path) -> tuple[str, int, int]:
    """A file by its place, size and time of change; one that is gone is a fault of its own."""
    try:
        facts = path.stat()
    except OSError:
        return str(path.absolute()), -1, -1
    return str(path.absolute()), facts.st_size, facts.st_mtime_ns


def _digest(content: bytes) -> bytes:
    """Tells whole lines from those that were cut off."""
    return hashlib.sha256(content).hexdigest().encode()
