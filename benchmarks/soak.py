"""Do memory, open files, child processes or threads grow over a long run?

    python benchmarks/soak.py                              # 2000 steps, about 5 minutes on one thread
    python benchmarks/soak.py --steps 400 --every 100      # a short look

``prism_meta.train`` runs as a user runs it, on small phantoms: one process loads the data, a checkpoint is
written every 100 steps, and all subsets of a held-out case are evaluated in between. Every ten steps the
script reads from the system what the process holds. The first quarter is left out of the verdict, because
libraries are loaded and caches are filled in it.

A quantity is flat if its median in the last quarter of the run is that in the second quarter. Handles,
processes and threads must be equal; memory may differ by 1 %. The slope is that of a straight line through
the last three quarters.

Result (2000 steps, second order): all quantities are flat. Memory grows by 2.5 MiB of 1180 per 1000 steps,
about as much as the lines of the log take that ``fit`` returns.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import facts, resident
from rich.console import Console
from rich.table import Table

import prism_meta as pm
from prism_meta.data.phantom import write_phantoms
from prism_meta.training.build import build_model, build_predictor

#: Memory in the last quarter may differ from that in the second by this share.
SHARE = 0.01
NAMES = {
    "memory_mib": "resident memory, MiB",
    "children_mib": "resident memory of child processes, MiB",
    "handles": "open file handles",
    "children": "child processes",
    "threads": "threads",
}


def held() -> dict[str, float]:
    """What this process holds now: memory, open files, children and threads."""
    own = Path("/proc/self")
    if not own.is_dir():  # not Linux: the peak of memory, and no list of open files and processes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        unit = 1 if sys.platform == "darwin" else 1024
        return {"memory_mib": peak * unit / 2**20, "threads": threading.active_count()}
    processes = children(os.getpid())
    return {
        "memory_mib": resident() / 2**20,
        "children_mib": sum(resident(pid) for pid in processes) / 2**20,
        "handles": len(list((own / "fd").iterdir())),
        "children": len(processes),
        "threads": len(list((own / "task").iterdir())),
    }


def children(parent: int) -> list[str]:
    """Numbers of the processes whose parent is this one."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in brackets may hold spaces; the state and the parent follow it.
            if int(status.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(status.parent.name)
        except OSError:  # it has ended meanwhile
            continue
    return found


def config_of(arguments: argparse.Namespace, held_out: str) -> pm.Config:
    return pm.load_config(
        overrides=[
            "data.spacing=[4, 4, 4]",
            "data.patch=[16, 16]",
            "data.batch_size=2",
            f"data.test_cases=['{held_out}']",
            "data.workers=1",
            "model.width=4",
            "model.depth=2",
            f"meta.strategy={arguments.strategy}",
            "fabric.accelerator=cpu",
            f"training.steps={arguments.steps}",
            f"seed={arguments.seed}",
        ]
    )


def soak(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Train, and return what the process held at every reading."""
    complete = torch.ones(4, len(pm.BRATS), dtype=torch.bool)
    write_phantoms(folder / "cases", complete, shape=(40, 48, 36), spacing=4.0, seed=arguments.seed)
    cases = pm.load_cases(folder / "cases", pm.BRATS)
    config = config_of(arguments, cases[0].id)
    torch.manual_seed(arguments.seed)
    model = build_model(config)
    predictor = build_predictor(config, model)
    readings: list[dict[str, Any]] = []
    start = time.perf_counter()

    def on_step(step: int, line: dict[str, Any]) -> None:
        evaluated = step % arguments.every == 0
        if evaluated:
            predictor.evaluate(cases[:1])
            model.train()
        seconds = time.perf_counter() - start
        readings.append({"step": step, "seconds": seconds, "evaluated": evaluated, **held()})

    pm.train(
        folder / "cases", config, out=folder / "run", model=model, progress=False, on_step=on_step
    )
    return readings


def slope(steps: Sequence[float], values: Sequence[float]) -> float:
    """Of a straight line, per 1000 steps."""
    return 1000 * statistics.linear_regression(steps, values).slope


def verdict(readings: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each quantity its level early and late, the slope, and whether it is flat."""
    quarter = len(readings) // 4
    late, early, rest = readings[-quarter:], readings[quarter : 2 * quarter], readings[quarter:]
    found = {}
    for name in (n for n in NAMES if n in readings[0]):
        before, after = (statistics.median(r[name] for r in part) for part in (early, late))
        allowed = SHARE * before if name.endswith("mib") else 0
        found[name] = {
            "second_quarter": before,
            "last_quarter": after,
            "per_1000_steps": slope([r["step"] for r in rest], [r[name] for r in rest]),
            "flat": abs(after - before) <= allowed,
        }
    return found


def show(console: Console, found: dict[str, dict[str, Any]]) -> None:
    table = Table(title="What the process holds", title_justify="left")
    for column in ("quantity", "second quarter", "last quarter", "per 1000 steps", "verdict"):
        table.add_column(column, justify="left" if column == "quantity" else "right")
    for name, values in found.items():
        table.add_row(
            NAMES[name],
            f"{values['second_quarter']:.1f}",
            f"{values['last_quarter']:.1f}",
            f"{values['per_1000_steps']:+.2f}",
            "flat" if values["flat"] else "[bold red]grows[/]",
        )
    console.print(table)


def plot(path: Path, readings: Sequence[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in NAMES if name in readings[0]]
    figure, axes = plt.subplots(
        len(names), 1, figsize=(8, 1.3 * len(names) + 0.6), sharex=True, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    steps = [r["step"] for r in readings]
    for axis, name in zip(axes[:, 0], names, strict=True):
        values = [r[name] for r in readings]
        axis.plot(steps, values, color="#0072B2", linewidth=1.6)
        for reading in readings:
            if reading["evaluated"]:
                axis.axvline(reading["step"], color="0.85", linewidth=1, zorder=0)
        axis.set_title(NAMES[name], loc="left", fontsize=10)
        axis.set_ylim(0, 1.25 * max(*values, 1))
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("outer step; grey lines: evaluation of all subsets of a case")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000, help="outer steps (default 2000)")
    parser.add_argument(
        "--every", type=int, default=200, help="steps between evaluations (default 200)"
    )
    parser.add_argument(
        "--strategy", default="second_order", help="name in the registry (default second_order)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/soak.json")
    arguments = parser.parse_args()
    arguments.rounds = 1  # for facts()
    torch.set_num_threads(arguments.threads)
    console = Console()
    told = facts(arguments, ("prism-meta", "torch"))
    console.print(told)
    with tempfile.TemporaryDirectory() as folder:
        readings = soak(arguments, Path(folder))
    found = verdict(readings)
    show(console, found)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(
        json.dumps({**told, "verdict": found, "readings": readings}, indent=1) + "\n"
    )
    plot(arguments.out.with_suffix(".png"), readings)
    console.print(f"written: {arguments.out} and {arguments.out.with_suffix('.png').name}")
    if not all(values["flat"] for values in found.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
