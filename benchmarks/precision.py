"""Does bfloat16 train as well as float32, and what does it save?

    python benchmarks/precision.py                     # about 7 minutes on one thread
    python benchmarks/precision.py --steps 40          # a short look; nothing is learned in so few steps

The same configuration trains on the same phantoms in float32 and in bfloat16 (``fabric.precision =
"bf16-mixed"``), with two seeds, each run in a process of its own. All subsets of complete phantoms are then
predicted, in float32. The table shows the mean Dice and its 95 % bootstrap interval over cases, and paired
differences: of bfloat16 to float32 with the same seed, and of float32 to float32 with the first seed. The
latter shows how much another draw of weights and episodes changes. The intervals are over cases, and two
seeds are too few to average over such draws: a difference is of these runs, not of the precision as such.

Time is the processor time of one meta-gradient, in turns with float32 in every round. Memory is the peak of
the resident set above the net, in a process of its own. Both are of this CPU: how fast bfloat16 is depends on
whether the processor multiplies it (AVX512-BF16 or AMX), and the script prints whether it does.

Result (two seeds, 300 steps, 8 test cases): Dice is 0.506 and 0.458 in bfloat16, 0.518 and 0.498 in float32.
Both lie inside the interval of float32, but both are lower: paired by -0.012 (-0.017 to -0.006) and by -0.040
(-0.055 to -0.026). Another seed in float32 differs by -0.020 (-0.035 to -0.003). On a CPU that multiplies
bfloat16 it takes 1.10 times the time in first order and 1.01 in second, and saves no memory (1.10 and 1.09).
Nothing here speaks for bfloat16 on a CPU; float32 stays the default.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measuring import Peak, facts, in_a_process_of_its_own, in_each_round, with_spread
from nets import Setting as Shape
from nets import build
from rich.console import Console
from rich.table import Table

import prism_meta as pm
from prism_meta.data.phantom import write_phantoms
from prism_meta.records import Record
from prism_meta.report import compare

FULL, HALF = "32-true", "bf16-mixed"
STRATEGIES = {
    "first order": pm.FirstOrder(pm.SGD(0.05)),
    "second order": pm.SecondOrder(pm.SGD(0.05)),
}
SPACING = 4.0


@dataclass(frozen=True)
class Setting:
    """One training run."""

    precision: str
    seed: int
    steps: int
    train: int
    test: int
    threads: int

    @property
    def name(self) -> str:
        return f"{self.precision}, seed {self.seed}"


def config_of(setting: Setting) -> pm.Config:
    return pm.load_config(
        overrides=[
            f"data.spacing=[{SPACING}, {SPACING}, {SPACING}]",
            "data.patch=[32, 32]",
            "data.batch_size=8",
            "meta.strategy=first_order",
            "training.ema=0",
            f"training.steps={setting.steps}",
            f"seed={setting.seed}",
            "fabric.accelerator=cpu",
            f"fabric.precision={setting.precision}",
        ]
    )


def draw(folder: Path, setting: Setting) -> tuple[list[pm.Case], list[pm.Case]]:
    """Phantoms to train on, of which files are missing, and complete ones; the same for every run."""
    missing = pm.draw_availability(setting.train, (0.2, 0.4, 0.6, 0.8), seed=0)
    complete = torch.ones(setting.test, len(pm.BRATS), dtype=torch.bool)
    for seed, (name, available) in enumerate({"train": missing, "test": complete}.items()):
        write_phantoms(folder / name, available, shape=(40, 48, 36), spacing=SPACING, seed=seed)
    train, test = (pm.load_cases(folder / name, pm.BRATS) for name in ("train", "test"))
    return list(train), list(test)


def train(setting: Setting) -> dict[str, Any]:
    """The records of a trained model, and its last losses."""
    with tempfile.TemporaryDirectory() as folder:
        cases, test = draw(Path(folder), setting)
        trained = pm.train(cases, config_of(setting), progress=False)
        records = trained.predictor.evaluate(test)
    losses = [line["meta_loss"] for line in trained.history[-20:]]
    return {
        "records": [asdict(record) for record in records],
        "last_meta_loss": sum(losses) / len(losses),
    }


# ---------------------------------------------------------------- time and memory


def gradient(strategy: str, precision: str, shape: Shape) -> Any:
    """A function that computes one meta-gradient of PrismNet."""
    net, objective, train_batch, meta_batch = build(shape)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == HALF):
            STRATEGIES[strategy].meta_gradient(net, objective, train_batch, meta_batch)

    return run


def in_turns(strategy: str, shape: Shape, rounds: int) -> dict[str, list[float]]:
    """Processor time of each precision in every round."""
    runs = {precision: gradient(strategy, precision, shape) for precision in (FULL, HALF)}
    seconds: dict[str, list[float]] = {precision: [] for precision in runs}
    for number in range(rounds + 1):
        for precision, run in runs.items():
            start = time.process_time()
            run()
            if number:  # the first round warms up
                seconds[precision].append(time.process_time() - start)
    return seconds


def measure_memory(strategy: str, precision: str, shape: Shape) -> dict[str, float]:
    gradient(strategy, precision, replace(shape, size=16))()  # loads libraries
    run = gradient(strategy, precision, shape)
    with Peak() as peak:
        run()
    return {"peak_mib": peak.mib}


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16, as far as torch says."""
    test = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(test())


# ---------------------------------------------------------------- report


def interval(of: Sequence[Record], base: Sequence[Record] | None = None) -> dict[str, Any]:
    """Mean Dice, or its difference to ``base``, with the bootstrap interval over cases."""
    zero = [replace(record, dice=0.0, hd95=0.0) for record in of]
    return compare(zero if base is None else base, of).overall.dice.to_dict()


def told_of(values: dict[str, Any]) -> str:
    return f"{values['mean']:+.3f} ({values['low']:+.3f} to {values['high']:+.3f})"


def show(console: Console, runs: list[dict[str, Any]], costs: list[dict[str, Any]]) -> None:
    table = Table(title="Dice over all subsets and regions, 95 % intervals over cases")
    for column in ("run", "Dice", "difference", "to", "last meta losses"):
        table.add_column(column)
    for run in runs:
        table.add_row(
            run["name"],
            told_of(run["dice"]),
            told_of(run["difference"]),
            run["to"],
            f"{run['last_meta_loss']:.3f}",
        )
    console.print(table)
    table = Table(title=f"{HALF} / {FULL}")
    for column in ("strategy", "processor time", "peak memory"):
        table.add_column(column)
    for cost in costs:
        memory = cost["peak_mib"]
        ratio = in_each_round(cost["seconds"][HALF], cost["seconds"][FULL])
        table.add_row(cost["strategy"], with_spread(ratio), f"{memory[HALF] / memory[FULL]:.2f}")
    console.print(table)


def conclude(console: Console, runs: list[dict[str, Any]], costs: list[dict[str, Any]]) -> None:
    """Say in words what the numbers say."""
    by_name = {run["name"]: run for run in runs}
    for run in runs:
        full, gap = by_name[run["to"]], run["difference"]
        if run is full:
            continue
        inside = full["dice"]["low"] <= run["dice"]["mean"] <= full["dice"]["high"]
        zero = gap["low"] <= 0 <= gap["high"]
        console.print(
            f"{run['name']}: Dice lies {'inside' if inside else 'OUTSIDE'} the interval of {full['name']}; "
            f"paired, it differs by {gap['mean']:+.3f}, and the interval of the difference "
            f"{'contains' if zero else 'EXCLUDES'} 0."
        )
    for cost in costs:
        ratios = sorted(in_each_round(cost["seconds"][HALF], cost["seconds"][FULL]))
        word = "slower" if ratios[len(ratios) // 2] > 1 else "faster"
        console.print(f"{cost['strategy']}: {HALF} is {word} than {FULL} on this processor.")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300, help="outer steps of a run (default 300)")
    parser.add_argument("--train", type=int, default=12, help="phantoms to train on (default 12)")
    parser.add_argument("--test", type=int, default=8, help="phantoms to predict (default 8)")
    parser.add_argument("--size", type=int, default=24, help="voxels per side of the timed patches")
    parser.add_argument("--rounds", type=int, default=7, help="repetitions of timing (default 7)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1], help="default: 0 1")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results/precision.json"
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    if arguments.job:
        setting = json.loads(arguments.job)
        torch.set_num_threads(setting["threads"])
        done = (
            measure_memory(*arguments.memory, Shape(**setting))
            if arguments.memory
            else train(Setting(**setting))
        )
        sys.stdout.write("\n" + json.dumps(done) + "\n")
        return

    console = Console()
    told = facts(arguments, ("prism-meta", "torch")) | {"multiplies_bfloat16": has_bfloat16()}
    console.print(told)
    runs: list[dict[str, Any]] = []
    records: dict[str, list[Record]] = {}
    for seed in arguments.seed:
        for precision in (FULL, HALF):
            setting = Setting(
                precision, seed, arguments.steps, arguments.train, arguments.test, arguments.threads
            )
            found = in_a_process_of_its_own(__file__, asdict(setting))
            of = records[setting.name] = [Record(**record) for record in found.pop("records")]
            base = replace(
                setting, precision=FULL, seed=seed if precision == HALF else arguments.seed[0]
            ).name
            gap = interval(of, records[base])
            runs.append(
                {
                    "name": setting.name,
                    "setting": asdict(setting),
                    "dice": interval(of),
                    "difference": gap,
                    "to": base,
                    **found,
                }
            )
    shape = Shape("prismnet", 1, arguments.size, 1, arguments.threads, arguments.seed[0])
    costs = [
        {
            "strategy": strategy,
            "size": shape.size,
            "seconds": in_turns(strategy, shape, arguments.rounds),
            "peak_mib": {
                precision: in_a_process_of_its_own(
                    __file__, asdict(shape), "--memory", strategy, precision, memory=True
                )["peak_mib"]
                for precision in (FULL, HALF)
            },
        }
        for strategy in STRATEGIES
    ]
    show(console, runs, costs)
    conclude(console, runs, costs)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**told, "runs": runs, "costs": costs}, indent=1) + "\n")
    console.print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
