"""The results of a study's runs: a line of JSON each, which is appended when the run ends."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from prism_meta.errors import OutputError, PrismError
from prism_meta.files import sync, writable_folder

#: Name of the file in the study's folder.
RESULTS = "runs.jsonl"


@dataclass(frozen=True)
class Result:
    """What is kept of one run.

    Args:
        key: of the run, see ``Job.key``.
        title: what the run was, for people.
        steps: outer steps.
        evaluations: gradients of the objective that it computed.
        seconds: of training; of the processor's time on a CPU, which other processes do not change.
        memory: bytes of an outer step, as ``step_memory`` predicts them.
        scores: test case -> subset -> Dice, the mean over regions, in [0, 1].
        validation: Dice on the validation cases, of the weights that were scored; NaN without any.
        curves: name -> [step, value] over training.
        weights: that were scored: last, best or ema.
        machine: versions and the device.
    """

    key: str
    title: str
    steps: int
    evaluations: int
    seconds: float
    memory: int
    scores: Mapping[str, Mapping[str, float]]
    validation: float
    curves: Mapping[str, list[list[float]]] = field(default_factory=dict)
    weights: str = "last"
    machine: Mapping[str, str] = field(default_factory=dict)


class Results(Mapping[str, Result]):
    """The results in a folder, by key.

    Several processes may append to them; ``read`` finds what others added.

    Args:
        folder: of the study.

    Raises:
        PrismError: a line cannot be read.

    Example:
        >>> import tempfile
        >>> results = Results(Path(tempfile.mkdtemp()))
        >>> results.append(Result("k", "static  seed 0", 10, 10, 1.5, 0, {"p1": {"t1": 0.5}}, 0.4))
        >>> Results(results.path.parent)["k"].scores
        {'p1': {'t1': 0.5}}
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / RESULTS
        self._found: dict[str, Result] = {}
        self.read()

    def read(self) -> None:
        """Read the file again."""
        if not self.path.exists():
            return
        # Half a line is what a process left that was killed while it wrote.
        whole = self.path.read_bytes().rpartition(b"\n")[0]
        for number, line in enumerate(whole.decode("utf-8", "replace").split("\n"), start=1):
            if not line:
                continue
            try:
                found = Result(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise PrismError(
                    f"{self.path}, line {number}: is no result of a run; remove the line, and the run "
                    "is made again"
                ) from error
            self._found[found.key] = found

    def append(self, result: Result) -> None:
        """Add a line to the file.

        Raises:
            OutputError: it cannot be written.
        """
        writable_folder(self.path.parent)
        line = json.dumps(_rounded(asdict(result)), allow_nan=True)
        try:
            with FileLock(f"{self.path}.lock"), self.path.open("a+b") as file:
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
                file.write(line.encode() + b"\n")
                file.flush()
            sync(self.path)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise OutputError(f"cannot write {self.path}: {reason}; free some space") from error
        self._found[result.key] = result

    def __getitem__(self, key: str) -> Result:
        return self._found[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def _rounded(value: Any) -> Any:
    """Numbers with five digits, which is less than any difference that matters."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    return value
