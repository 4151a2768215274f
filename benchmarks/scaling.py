"""How does an outer step scale to many processes, for each strategy?

    python benchmarks/scaling.py                       # about 3 minutes; two processes of one thread each

Nothing here has 64 processes. The script measures what a step is made of, puts it into a cost model, checks
the model against two processes on this machine, and computes 1 to 64 processes at stated network speeds.

Measured per strategy of the registry: the seconds of an outer step of ``Trainer`` without communication, and
the bytes and messages that it averages over processes, with ``alpha = 0`` (the gradient) and with a pull
(gradient and phi~). Measured with gloo between two processes: the seconds of a message of B bytes, a + b B.

The model of a step of n processes is

    T(n) = mean of the slowest of n computations
         + messages * (barrier + ring),   ring = 2 (n - 1) (latency + bytes / (n bandwidth)),
                                          barrier = 2 ceil(log2 n) latency

Computations are drawn with replacement from those that were measured, relative to their median, because a step
waits for the slowest process. ``--speedup`` divides the seconds of a computation: 1 is one thread of this CPU.
A GPU computes many times faster and sends the same bytes, so that communication weighs more; 100 is an assumed
value, not a measured one. Efficiency is T(1) / T(n): each process has its own episode.

The check: two processes take steps alone and steps together in turns. The slower of the two alone, plus the
measured a + b B, predicts the step together. The seconds are wall-clock, because waiting is what is asked for.
Other work on the machine disturbs them, so that the table shows the median of the ratios of each round.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from measuring import facts, with_spread
from nets import Setting as Shape
from nets import build
from rich.console import Console
from rich.table import Table
from torch import Tensor

import prism_meta as pm
from prism_meta.training.build import build_strategy
from prism_meta.training.config.schema import MetaConfig
from prism_meta.training.trainer import Trainer

RANKS = (1, 2, 4, 8, 16, 32, 64)
#: Bandwidth in Gbit/s and latency of one message in seconds; stated, not measured.
NETWORKS = {
    "1 Gbit/s": (1.0, 50e-6),
    "10 Gbit/s": (10.0, 30e-6),
    "100 Gbit/s": (100.0, 5e-6),
}
ALPHAS = {"gradient": 0.0, "gradient and pull": 0.5}
#: Bytes of the messages that a and b are fitted to.
SIZES = [2**power for power in range(10, 25, 2)]
#: Draws of the slowest of n computations.
DRAWS = 4000


@dataclass(frozen=True)
class Setting:
    """What both processes measure."""

    size: int
    batch: int
    rounds: int
    seed: int
    folder: str


class Counted:
    """A launched fabric that pretends to be one of two processes and writes down what it would send."""

    world_size = 2

    def __init__(self, fabric: Fabric) -> None:
        self.fabric, self.sent = fabric, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fabric, name)

    def all_reduce(self, values: Tensor, reduce_op: str) -> Tensor:
        self.sent.append(values.numel() * values.element_size())
        return values


def trainer(name: str, alpha: float, setting: Setting, fabric: Any) -> Trainer:
    """A trainer whose every step is the same: one episode of PrismNet."""
    shape = Shape("prismnet", 1, setting.size, setting.batch, 1, setting.seed)
    net, objective, train, meta = build(shape)
    strategy = build_strategy(MetaConfig(strategy=name), torch.tensor(0.01), weight_decay=0.0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    learner = pm.MetaLearner(net, objective, strategy, optimizer, alpha=alpha, clip_norm=5.0)
    return Trainer(learner, [(train, meta)], fabric=fabric)


def seconds(step: Trainer) -> float:
    """Wall-clock time of one outer step."""
    start = time.perf_counter()
    step.fit(steps=1)
    return time.perf_counter() - start


def sent(name: str, alpha: float, setting: Setting) -> list[int]:
    """Bytes of each message of an outer step."""
    counted = Counted(Fabric(accelerator="cpu", devices=1))
    trainer(name, alpha, setting, counted).fit(steps=1)
    return counted.sent


# ---------------------------------------------------------------- two processes


def one_of_two(fabric: Fabric, setting: Setting) -> None:
    """Measure messages, and steps alone and together in turns; each process writes what it found."""
    torch.set_num_threads(1)
    alone = Fabric(accelerator="cpu", devices=1)
    messages: dict[int, list[float]] = {size: [] for size in SIZES}
    for number in range(setting.rounds + 1):
        for size in SIZES:
            buffer = torch.zeros(size // 4)
            fabric.barrier()
            start = time.perf_counter()
            fabric.all_reduce(buffer, reduce_op="mean")
            if number:  # the first round connects and warms up
                messages[size].append(time.perf_counter() - start)
    steps = {}
    for kind in pm.ALL_STRATEGIES:
        by_fabric = {
            "alone": trainer(kind.name, 0.0, setting, alone),
            "together": trainer(kind.name, 0.0, setting, fabric),
        }
        found: dict[str, list[float]] = {key: [] for key in by_fabric}
        for number in range(setting.rounds + 1):
            for key, step in by_fabric.items():
                fabric.barrier()
                spent = seconds(step)
                if number:
                    found[key].append(spent)
        steps[kind.name] = found
    path = Path(setting.folder) / f"{fabric.global_rank}.json"
    path.write_text(json.dumps({"messages": messages, "steps": steps}))


def in_two_processes(setting: Setting) -> list[dict[str, Any]]:
    """What each of the two found."""
    Fabric(accelerator="cpu", devices=2, strategy="ddp_spawn").launch(one_of_two, setting)
    return [json.loads((Path(setting.folder) / f"{rank}.json").read_text()) for rank in (0, 1)]


def line_through(messages: dict[str, list[float]]) -> tuple[float, float]:
    """a and b of the seconds a + b B of a message: least squares of relative errors.

    Each size counts the fastest of its rounds, which other work on the machine disturbed least.
    """
    sizes = torch.tensor([float(size) for size in messages], dtype=torch.float64)
    taken = torch.tensor([min(values) for values in messages.values()], dtype=torch.float64)
    columns = torch.stack((torch.ones_like(sizes), sizes), 1) / taken[:, None]
    a, b = torch.linalg.lstsq(columns, torch.ones(len(sizes), 1, dtype=torch.float64)).solution
    return max(float(a), 0.0), max(float(b), 0.0)


def check(found: dict[str, Any], ranks: Sequence[dict[str, Any]], a: float, b: float) -> None:
    """Add to ``found`` what two processes took, and what was predicted, in each round."""
    steps = [rank["steps"][found["strategy"]] for rank in ranks]
    slowest = {key: [max(pair) for pair in zip(*(s[key] for s in steps), strict=True)]
               for key in ("alone", "together")}  # fmt: skip
    message = sum(a + b * size for size in found["sent"]["gradient"])
    found["alone"] = [value for s in steps for value in s["alone"]]
    found["together"] = slowest["together"]
    found["predicted"] = [value + message for value in slowest["alone"]]
    found["communication"] = message


# ---------------------------------------------------------------- the model


def slowest_of(n: int, measured: Sequence[float], seed: int) -> float:
    """Mean of the slowest of n computations, relative to their median."""
    relative = torch.tensor(measured) / statistics.median(measured)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(relative), (DRAWS, n), generator=generator)
    return float(relative[drawn].max(1).values.mean())


def communication(n: int, messages: Sequence[int], gigabits: float, latency: float) -> float:
    """Seconds of a barrier and a ring for each message."""
    if n == 1:
        return 0.0
    barrier = 2 * math.ceil(math.log2(n)) * latency
    bandwidth = gigabits * 1e9 / 8
    return sum(barrier + 2 * (n - 1) * (latency + size / (n * bandwidth)) for size in messages)


def simulate(found: dict[str, Any], speedups: Sequence[float], seed: int) -> list[dict[str, Any]]:
    """T(n) and efficiency for every speed of computing, network, and choice of what is sent."""
    compute = statistics.median(found["alone"])
    slowest = {n: slowest_of(n, found["alone"], seed) for n in RANKS}
    rows = []
    for speedup in speedups:
        for network, speed in NETWORKS.items():
            for what, messages in found["sent"].items():
                taken = {
                    n: compute / speedup * slowest[n] + communication(n, messages, *speed)
                    for n in RANKS
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
        "2 processes / predicted", "2 processes / 1",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == "strategy" else "right")
    base = statistics.median(
        next(r["alone"] for r in results if r["strategy"] == pm.FirstOrder.name)
    )
    for found in results:
        ratios = [t / p for t, p in zip(found["together"], found["predicted"], strict=True)]
        compute = statistics.median(found["alone"])
        table.add_row(
            found["strategy"],
            f"{compute / base:.2f}",
            *(f"{sum(found['sent'][what]) / 1e6:.2f}" for what in ALPHAS),
            with_spread(ratios),
            f"{statistics.median(found['together']) / compute:.2f}",
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
    console.print(
        f"gloo between two processes here: {a * 1e6:.0f} us + bytes / {8e-9 / b:.1f} Gbit/s"
    )
    results = []
    for kind in pm.ALL_STRATEGIES:
        found: dict[str, Any] = {
            "strategy": kind.name,
            "sent": {what: sent(kind.name, alpha, setting) for what, alpha in ALPHAS.items()},
        }
        check(found, ranks, a, b)
        found["simulated"] = simulate(found, arguments.speedup, arguments.seed)
        results.append(found)
    show(console, results)
    written = {
        **told,
        "setting": {k: v for k, v in asdict(setting).items() if k != "folder"},
        "networks": {n: {"gbit_per_s": g, "latency_s": s} for n, (g, s) in NETWORKS.items()},
        "gloo": {"seconds": a, "seconds_per_byte": b, "messages": ranks[0]["messages"]},
        "results": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(written, indent=1) + "\n")
    plot(arguments.out.with_suffix(".png"), results)
    console.print(f"written: {arguments.out} and {arguments.out.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
