"""A run that is stopped, refused, moved or extended, as the command does it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import errors, run, settings
from filelock import FileLock
from safetensors.torch import load_file

from prism_meta.errors import ConfigError
from prism_meta.training import run as run_module
from prism_meta.training import stopping, trainer
from prism_meta.training.folder.lock import HOLDER, LOCK, locked
from prism_meta.training.stopping import StopRequest, duration

OPTIONS = settings("training.steps=6", "training.checkpoint_every=4", "training.augment=false")


@pytest.fixture(scope="module")
def whole(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run("train", cases, "--out", out, *OPTIONS)[0] == 0
    return out


def assert_equal_runs(first: Path, second: Path) -> None:
    """Same log and weights to the bit, and the same files."""
    for name in ("metrics.jsonl", "weights/last.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert {p.name for p in first.iterdir()} == {p.name for p in second.iterdir()}


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, signal.Signals]]:
    """Signals that this process gets while it takes a step, by step."""
    signals: dict[int, signal.Signals] = {}
    take = trainer.Trainer._step

    def taking(self: trainer.Trainer, step: int, *arguments: Any) -> object:
        if step in signals:
            os.kill(os.getpid(), signals.pop(step))
        return take(self, step, *arguments)

    monkeypatch.setattr(trainer.Trainer, "_step", taking)
    return signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [0, 2, 3])
def test_a_signal_ends_after_the_step_and_resume_goes_on(
    cases: Path, whole: Path, tmp_path: Path, at_step: dict[int, signal.Signals],
    number: signal.Signals, step: int,
) -> None:  # fmt: skip
    out = tmp_path / "run"
    at_step[step] = number
    code, output = run("train", cases, "--out", out, *OPTIONS)
    assert code == 128 + number
    assert (
        f"stopped by {number.name} after step {step + 1} of 6, all is saved; go on with: "
        f"prism-meta train --resume {out}"
    ) in output
    assert not (out / "weights/last.safetensors").exists()
    assert run("train", "--resume", out)[0] == 0
    assert_equal_runs(out, whole)


def test_a_signal_in_the_last_step_ends_the_training_as_usual(
    cases: Path, whole: Path, tmp_path: Path, at_step: dict[int, signal.Signals]
) -> None:
    at_step[5] = signal.SIGTERM
    assert run("train", cases, "--out", tmp_path / "run", *OPTIONS)[0] == 0
    assert_equal_runs(tmp_path / "run", whole)


def test_a_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    request = StopRequest()
    with request.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert request() and request.reason == "SIGTERM"
        monkeypatch.setattr(stopping.os, "kill", lambda *sending: sent.append(sending))
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert sent == [(os.getpid(), signal.SIGTERM)]


def test_signals_are_handled_as_before_afterwards() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest().listening():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_while_cases_are_prepared(
    cases: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left but the cases that are ready, and the same command starts again."""
    out = tmp_path / "run"
    moments = iter([0.0, 0.0, 100.0])
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: next(moments, 100.0))
        code, output = run("train", cases, "--out", out, "--time-limit", "50s", *OPTIONS)
    assert code == 143 and "stopped by the time limit after step 0 of 6" in output
    assert f"go on with: prism-meta train {cases} --out {out}" in output
    assert not out.exists()
    assert run("train", cases, "--out", out, *OPTIONS)[0] == 0
    assert_equal_runs(out, whole)


def test_a_time_limit_counts_as_sigterm() -> None:
    limit = StopRequest(limit=0)
    assert limit() and limit.signal == signal.SIGTERM and limit.reason == "the time limit"
    assert not StopRequest(limit=60)() and not StopRequest()()


@pytest.mark.parametrize("text", ["", "11", "h", "-1h", "1x", "0s", "1h1h", "nan"])
def test_no_duration(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        duration(text)
    assert str(caught.value) == (
        f"time limit: got {text!r}; give days, hours, minutes or seconds, e.g. 11h30m"
    )


def test_two_never_train_in_one_folder(cases: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    facts = {"host": "node7", "pid": 1234, "since": "2026-01-01T00:00:00+00:00"}
    (out / HOLDER).write_text(json.dumps(facts))
    with FileLock(out / LOCK):
        code, output = run("train", cases, "--out", out, *OPTIONS)
        assert (code, errors(output)) == (
            2,
            [
                f"{out}: process 1234 on node7 (since 2026-01-01T00:00:00+00:00) trains in this folder; "
                "wait until it ends, or give another --out"
            ],
        )
    assert run("train", cases, "--out", out, *OPTIONS)[0] == 0, "a killed process holds no lock"
    with FileLock(out / LOCK):
        code, output = run("train", "--resume", out)
        assert code == 2 and "another process trains in this folder" in errors(output)[0]
    assert_equal_runs(out, whole)


def test_moved_cases(
    cases: Path, whole: Path, tmp_path: Path, at_step: dict[int, signal.Signals]
) -> None:
    old, new, out = tmp_path / "old", tmp_path / "new", tmp_path / "run"
    old.symlink_to(cases)
    at_step[2] = signal.SIGTERM
    assert run("train", old, "--out", out, *OPTIONS)[0] == 143
    facts = json.loads((out / "run.json").read_text())
    assert Path(facts["data"]).is_absolute()
    (out / "run.json").write_text(json.dumps({**facts, "data": str(old)}))
    old.rename(new)
    code, output = run("train", "--resume", out)
    assert (code, errors(output)) == (
        2,
        [
            f"{out}: its cases are no longer in {old}; give the folder that they moved to: "
            f"prism-meta train --resume {out} CASES"
        ],
    )
    assert run("train", "--resume", out, new)[0] == 0
    assert_equal_runs(out, whole)
    assert json.loads((out / "run.json").read_text())["data"] == str(new.resolve())


def test_an_edited_configuration_is_refused(
    cases: Path, tmp_path: Path, at_step: dict[int, signal.Signals]
) -> None:
    out = tmp_path / "run"
    at_step[2] = signal.SIGTERM
    assert run("train", cases, "--out", out, *OPTIONS)[0] == 143
    path = out / "config.toml"
    path.write_text(path.read_text().replace("steps = 6", "steps = 60"))
    code, output = run("train", "--resume", out)
    assert (code, errors(output)) == (
        2,
        [
            f"{path}: was changed since the run was started (training.steps from 6 to 60); undo that, and "
            "use --extend for more steps, or start a new run"
        ],
    )


def test_an_extended_run_equals_one_that_was_stopped_on_the_longer_schedule(
    cases: Path, whole: Path, tmp_path: Path, at_step: dict[int, signal.Signals]
) -> None:
    """Weights differ, as the first steps had other rates; rates and episodes of the new steps do not."""
    longer, extended = tmp_path / "longer", tmp_path / "extended"
    nine = [option.replace("steps=6", "steps=9") for option in OPTIONS]
    assert run("train", cases, "--out", longer, *nine)[0] == 0
    assert run("train", cases, "--out", extended, *OPTIONS)[0] == 0
    at_step[7] = signal.SIGTERM
    assert run("train", "--resume", extended, "--extend", "3")[0] == 143
    assert run("train", "--resume", extended)[0] == 0
    lines = [json.loads(line) for line in (extended / "metrics.jsonl").read_text().splitlines()]
    planned = [json.loads(line) for line in (longer / "metrics.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert lines[:6] == before
    assert [line["lr"] for line in lines[6:]] == pytest.approx([line["lr"] for line in planned[6:]])
    assert "steps = 9" in (extended / "config.toml").read_text()
    assert load_file(extended / "weights/last.safetensors").keys()


def test_extend_that_was_killed_can_be_given_again(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``run.json`` is written first; the second command must still write ``config.toml``."""
    out = tmp_path / "run"
    assert run("train", cases, "--out", out, *OPTIONS)[0] == 0
    write = run_module.write_whole

    def killed(path: Path, content: str) -> None:
        if path.name == "config.toml":
            raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_whole", killed)
        assert run("train", "--resume", out, "--extend", "1")[0] == 130
    assert "steps = 6" in (out / "config.toml").read_text()
    assert run("train", "--resume", out, "--extend", "1")[0] == 0
    assert "steps = 7" in (out / "config.toml").read_text()
    assert json.loads((out / "run.json").read_text())["config"]["training"]["steps"] == 7


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_processes_that_load_data_do_not_keep_the_lock_of_a_killed_training(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from prism_meta.training.folder.lock import locked\n"
        "with locked(Path(sys.argv[1])):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        os.close(1)\n"
        "        time.sleep(60)\n"
        "    print(child, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True
    )
    try:
        with locked(tmp_path):
            os.kill(int(ended.stdout), 0)  # the child still lives
    finally:
        os.kill(int(ended.stdout), signal.SIGKILL)


def test_extend_needs_a_run(cases: Path, tmp_path: Path) -> None:
    code, output = run("train", cases, "--out", tmp_path / "run", "--extend", "3")
    assert (code, errors(output)) == (
        2, ["train --extend: works on a run; give --resume RUN, or set training.steps"],
    )  # fmt: skip
