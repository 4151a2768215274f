"""Is anything lost when a command is killed? Every kill is followed by the command that goes on.

    python benchmarks/kills.py                                        # 60 kills, half an hour or less
    python benchmarks/kills.py --kill 7 --terminate 0 --interrupt 0   # one kill -9 in each phase

One run on small phantoms, its evaluation and its predictions are the reference. Then the same commands are
killed at random moments of every phase: while cases are prepared, in the first steps, while a checkpoint is
written, in the middle of the training, at its end, and in ``evaluate`` and ``predict``. The folder tells in
which phase a process is. A user's next command follows: ``train --resume`` if there is a run, otherwise the
same command again. Half of the trainings load their data in a process of its own, which a kill leaves alone
for some seconds.

The second command must end with code 0. Weights, losses, scores, label volumes and tables must equal the
reference to the bit, and no temporary file may be left. SIGTERM and SIGINT must also end the first command
with code 143 and 130, unless it was done.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from measuring import facts
from rich.console import Console
from rich.table import Table

import prism_meta as pm
from prism_meta.data.phantom import write_phantoms
from prism_meta.training.folder.lock import HOLDER
from prism_meta.training.folder.weights import WEIGHTS

STEPS, CHECKPOINT_EVERY = 60, 5
MODALITIES = ("flair", "t1")
#: Seconds between two looks at the folder.
LOOK = 0.0005
#: Seconds that a command may take.
LONGEST = 300
SETTINGS = (
    f"data.modalities={[*MODALITIES]}", "data.spacing=[4, 4, 4]", "data.patch=[24, 24]", "data.batch_size=1",
    "data.test_cases=['case_000']", "model.width=2", "model.depth=2",
    "meta.strategy=first_order", "meta.inner=adamw", "meta.inner_state=carried", "meta.inner_lr=0.001",
    "objective.weighting=learned",
    "fabric.accelerator=cpu", f"training.steps={STEPS}", f"training.checkpoint_every={CHECKPOINT_EVERY}",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """The folders of one trial."""

    folder: Path
    cases: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def cache(self) -> Path:
        return self.folder / ".prism-meta-cache"

    @property
    def labels(self) -> Path:
        return self.folder / "labels"

    def logged(self) -> int:
        """The number of steps in the log."""
        path = self.run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def left(self) -> list[str]:
        """Names of temporary files, and the note of who holds the lock."""
        return [*self.partial(), *(p.name for p in self.folder.rglob(HOLDER))]

    def partial(self) -> list[str]:
        """Names of temporary files."""
        return [path.name for path in self.folder.rglob(".partial-*")]

    def writes(self, suffix: str) -> bool:
        """Whether a file with this suffix is being written into the run folder."""
        for folder in (self.run, self.run / WEIGHTS):
            try:
                names = os.listdir(folder)  # noqa: PTH208, faster than a Path for each
            except FileNotFoundError:
                continue
            if any(name.startswith(".partial-") and name.endswith(suffix) for name in names):
                return True
        return False


@dataclass(frozen=True)
class Phase:
    """A part of a command.

    Args:
        name: for the table.
        command: train, evaluate or predict.
        begun: whether it has begun.
        ended: whether it has ended; None stands for the end of the process.
        moment: kill at once when it begins, because it takes only milliseconds.
    """

    name: str
    command: str
    begun: Callable[[Place], bool]
    ended: Callable[[Place], bool] | None = None
    moment: bool = False


PHASES = (
    Phase("prepare", "train", lambda p: p.cache.exists(), lambda p: (p.run / "run.json").exists()),
    Phase(
        "first steps", "train", lambda p: (p.run / "run.json").exists(), lambda p: p.logged() > 0
    ),
    Phase("checkpoint", "train", lambda p: p.writes(".pt"), moment=True),
    Phase("middle", "train", lambda p: p.logged() > 0, lambda p: p.logged() == STEPS),
    Phase("weights", "train", lambda p: p.writes(".safetensors"), moment=True),
    Phase("evaluate", "evaluate", lambda p: (p.run / "evaluation").exists()),
    Phase("predict", "predict", lambda p: p.labels.exists()),
)


@dataclass
class Trial:
    """One kill and what followed. ``faults`` says what was not as it must be."""

    number: int
    phase: str
    signal: str
    workers: int
    seconds_after_start_of_phase: float = 0.0
    misses: int = 0
    first_code: int = 0
    steps_logged: int = 0
    temporary_files: int = 0
    goes_on_with: str = ""
    second_code: int = 0
    faults: list[str] = field(default_factory=list)


def arguments_of(command: str, place: Place, workers: int) -> list[str]:
    """What a user types, also after a kill."""
    if command == "evaluate":
        return ["evaluate", str(place.run)]
    if command == "predict":
        return ["predict", str(place.run), str(place.cases), str(place.labels)]
    if (place.run / "run.json").exists():
        return ["train", "--resume", str(place.run)]
    settings = [part for s in (*SETTINGS, f"data.workers={workers}") for part in ("--set", s)]
    return ["train", str(place.cases), "--out", str(place.run), *settings]


def start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "prism_meta", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(pm.__path__[0]).parent)},
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code and standard error."""
    _, text = process.communicate(timeout=LONGEST)
    return process.returncode, text


def wait(process: subprocess.Popen[str], condition: Callable[[], bool]) -> float | None:
    """The time when ``condition`` became true; None if the process ended before."""
    while not condition():
        if process.poll() is not None:
            return None
        time.sleep(LOOK)
    return time.perf_counter()


def results(command: str, place: Place) -> dict[str, bytes]:
    """What must be equal to the bit."""
    if command == "evaluate":
        names = ("records.csv", "summary.json")
        files = [place.run / "evaluation" / name for name in names]
    elif command == "predict":
        files = [place.labels / "predictions.csv", *place.labels.glob("*.nii.gz")]
    else:
        files = [place.run / "weights/last.safetensors", place.run / "metrics.jsonl"]
    return {file.name: file.read_bytes() for file in files if file.exists()}


def reference(place: Place) -> tuple[dict[str, dict[str, bytes]], dict[str, float]]:
    """The results of each command, and the seconds of each phase, without a kill."""
    expected, seconds = {}, {}
    for command in ("train", "evaluate", "predict"):
        process = start(arguments_of(command, place, 0))
        for phase in (p for p in PHASES if p.command == command and not p.moment):
            begun = wait(process, lambda phase=phase: phase.begun(place))
            end = phase.ended
            ended = begun and wait(process, lambda end=end: end is not None and end(place))
            if begun is None:
                raise SystemExit(f"the reference never came to {phase.name}\n{finish(process)[1]}")
            seconds[phase.name] = (ended or time.perf_counter()) - begun
        code, text = finish(process)
        if code:
            raise SystemExit(f"the reference ended with code {code}\n{text}")
        expected[command] = results(command, place)
    return expected, seconds


def killed(
    trial: Trial, phase: Phase, place: Place, draw: random.Random, seconds: float
) -> tuple[int, str]:
    """Start the command and kill it in the phase; again if it was faster than the kill."""
    process = start(arguments_of(phase.command, place, trial.workers))
    # One of all checkpoints; the weights are written once.
    skipped = draw.randrange(STEPS // CHECKPOINT_EVERY) if phase.name == "checkpoint" else 0
    for _ in range(skipped):
        wait(process, lambda: phase.begun(place))
        wait(process, lambda: not phase.begun(place))
    begun = wait(process, lambda: phase.begun(place))
    delay = 0.0 if phase.moment else draw.uniform(0, seconds)
    if begun is not None:
        wait(process, lambda: time.perf_counter() >= begun + delay)
        if process.poll() is None:
            process.send_signal(signal.Signals[trial.signal])
            trial.seconds_after_start_of_phase = time.perf_counter() - begun
            return finish(process)
    finish(process)
    raise TimeoutError


def tried(
    trial: Trial, whole: Place, expected: dict[str, dict[str, bytes]], seconds: dict[str, float],
    seed: int,
) -> Trial:  # fmt: skip
    """Kill, go on, and check."""
    phase = next(p for p in PHASES if p.name == trial.phase)
    draw = random.Random(f"{seed} {trial.number}")
    place = Place(whole.folder.parent / str(trial.number), whole.cases)
    wanted = expected[phase.command]
    for trial.misses in range(10):
        shutil.rmtree(place.folder, ignore_errors=True)
        place.folder.mkdir()
        if phase.command != "train":
            shutil.copytree(whole.run, place.run, ignore=shutil.ignore_patterns("evaluation"))
        try:
            trial.first_code, text = killed(trial, phase, place, draw, seconds.get(phase.name, 0.0))
            break
        except TimeoutError:
            continue
    else:
        trial.faults.append("the command was always faster than the kill")
        return trial
    number = signal.Signals[trial.signal]
    done = results(phase.command, place) == wanted
    codes = {-9} if number == signal.SIGKILL else {128 + number, *([0, -number] if done else [])}
    trial.faults += check(
        (trial.first_code in codes, f"first code {trial.first_code}: {text[-500:]}"),
        ("Traceback" not in text, f"first command: {text[-500:]}"),
    )
    trial.steps_logged, trial.temporary_files = place.logged(), len(place.partial())
    again = arguments_of(phase.command, place, trial.workers)
    trial.goes_on_with = "resume" if "--resume" in again else "the same command"
    trial.second_code, text = finish(start(again))
    found = results(phase.command, place)
    unequal = [n for n in sorted({**wanted, **found}) if wanted.get(n) != found.get(n)]
    names = {p.name for p in place.run.iterdir()} ^ {p.name for p in whole.run.iterdir()}
    trial.faults += check(
        (trial.second_code == 0, f"second code {trial.second_code}: {text[-500:]}"),
        (not unequal, f"not equal: {', '.join(unequal)}"),
        (not place.left(), f"left over: {', '.join(place.left())}"),
        (names <= {"evaluation"}, f"other files in the run: {', '.join(sorted(names))}"),
    )
    if not trial.faults:
        shutil.rmtree(place.folder)
    trial.faults = [f.replace(str(whole.folder.parent), "...") for f in trial.faults]
    return trial


def check(*conditions: tuple[bool, str]) -> list[str]:
    return [fault for fine, fault in conditions if not fine]


def planned(arguments: argparse.Namespace) -> Iterator[Trial]:
    """Each signal goes through all phases in turn."""
    number = 0
    for name, count in (
        ("SIGKILL", arguments.kill),
        ("SIGTERM", arguments.terminate),
        ("SIGINT", arguments.interrupt),
    ):
        for k in range(count):
            phase = PHASES[k % len(PHASES)]
            # Every other pass over the phases loads the data in another process.
            workers = (k // len(PHASES)) % 2 if phase.command == "train" else 0
            yield Trial(number, phase.name, name, workers)
            number += 1


def show(console: Console, trials: Sequence[Trial]) -> None:
    table = Table(title="Kills by phase", title_justify="left")
    columns = ("signal", "phase", "kills", "left temporary files", "resumed", "equal, nothing left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("signal", "phase") else "right")
    for name in dict.fromkeys(t.signal for t in trials):
        for phase in PHASES:
            mine = [t for t in trials if (t.signal, t.phase) == (name, phase.name)]
            if mine:
                table.add_row(
                    name,
                    phase.name,
                    str(len(mine)),
                    str(sum(t.temporary_files > 0 for t in mine)),
                    str(sum(t.goes_on_with == "resume" for t in mine)),
                    f"{sum(not t.faults for t in mine)} of {len(mine)}",
                )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kill", type=int, default=40, help="number of SIGKILL (default 40)")
    parser.add_argument("--terminate", type=int, default=10, help="number of SIGTERM (default 10)")
    parser.add_argument("--interrupt", type=int, default=10, help="number of SIGINT (default 10)")
    parser.add_argument("--jobs", type=int, default=2, help="trials at the same time (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default 0)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/kills.json")
    arguments = parser.parse_args()
    arguments.threads = arguments.rounds = 1  # for facts()
    # A shell starts background jobs with SIGINT ignored, which the commands would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    console = Console()
    told = facts(arguments, ("prism-meta", "torch"))
    console.print(told)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_phantoms(
            root / "cases",
            [[True, True]] * 4,
            shape=(40, 48, 36),
            spacing=4.0,
            modalities=MODALITIES,
        )
        whole = Place(root / "whole", root / "cases")
        whole.folder.mkdir()
        expected, seconds = reference(whole)
        console.print({"seconds of each phase": seconds})

        def one(trial: Trial) -> Trial:
            done = tried(trial, whole, expected, seconds, arguments.seed)
            verdict = "; ".join(done.faults) or "equal, nothing left"
            console.print(
                f"{done.number:3} {done.signal:8} {done.phase:12} code {done.first_code}, "
                f"{done.temporary_files} temporary files, {done.steps_logged} steps, then "
                f"{done.goes_on_with}: {verdict}",
                highlight=False,
            )
            return done

        with ThreadPoolExecutor(arguments.jobs) as pool:
            trials = list(pool.map(one, planned(arguments)))
    show(console, trials)
    bad = [trial for trial in trials if trial.faults]
    content: dict[str, Any] = {
        **told,
        "seconds": time.perf_counter() - begin,
        "seconds_of_phases": seconds,
        "kills": len(trials),
        "kills_with_faults": len(bad),
        "trials": [asdict(trial) for trial in trials],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    console.print(f"written: {arguments.out}")
    if bad:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
