"""Draw time and memory of first and second order against K, from a result of first_vs_second_order.py.

    python benchmarks/plot_first_vs_second_order.py     # the picture in the README
    python benchmarks/plot_first_vs_second_order.py benchmarks/results/first_vs_second_order_segresnet_24.json

Times are relative to first order with the same K in the same round. Points are the median over the
rounds, bars the smallest and largest ratio. The peers (higher, learn2learn and TorchOpt) are drawn in
grey under one label. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from measuring import in_each_round
from rich.console import Console

HERE = Path(__file__).parent
RESULT = HERE / "results" / "first_vs_second_order_unet_32.json"
PICTURE = HERE.parent / "docs" / "images" / "first_vs_second_order.png"
PEERS = ("higher", "learn2learn", "TorchOpt")
NETS = {"unet": "3-D U-Net", "prismnet": "PrismNet", "segresnet": "SegResNet"}


@dataclass(frozen=True)
class Line:
    """How the methods of one label are drawn."""

    label: str
    methods: tuple[str, ...]
    colour: str
    marker: str


# The colours are Okabe and Ito's, which colour-blind readers can tell apart.
LINES = (
    Line("first order", ("FirstOrder",), "#009E73", "o"),
    Line(
        "second order, recomputed (default for K > 1)", ("SecondOrder recomputed",), "#D55E00", "s"
    ),
    Line("second order, stored graph", ("SecondOrder stored",), "#0072B2", "^"),
    Line(", ".join(PEERS), PEERS, "0.55", "x"),
)


def draw(axes: Axes, results: list[dict[str, Any]], quantity: str) -> None:
    """One panel: ``quantity`` (``ratio`` or ``peak_mib``) of every method against K."""
    steps = [r["setting"]["steps"] for r in results]
    for line in LINES:
        # The label belongs to the first of several methods: one legend entry for all of them.
        for number, name in enumerate(n for n in line.methods if n in results[0]["methods"]):
            every = [_rounds(r["methods"], name, quantity) for r in results]
            middle = [statistics.median(values) for values in every]
            spread = [
                [m - min(values) for m, values in zip(middle, every, strict=True)],
                [max(values) - m for m, values in zip(middle, every, strict=True)],
            ]
            axes.errorbar(
                steps, middle, spread, color=line.colour, marker=line.marker, markersize=5.5,
                linewidth=1.8, elinewidth=1, capsize=2, label="" if number else line.label,
                zorder=1 if line.methods == PEERS else 2,
            )  # fmt: skip
    axes.set(xlabel="inner steps K", xticks=steps, ylim=(0, None))
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def plot(path: Path, out: Path) -> None:
    """Two panels beside each other: time and memory."""
    results = json.loads(path.read_text())["results"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.9), layout="constrained")
    draw(left, results, "ratio")
    draw(right, results, "peak_mib")
    left.set_title("time of one meta-gradient / first order", loc="left", fontsize=11)
    right.set_title("peak memory above the net's, MiB", loc="left", fontsize=11)
    setting = results[0]["setting"]
    net = NETS.get(setting["net"], setting["net"])
    figure.suptitle(
        f"{net}, patches of {setting['size']}$^3$, batch {setting['batch']}, "
        f"{setting['threads']} CPU threads",
        fontsize=11, x=0.01, ha="left",
    )  # fmt: skip
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


def _rounds(methods: dict[str, Any], name: str, quantity: str) -> list[float]:
    """The rounds of a quantity; memory is measured once."""
    if quantity == "ratio":
        return in_each_round(methods[name]["seconds"], methods["FirstOrder"]["seconds"])
    return [methods[name][quantity]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "result",
        nargs="?",
        type=Path,
        default=RESULT,
        help=f"JSON file that first_vs_second_order.py wrote, for one net (default: {RESULT.name})",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="picture to write (default: docs/images/first_vs_second_order.png for the default result, "
        "else beside the result)",
    )
    arguments = parser.parse_args()
    beside = arguments.result.with_name(f"{arguments.result.stem}_lines.png")
    out = arguments.out or (PICTURE if arguments.result == RESULT else beside)
    plot(arguments.result, out)
    Console().print(f"written: {out}")


if __name__ == "__main__":
    main()
