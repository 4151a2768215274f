"""Shared by the benchmarks: peak memory, subprocesses, and the facts that are stored with the numbers."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


class Peak:
    """Context that measures the peak of the resident set above its start, sampled every millisecond."""

    def __enter__(self) -> Peak:
        self.base = self.value = resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.value = max(self.value, resident())

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def mib(self) -> float:
        return (self.value - self.base) / 2**20


def resident(process: str = "self") -> int:
    """Current size of the resident set of a process, in bytes."""
    pages = int(Path("/proc", process, "statm").read_text().split()[1])
    return pages * resource.getpagesize()


def in_a_process_of_its_own(
    script: str, setting: dict[str, Any], *arguments: str, memory: bool = False
) -> dict[str, Any]:
    """Run ``script --job SETTING ARGUMENTS`` and parse the last line of its output as JSON."""
    command = [sys.executable, script, "--job", json.dumps(setting), *arguments]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(setting["threads"]),
        # glibc then returns freed large tensors at once; otherwise fragmentation is measured as well.
        **({"MALLOC_MMAP_THRESHOLD_": str(2**18)} if memory else {}),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def facts(arguments: argparse.Namespace, packages: Sequence[str]) -> dict[str, Any]:
    """What a reader needs to reproduce the numbers."""
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "processor": platform.processor() or platform.machine(),
        "threads": arguments.threads,
        "seed": arguments.seed,
        **({"rounds": arguments.rounds} if "rounds" in arguments else {}),
    }


def in_each_round(seconds: Sequence[float], base: Sequence[float]) -> list[float]:
    """Ratios round by round, because the speed of a machine drifts."""
    return [s / b for s, b in zip(seconds, base, strict=True)]


def with_spread(values: Sequence[float]) -> str:
    """The median and the range, as text."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def anonymous(pid: int) -> int:
    """Bytes of a process and its children that are no mapped files; pages that they share count once."""
    total = 0
    try:
        for line in Path("/proc", str(pid), "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Anon:"):
                total += int(line.split()[1]) * 1024
        for task in Path("/proc", str(pid), "task").iterdir():
            total += sum(anonymous(int(child)) for child in (task / "children").read_text().split())
    except (OSError, ValueError):  # it has just ended
        pass
    return total
