"""How much do all subsets of a case cost, compared with one prediction from all its modalities?

    python benchmarks/all_subsets.py                       # phantoms of 1 mm, 2-D and 3-D
    python benchmarks/all_subsets.py --root cases --nets 2d --rounds 5

Two parts are measured in three ways. The whole path goes from files to labels on the case's own grid,
as ``predict`` does. The network part runs one batch of windows. The three ways are: all modalities, all
15 subsets in one call, and the 15 subsets one at a time.

All ways take turns in one process. Each ratio is to the prediction from all modalities in the same
round; the table shows the median and the range over rounds and cases. Time is the processor time of all
threads. Memory is the peak of the resident set above what the libraries, the net and a first small
prediction take, each way in its own process. The net is not trained: it finds foreground everywhere,
the slowest case for restoring labels to the case's grid. The results of the ways are compared, too.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from measuring import Peak, facts, in_a_process_of_its_own, in_each_round, with_spread
from rich.console import Console
from rich.table import Table
from torch import Tensor

import prism_meta as pm
from prism_meta.data.phantom import write_phantoms

WAYS = ("full", "together", "one by one")
#: The target: all subsets together cost at most this many times one prediction.
TARGET = 6.0


@dataclass(frozen=True)
class Grid:
    """The grid of a net: spacing in mm, window size in voxels, and windows per call."""

    spacing: float
    patch: tuple[int, ...]
    batch: int


GRIDS = {"2d": Grid(2.0, (96, 96), 16), "3d": Grid(3.0, (48, 48, 48), 4)}


@dataclass(frozen=True)
class Setting:
    """One measurement: a net and a folder of cases."""

    net: str
    root: str
    cases: int
    threads: int
    seed: int

    @property
    def grid(self) -> Grid:
        return GRIDS[self.net]

    def predictor(self, spacing: float) -> pm.Predictor:
        torch.manual_seed(self.seed)
        net = pm.PrismNet(4, 4, len(self.grid.patch), 8).eval()
        return pm.Predictor(
            net,
            preprocessing=pm.Preprocessing((spacing, spacing, spacing)),
            patch=self.grid.patch,
            batch_size=self.grid.batch,
        )

    def load(self) -> list[pm.Case]:
        complete = [c for c in pm.load_cases(self.root) if c.availability.all()]
        return complete[: self.cases]


# ---------------------------------------------------------------- measuring


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Processor time of all threads, which other load on the machine does not change, and the result."""
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def whole_path(predictor: pm.Predictor, case: pm.Case) -> dict[str, Callable[[], list[Any]]]:
    """Three ways to get label volumes from files."""
    every = pm.subsets(4)
    return {
        "full": lambda: predictor.predict_subsets(case, every[-1:]),
        "together": lambda: predictor.predict_subsets(case, every),
        "one by one": lambda: [predictor.predict(case, subset=row) for row in every],
    }


def network(predictor: pm.Predictor, setting: Setting) -> dict[str, Callable[[], Tensor]]:
    """Three ways to get logits (S, B, K, *S) from one batch of windows."""
    every, net, batch = pm.subsets(4), predictor.model, setting.grid.batch
    generator = torch.Generator().manual_seed(setting.seed)
    image = torch.randn(batch, 4, *setting.grid.patch, generator=generator)

    def one(row: Tensor) -> Tensor:
        logits: Tensor = net.segment(image, row.expand(batch, -1))
        return logits

    return {
        "full": lambda: one(every[-1])[None],
        "together": lambda: net.segment_subsets(image, every),
        "one by one": lambda: torch.stack([one(row) for row in every]),
    }


def in_turns(
    ways: dict[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each way in every round, and the results of the last round."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    results = {}
    ways["full"]()  # warm up
    for _ in range(rounds):
        for way, run in ways.items():
            results.pop(way, None)
            spent, results[way] = seconds(run)
            times[way].append(spent)
    return times, results


@torch.inference_mode()
def measure_time(setting: Setting, rounds: int) -> dict[str, Any]:
    predictor = setting.predictor(setting.grid.spacing)
    path: dict[str, list[float]] = {way: [] for way in WAYS}
    prepare: list[float] = []
    differ = voxels = 0
    for case in setting.load():
        times, labels = in_turns(whole_path(predictor, case), rounds)
        for way in WAYS:
            path[way] += times[way]
        for a, b in zip(labels["together"], labels["one by one"], strict=True):
            differ += int(np.count_nonzero(a != b))
            voxels += b.size
        spent, _ = seconds(lambda case=case: predictor.preprocessing(case.read(with_label=False)))
        prepare.append(spent)
    times, logits = in_turns(network(predictor, setting), rounds)
    return {
        "whole_path": path,
        "read_and_preprocess": prepare,
        "network": times,
        "voxels_that_differ": differ,
        "voxels": voxels,
        "logits_differ_by": float((logits["together"] - logits["one by one"]).abs().max()),
    }


def measure_memory(setting: Setting, way: str) -> dict[str, float]:
    case = setting.load()[0]
    whole_path(setting.predictor(8.0), case)["full"]()
    predictor = setting.predictor(setting.grid.spacing)
    gc.collect()
    with Peak() as peak:
        whole_path(predictor, case)[way]()
    return {"peak_mib": peak.mib}


# ---------------------------------------------------------------- report


def show(console: Console, results: list[dict[str, Any]]) -> None:
    table = Table(title="Processor time relative to one prediction from all modalities")
    columns = ("net", "subsets", "whole path", "seconds", "network", "memory, MiB")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number > 1 else "left")
    for result in results:
        path, net = result["whole_path"], result["network"]
        for way in WAYS:
            memory = result["memory"].get(way)
            table.add_row(
                result["setting"]["net"],
                "all modalities" if way == "full" else f"15, {way}",
                with_spread(in_each_round(path[way], path["full"])),
                f"{median(path[way]):.1f}",
                with_spread(in_each_round(net[way], net["full"])),
                "" if memory is None else f"{memory:.0f}",
            )
    console.print(table)
    for result in results:
        path = result["whole_path"]
        ratio = median(in_each_round(path["together"], path["full"]))
        console.print(
            f"{result['setting']['net']}: {ratio:.2f} (target: at most {TARGET:g}); reading and "
            f"preprocessing take {median(result['read_and_preprocess']):.1f} s of it; "
            f"compared with one subset at a time, {result['voxels_that_differ']} of "
            f"{result['voxels']} voxels differ, and logits by at most {result['logits_differ_by']:.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, help="folder of complete cases (default: phantoms)")
    parser.add_argument(
        "--nets", nargs="+", choices=GRIDS, default=list(GRIDS), help="default: both"
    )
    parser.add_argument("--cases", type=int, default=1, help="cases to measure on (default 1)")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    results_folder = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results_folder / "all_subsets.json")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        setting = Setting(**json.loads(arguments.job))
        torch.set_num_threads(setting.threads)
        result = (
            measure_memory(setting, arguments.memory)
            if arguments.memory
            else measure_time(setting, arguments.rounds)
        )
        sys.stdout.write(json.dumps(result) + "\n")
        return

    console = Console()
    source = "phantoms, 160 x 192 x 144 voxels of 1 mm" if arguments.root is None else "files"
    told = {**facts(arguments, ("prism-meta", "torch", "monai")), "cases": source}
    console.print(told)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        root = arguments.root or Path(folder)
        if arguments.root is None:
            complete = [[True] * 4] * arguments.cases
            shape = (160, 192, 144)
            write_phantoms(root, complete, seed=arguments.seed, shape=shape, spacing=1.0)
        for net in arguments.nets:
            setting = Setting(net, str(root), arguments.cases, arguments.threads, arguments.seed)
            asked = asdict(setting)
            result = in_a_process_of_its_own(__file__, asked, "--rounds", str(arguments.rounds))
            result["memory"] = {
                way: in_a_process_of_its_own(__file__, asked, "--memory", way, memory=True)[
                    "peak_mib"
                ]
                for way in ("full", "together")
            }
            del asked["root"]  # a path that means nothing on another machine
            results.append({"setting": {**asked, **asdict(setting.grid)}, **result})
    show(console, results)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**told, "results": results}, indent=1) + "\n")
    console.print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
