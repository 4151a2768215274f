"""How does an outer step scale to many processes, for each strategy?

    python benchmarks/scaling.py                       # about 3 minutes; two processes of one thread each

Nothing here has 64 processes. The script measures what a step is made of, puts it into a cost model, checks
the model against two processes on this machine, and computes 1 to 64 processes at stated network speeds.

Measured between two processes, per strategy of the registry: the seconds of an outer step of ``Trainer``
without communication, and the bytes that it averages over processes with ``alpha = 0`` (the gradient) and
with a pull (gradient and phi~). Measured once: the calls per step in which processes wait for each other,
the seconds that these calls add to the step of a model with two parameters, and gloo's seconds per byte.

The model of a step of n processes is

    T(n) = mean of the slowest of n computations
         + calls * 2 ceil(log2 n) latency
         + 2 (n - 1) (latency + bytes / (n bandwidth))        (a ring all-reduce)

Computations are drawn with replacement from those that were measured, relative to their median, because a
step waits for the slowest process. They are seconds of the processor, without those of other work on this
machine. ``--speedup`` divides them: 1 is one thread of this CPU. A GPU computes many times faster and sends
the same bytes, so that communication weighs more; 100 is an assumed value, not a measured one. Efficiency is
T(1) / T(n): each process has its own episode.

The check: two processes take steps alone and steps together in turns. The slower of the two alone, plus
what calls and bytes were measured to cost, predicts the step together. The seconds are wall-clock, because
waiting is what is asked for. Other work on the machine disturbs them, so the table shows the median of the
ratios of each round.

Result: the medians of the six strategies are 0.90 to 1.14 times the prediction, but single rounds 0.45 to
1.9, because other work shared the two cores. Without a pull half the bytes are sent. At 100 times the speed
and 10 Gbit/s, 8 processes in second order have an efficiency of 0.46, or 0.33 with a pull.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from measuring import facts, with_spread
from rich.console import Console
from rich.table import Table
from two_processes import ALPHAS, Setting, in_two_processes

import prism_meta as pm

RANKS = (1, 2, 4, 8, 16, 32, 64)
#: Bandwidth in Gbit/s and latency of one message in seconds; stated, not measured.
NETWORKS = {
    "1 Gbit/s": (1.0, 50e-6),
    "10 Gbit/s": (10.0, 30e-6),
    "100 Gbit/s": (100.0, 5e-6),
}
#: Draws of the slowest of n computations.
DRAWS = 4000


def line_through(messages: dict[str, list[float]]) -> tuple[float, float]:
    """a and b of the seconds a + b B of a message of B bytes: least squares of relative errors."""
    sizes = torch.tensor([float(size) for size in messages], dtype=torch.float64)
    taken = torch.tensor([statistics.median(v) for v in messages.values()], dtype=torch.float64)
    columns = torch.stack((torch.ones_like(sizes), sizes), 1) / taken[:, None]
    a, b = torch.linalg.lstsq(columns, torch.ones(len(sizes), 1, dtype=torch.float64)).solution
    return max(float(a), 0.0), max(float(b), 0.0)


def slower(ranks: Sequence[dict[str, list[float]]], key: str) -> list[float]:
    """The slower of the two processes in each round."""
    return [max(pair) for pair in zip(*(rank[key] for rank in ranks), strict=True)]


def check(name: str, ranks: Sequence[dict[str, Any]], per_byte: float) -> dict[str, Any]:
    """What two processes took in each round of a strategy, and what was predicted."""
    empty = [rank["empty"] for rank in ranks]
    waiting = statistics.median(
        t - a for t, a in zip(slower(empty, "together"), slower(empty, "alone"), strict=True)
    )
    steps = [rank["steps"][name] for rank in ranks]
    sent = ranks[0]["sent"][name]
    added = max(waiting, 0.0) + per_byte * sent["gradient"]
    return {
        "strategy": name,
        "sent": sent,
        "compute": [seconds for rank in steps for seconds in rank["alone (processor)"]],
        "together": slower(steps, "together"),
        "predicted": [seconds + added for seconds in slower(steps, "alone")],
        "communication": added,
    }


# ---------------------------------------------------------------- the model


def slowest_of(n: int, measured: Sequence[float], seed: int) -> float:
    """Mean of the slowest of n computations, relative to their median."""
    relative = torch.tensor(measured) / statistics.median(measured)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(relative), (DRAWS, n), generator=generator)
    return float(relative[drawn].max(1).values.mean())


def communication(n: int, calls: float, size: int, gigabits: float, latency: float) -> float:
    """Seconds of all calls of an outer step, and of a ring all-reduce of ``size`` bytes."""
    if n == 1:
        return 0.0
    ring = 2 * (n - 1) * (latency + 8 * size / (n * gigabits * 1e9))
    return calls * 2 * math.ceil(math.log2(n)) * latency + ring


def simulate(
    found: dict[str, Any], calls: float, speedups: Sequence[float], seed: int
) -> list[dict[str, Any]]:
    """T(n) and efficiency for every speed of computing, network, and choice of what is sent."""
    compute = statistics.median(found["compute"])
    slowest = {n: slowest_of(n, found["compute"], seed) for n in RANKS}
    rows = []
    for speedup, (network, speed), (what, size) in itertools.product(
        speedups, NETWORKS.items(), found["sent"].items()
    ):
        taken = {
            n: compute / speedup * slowest[n] + communication(n, calls, size, *speed) for n in RANKS
        }
        rows.append(
            {
                "speedup": speedup,
                "network": network,
                "sent": what,
                "seconds": taken,
                "efficiency": {n: taken[1] / t for n, t in taken.items()},
            }
        )
    return rows


# ---------------------------------------------------------------- report


def show(console: Console, results: Sequence[dict[str, Any]]) -> None:
    table = Table(title="one outer step", title_justify="left")
    for column in (
        "strategy", "compute / first order", "MB sent: gradient", "with a pull",
        "2 processes / predicted",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == "strategy" else "right")
    base = statistics.median(
        next(r["compute"] for r in results if r["strategy"] == pm.FirstOrder.name)
    )
    for found in results:
        ratios = [t / p for t, p in zip(found["together"], found["predicted"], strict=True)]
        compute = statistics.median(found["compute"])
        table.add_row(
            found["strategy"],
            f"{compute / base:.2f}",
            *(f"{found['sent'][what] / 1e6:.2f}" for what in ALPHAS),
            with_spread(ratios),
        )
    console.print(table)
    for speedup in dict.fromkeys(row["speedup"] for row in results[0]["simulated"]):
        table = Table(
            title=f"efficiency if a computation takes 1/{speedup:g} of the time of one thread here",
            title_justify="left",
        )
        for column in ("strategy", "network", "sent", *(str(n) for n in RANKS)):
            table.add_column(column)
        for found in results:
            for row in (r for r in found["simulated"] if r["speedup"] == speedup):
                cells = (f"{row['efficiency'][n]:.2f}" for n in RANKS)
                table.add_row(found["strategy"], row["network"], row["sent"], *cells)
        console.print(table)


def plot(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """One panel per network: efficiency against processes, at the highest speed of computing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    speedup = max(row["speedup"] for row in results[0]["simulated"])
    figure, axes = plt.subplots(
        1, len(NETWORKS), figsize=(11, 3.6), sharey=True, layout="constrained"
    )
    # The colours are Okabe and Ito's, which colour-blind readers can tell apart.
    colours = ("#000000", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#E69F00")
    for axis, network in zip(axes, NETWORKS, strict=True):
        for found, colour in zip(results, colours, strict=False):
            for what, line in zip(ALPHAS, ("-", ":"), strict=True):
                (row,) = (
                    r for r in found["simulated"]
                    if (r["speedup"], r["network"], r["sent"]) == (speedup, network, what)
                )  # fmt: skip
                label = found["strategy"] if what == "gradient" else ""
                axis.plot(RANKS, row["efficiency"].values(), line, color=colour, label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(RANKS, [str(n) for n in RANKS])
        axis.set(title=network, xlabel="processes", ylim=(0, 1.05))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("efficiency T(1) / T(n)")
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"Simulated; computing {speedup:g} times as fast as one thread here. "
        "Solid: gradient sent; dotted: gradient and pull.",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", type=int, default=16, help="voxels per side of a patch (default 16)"
    )
    parser.add_argument("--batch", type=int, default=2, help="patches in a batch (default 2)")
    parser.add_argument(
        "--speedup", nargs="+", type=float, default=[1.0, 100.0],
        help="how much faster than one thread here the processes compute (default 1 100)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=9, help="repetitions (default 9)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/scaling.json")
    arguments = parser.parse_args()
    arguments.threads = 1  # of each process, for facts()
    torch.set_num_threads(1)
    console = Console(width=120)
    told = facts(arguments, ("prism-meta", "torch", "lightning-fabric"))
    console.print(told)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(arguments.size, arguments.batch, arguments.rounds, arguments.seed, folder)
        ranks = in_two_processes(setting)
    a, b = line_through(ranks[0]["messages"])
    calls = ranks[0]["calls"]
    console.print(
        f"gloo between two processes here: {a * 1e6:.0f} us and {8e-9 / b:.1f} Gbit/s; "
        f"{calls:.1f} calls per outer step"
    )
    results = [check(kind.name, ranks, b) for kind in pm.ALL_STRATEGIES]
    for found in results:
        found["simulated"] = simulate(found, calls, arguments.speedup, arguments.seed)
    show(console, results)
    written = {
        **told,
        "setting": {k: v for k, v in asdict(setting).items() if k != "folder"},
        "networks": {n: {"gbit_per_s": g, "latency_s": s} for n, (g, s) in NETWORKS.items()},
        "gloo": {"seconds": a, "seconds_per_byte": b, "messages": ranks[0]["messages"]},
        "calls": calls,
        "empty_step": [rank["empty"] for rank in ranks],
        "results": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(written, indent=1) + "\n")
    plot(arguments.out.with_suffix(".png"), results)
    console.print(f"written: {arguments.out} and {arguments.out.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
