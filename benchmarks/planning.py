"""Does a plan keep its promise? Memory as predicted and as measured, and Dice after equal time.

    python benchmarks/planning.py                        # the memory of steps, about 10 minutes
    python benchmarks/planning.py DATA --seconds 240     # also whole trainings, about 80 minutes

Steps: three networks, both orders. A process takes steps with the masks that ``plan`` reckons with, and the
peak of its resident memory above that before the model is compared with ``step_memory``. glibc gives freed
memory back at once here; what it keeps otherwise is in the column "fragments", where the masks also change
from step to step, as they do in training.

Trainings (two-step plans for several budgets, and the default configuration, each for about the same time):
the anonymous memory of ``prism-meta train`` and its workers against the whole plan, and the Dice of held-out
cases against that of the default configuration with the same strategy (mean of all subsets and regions, and
the paired difference with its 95 % interval over cases).

Result: the bytes that a step allocates are 0.997 to 1.014 times the prediction, on all three networks and in
both orders. What glibc keeps on top of them is not predicted that well: in ten steps with changing masks,
the process takes 1.15 to 1.62 times the prediction, and more in long trainings. ``plan`` reckons with 1.5
on a CPU. Setting MALLOC_MMAP_THRESHOLD_=262144 avoids it and doubles the time of a step.

Whole trainings on 10 glioma cases (3 held out, one thread, 150 s each, one seed, a machine that did other
work): the default configuration (2 mm, 96 x 96) takes 84 steps in first order and 39 in second, and Dice is
0.22 and 0.20. The plans for 1.6, 2.5 and 4 GB have the same sizes, because the time is what limits them (2
mm, 32 x 32). They take 463 to 548 and 227 to 247 steps, and Dice is 0.48, 0.35, 0.45 and 0.34, 0.33, 0.36. So
the same plan differs by 0.13 between three runs in first order, and by 0.03 in second; an earlier series had
0.43, 0.50, 0.44 and 0.36, 0.39, 0.36. All intervals of the difference to the default lie above 0.09.

Before plans knew of the time, patches were as large as the memory allowed: in 200 s the default reached
0.35 in first order, the plan for 1.6 GB (1 mm, 96 x 96, 123 steps) 0.30, and that for 2.5 GB (1 mm, 144 x
144, 50 steps) 0.19. The anonymous memory was 1.09 (first order) and 1.02 (second) times the prediction for
the default configuration. For the plans it was 0.51 and 0.64 times, because their prediction is that of
preparing a case, and the cases had been prepared before.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from measuring import Peak, anonymous, facts, in_a_process_of_its_own
from rich.console import Console
from rich.table import Table

from prism_meta.modalities import BRATS
from prism_meta.records import read_records
from prism_meta.report import compare
from prism_meta.training.config import Config, load_config
from prism_meta.training.planning.plan import plan, with_steps
from prism_meta.training.planning.result import Plan
from prism_meta.training.planning.search import drawn_masks, most_shown, preparation
from prism_meta.training.profiling.memory import step_memory
from prism_meta.training.profiling.trial import trial_step
from prism_meta.training.survey.result import CaseSurvey, Survey
from prism_meta.training.survey.survey import survey

ORDERS = ("first_order", "second_order")
NETWORKS = {
    "PrismNet 2-D, 128^2, B = 8": ("data.patch=[128, 128]", "data.batch_size=8"),
    "PrismNet 3-D, 48^3, B = 2": ("data.patch=[48, 48, 48]", "data.batch_size=2"),
    "U-Net 3-D, 64^3, B = 2": (
        "data.patch=[64, 64, 64]",
        "data.batch_size=2",
        "model.network=unet",
    ),
}
STEPS = 10
PROGRESS = Console(stderr=True)
COMPLETE = Survey(
    "a folder per case",
    modalities=BRATS,
    cases=tuple(
        CaseSurvey(f"p{k}", patient=f"p{k}", site=None, modalities=BRATS, label=True)
        for k in range(10)
    ),
)


def overrides(network: str, order: str, seed: int) -> list[str]:
    return [*NETWORKS[network], f"meta.strategy={order}", "training.ema=0", f"seed={seed}"]


def job(setting: dict[str, Any]) -> dict[str, Any]:
    """Take steps in this process, and measure their peak."""
    torch.set_num_threads(setting["threads"])
    config = load_config(overrides=setting["overrides"])
    small = load_config(
        overrides=[*setting["overrides"], f"data.patch={[32] * len(config.data.patch)}"]
    )
    trial_step(small, [m[:1] for m in most_shown(drawn_masks(small, COMPLETE))])()
    gc.collect()
    episodes = drawn_masks(config, COMPLETE)
    fixed = most_shown(drawn_masks(config, COMPLETE))
    with Peak() as peak:
        step = trial_step(config, fixed)
        for _ in range(STEPS if setting["drawn"] else 2):
            step(next(episodes) if setting["drawn"] else fixed)
    return {"mib": peak.mib}


def of_steps(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for network in NETWORKS:
        for order in ORDERS:
            options = overrides(network, order, arguments.seed)
            config = load_config(overrides=options)
            predicted = step_memory(config, most_shown(drawn_masks(config, COMPLETE)))
            measured = [
                in_a_process_of_its_own(
                    __file__,
                    {"overrides": options, "drawn": drawn, "threads": arguments.threads},
                    memory=not drawn,
                )["mib"]
                for drawn in (False, True)
            ]
            row = {
                "network": network,
                "strategy": order,
                "predicted_mib": predicted.total / 2**20,
                "measured_mib": measured[0],
                "with_fragments_mib": measured[1],
            }
            PROGRESS.print(row)
            rows.append(row)
    return rows


def trained(folder: Path, data: Path, made: Plan) -> dict[str, Any]:
    """Train and evaluate in processes of their own."""
    (folder / "config.toml").write_text(made.to_toml())
    command = [sys.executable, "-m", "prism_meta"]
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(
        [*command, "train", data, "-c", folder / "config.toml", "--out", folder / "run"],
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"train ended with code {process.returncode}: {folder}")
    seconds = time.perf_counter() - start
    subprocess.run([*command, "evaluate", folder / "run"], check=True, capture_output=True)
    return {"seconds": seconds, "measured_mib": peak / 2**20}


def of_trainings(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        cache = Path(temporary) / "cache"
        for order in ORDERS:
            base = load_config(
                overrides=[
                    f"meta.strategy={order}", "training.ema=0", f"data.holdout={arguments.holdout}",
                    f"seed={arguments.seed}", f"data.cache='{cache}'",
                ]
            )  # fmt: skip
            found = survey(base, arguments.data, fast=True)
            reference = None
            for memory in (None, *arguments.memory):
                if memory is None:
                    made = with_steps(default(base, found), arguments.seconds)
                else:
                    made = plan(base, found, int(memory * 1e9), seconds=arguments.seconds)
                folder = Path(temporary) / f"{order}-{memory}"
                folder.mkdir()
                measured = trained(folder, arguments.data, made)
                records = read_records(folder / "run" / "evaluation" / "records.csv")
                reference = reference or records
                difference = compare(reference, records, seed=arguments.seed).overall.dice
                data = made.config.data
                row = {
                    "strategy": order,
                    "budget_gb": memory,
                    "patch": list(data.patch),
                    "batch_size": data.batch_size,
                    "spacing": list(data.spacing),
                    "width": made.config.model.width,
                    "depth": made.config.model.depth,
                    "steps": made.config.training.steps,
                    "predicted_mib": made.total / 2**20,
                    **measured,
                    "dice": fmean(r.dice for r in records if r.dice is not None),
                    "difference": [difference.mean, difference.low, difference.high],
                }
                PROGRESS.print(row)
                rows.append(row)
    return rows


def default(config: Config, found: Survey) -> Plan:
    """The configuration as it is, with the memory that is predicted for it."""
    masks = most_shown(drawn_masks(config, found))
    return Plan(config, (), step_memory(config, masks), tuple(masks), preparation(config, found))


def show(result: dict[str, Any]) -> None:
    console = Console()
    table = Table("network", "strategy", "predicted", "measured", "ratio", "fragments")
    for row in result["steps"]:
        table.add_row(
            row["network"], row["strategy"], f"{row['predicted_mib']:.0f}",
            f"{row['measured_mib']:.0f}", f"{row['measured_mib'] / row['predicted_mib']:.2f}",
            f"{row['with_fragments_mib'] / row['predicted_mib']:.2f}",
        )  # fmt: skip
    console.print("Memory of a step, MiB", table)
    if not result["trainings"]:
        return
    table = Table(
        "strategy", "budget", "patch", "B", "steps", "predicted", "measured", "s", "Dice", "B - A"
    )
    for row in result["trainings"]:
        mean, low, high = row["difference"]
        budget = "default" if row["budget_gb"] is None else f"{row['budget_gb']} GB"
        table.add_row(
            row["strategy"], budget, "x".join(map(str, row["patch"])), str(row["batch_size"]),
            str(row["steps"]), f"{row['predicted_mib']:.0f}", f"{row['measured_mib']:.0f}",
            f"{row['seconds']:.0f}", f"{row['dice']:.3f}", f"{mean:+.3f} ({low:+.3f} to {high:+.3f})",
        )  # fmt: skip
    console.print("Whole trainings, MiB", table)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", type=Path, help="folder of cases for whole trainings")
    parser.add_argument("--seconds", type=float, default=240, help="time of each training")
    parser.add_argument("--memory", type=float, nargs="+", default=[1.5, 2.5, 4.0], help="GB")
    parser.add_argument("--holdout", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip-steps", action="store_true", help="only whole trainings")
    parser.add_argument(
        "--json", type=Path, default=Path(__file__).parent / "results/planning.json"
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if arguments.job:
        sys.stdout.write(json.dumps(job(json.loads(arguments.job))) + "\n")
        return
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)
    before = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    result = {
        **facts(arguments, ["prism-meta", "torch", "monai"]),
        "steps": before.get("steps", []) if arguments.skip_steps else of_steps(arguments),
        "trainings": of_trainings(arguments) if arguments.data else before.get("trainings", []),
    }
    show(result)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    Console().print(f"written: {arguments.json}")


if __name__ == "__main__":
    main()
