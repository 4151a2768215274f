"""Do learned weights (E12) find the modality whose labels are wrong?

    python benchmarks/learned_weights.py            # about 20 minutes on two cores
    python benchmarks/learned_weights.py --seeds 0 --clean 20 --steps 20   # a short look

PRISM is trained on phantoms with LearnedWeights, in first order with four inner steps. After
``--clean`` outer steps the run forks. One fork, the control, continues unchanged. Each other fork
corrupts one modality in the train batches: its image is flipped and shifted, differently in each
sample, so that it no longer matches the labels. The other modalities and all meta batches stay as they
are. Distillation then teaches the corrupted modality to answer from a wrong image. The script prints
and plots the beta of each modality, relative to the control at the same step.

Result (two seeds, 100 steps): the beta of the corrupted modality ends at 0.80 (flair), 0.86 (t1ce),
0.64 (t1) and 0.89 (t2) of the control's. It is below the control in seven of eight runs and equal in
one. The control's own beta falls, too, because distillation helps less and less. The betas of flair,
t1ce and t2 rise when another modality is corrupted (median of the seeds). That of t1, which shows least
of a tumour, falls in every run: a wrong image also spoils the fused teacher of the modalities shown
with it.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measuring import facts
from rich.console import Console
from rich.table import Table

import prism_meta as pm
from prism_meta.data.cache import CachedCase, prepare
from prism_meta.data.episodes import Episodes
from prism_meta.data.phantom import write_phantoms
from prism_meta.objective.weighting import LearnedWeights

PATCH = 48
START = 0.1
#: Reported values are means over this many last steps of a fork.
LAST = 20
#: Beta of each modality after every outer step.
History = list[list[float]]


@dataclass(frozen=True)
class Setting:
    """The forks of one seed."""

    seed: int
    corrupt: list[str]
    cases: int
    rate: float
    clean: int
    steps: int


def corrupted(batch: pm.Batch, modality: int, generator: torch.Generator) -> pm.Batch:
    """The batch with the image of one modality flipped and shifted, differently in each sample."""
    image = batch.image.clone()
    for one in image[:, modality]:
        shift = torch.randint(PATCH // 4, PATCH, (2,), generator=generator).tolist()
        one.copy_(one.flip(0, 1).roll(shift, (0, 1)))
    return replace(batch, image=image)


def phantoms(folder: Path, setting: Setting) -> list[CachedCase]:
    rates = (setting.rate,) * len(pm.BRATS)
    availability = pm.draw_availability(setting.cases, rates, seed=setting.seed)
    shape = (80, 96, 72)
    write_phantoms(folder / "cases", availability, seed=setting.seed, shape=shape, spacing=2.0)
    cases = pm.load_cases(folder / "cases", pm.BRATS)
    grid = pm.Preprocessing((3.0, 3.0, 3.0))
    return prepare(cases, folder / "cache", preprocessing=grid, labels=pm.BRATS_LABELS)


def learner_of(seed: int) -> pm.MetaLearner:
    torch.manual_seed(seed)
    net = pm.PrismNet(num_modalities=4, num_classes=4, spatial_dims=2)
    objective = pm.PrismObjective(
        weighted=False, weighting=LearnedWeights(4, beta=START, delta=0.01)
    )
    # The first gradients are far larger than later ones; a long second moment would damp those.
    weights = list(objective.hyper_parameters().values())
    groups: list[dict[str, Any]] = [
        {"params": list(net.parameters())},
        {"params": weights, "lr": 0.04, "betas": (0.9, 0.95), "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    strategy = pm.FirstOrder(pm.SGD(0.2), steps=4)
    return pm.MetaLearner(net, objective, strategy, optimizer, clip_norm=5.0)


def train(
    learner: pm.MetaLearner, episodes: Episodes, steps: range, modality: int | None, seed: int
) -> History:
    """Train ``learner`` on these steps of ``episodes``, with ``modality`` corrupted if it is not None."""
    generator = torch.Generator().manual_seed(seed)
    objective = learner.objective
    assert isinstance(objective, pm.PrismObjective)
    history = []
    for step in steps:
        batch, meta = episodes[step]
        if modality is not None:
            batch = corrupted(batch, modality, generator)
        learner.step(batch, meta)
        history.append(objective.weights()["beta"].tolist())
    return history


def fork(setting: Setting) -> list[dict[str, Any]]:
    """Run the control and the corrupted forks of one seed, on one thread."""
    torch.set_num_threads(1)
    end = setting.clean + setting.steps
    with tempfile.TemporaryDirectory() as folder:
        cases = phantoms(Path(folder), setting)
        episodes = Episodes(cases, patch=(PATCH, PATCH), batch_size=8, steps=end, seed=setting.seed)
        clean = learner_of(setting.seed)
        before = train(clean, episodes, range(setting.clean), None, setting.seed)
        runs = []
        for wrong in (None, *setting.corrupt):
            modality = None if wrong is None else pm.BRATS.index(wrong)
            after = train(
                copy.deepcopy(clean), episodes, range(setting.clean, end), modality, setting.seed
            )
            runs.append({"seed": setting.seed, "corrupted": wrong, "beta": before + after})
            Console().print(f"seed {setting.seed}: done with {wrong or 'nothing'} corrupted")
    return runs


def relative(runs: Sequence[dict[str, Any]], wrong: str) -> list[list[list[float]]]:
    """Beta of the fork that corrupts ``wrong``, divided by the control's: [seed][step][modality]."""
    control = {run["seed"]: run["beta"] for run in runs if run["corrupted"] is None}
    return [
        [
            [ours / clean for ours, clean in zip(row, base, strict=True)]
            for row, base in zip(run["beta"], control[run["seed"]], strict=True)
        ]
        for run in runs
        if run["corrupted"] == wrong
    ]


def at_the_end(ratios: list[list[list[float]]], modality: int) -> list[float]:
    """The mean over the last steps, one number per seed."""
    return [statistics.mean(row[modality] for row in seed[-LAST:]) for seed in ratios]


def show(console: Console, runs: Sequence[dict[str, Any]], corrupt: Sequence[str]) -> None:
    table = Table(
        title="beta relative to the control, mean of the last steps: median over seeds (range)",
        title_justify="left",
    )
    for column in ("corrupted", *pm.BRATS):
        table.add_column(column)
    for wrong in corrupt:
        cells = []
        for m, name in enumerate(pm.BRATS):
            values = at_the_end(relative(runs, wrong), m)
            cell = f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"
            cells.append(f"[bold]{cell}[/]" if name == wrong else cell)
        table.add_row(wrong, *cells)
    console.print(table)


def plot(path: Path, runs: Sequence[dict[str, Any]], corrupt: Sequence[str], clean: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(corrupt), figsize=(4 * len(corrupt), 3.2), sharey=True,
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for axis, wrong in zip(axes[0], corrupt, strict=True):
        ratios = torch.tensor(relative(runs, wrong)).log().mean(0).exp()
        for m, name in enumerate(pm.BRATS):
            own = name == wrong
            axis.plot(
                ratios[:, m], label=f"{name}, labels wrong" if own else name,
                linewidth=2.6 if own else 1.2,
            )  # fmt: skip
        axis.axvline(clean, color="0.6", linewidth=1, linestyle=":")
        axis.axhline(1, color="0.6", linewidth=1)
        axis.set(title=f"labels of {wrong} go wrong", xlabel="outer step")
        axis.legend(fontsize=8, frameon=False, loc="lower left")
    axes[0][0].set_ylabel("beta relative to the control")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corrupt", nargs="+", choices=pm.BRATS, default=list(pm.BRATS),
        help="modalities to corrupt, one fork each (default: all)",
    )  # fmt: skip
    parser.add_argument("--cases", type=int, default=24, help="phantoms (default 24)")
    parser.add_argument("--rate", type=float, default=0.5, help="missing rate of each modality")
    parser.add_argument("--clean", type=int, default=60, help="outer steps before the fork")
    parser.add_argument("--steps", type=int, default=100, help="outer steps of each fork")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="default: 0 1")
    parser.add_argument("--threads", type=int, default=2, help="seeds that are trained in parallel")
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results / "learned_weights.json")
    arguments = parser.parse_args()
    arguments.rounds, arguments.seed = 1, arguments.seeds
    console = Console()
    told = facts(arguments, ("prism-meta", "torch", "monai"))
    console.print(told)
    settings = [
        Setting(
            seed,
            arguments.corrupt,
            arguments.cases,
            arguments.rate,
            arguments.clean,
            arguments.steps,
        )
        for seed in arguments.seeds
    ]
    spawn = multiprocessing.get_context("spawn")
    runs: list[dict[str, Any]] = []
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(arguments.threads, mp_context=spawn) as pool:
        for of_seed in pool.map(fork, settings):
            runs += of_seed
            written = {**told, "settings": [asdict(s) for s in settings], "runs": runs}
            arguments.out.write_text(json.dumps(written, indent=1) + "\n")
    show(console, runs, arguments.corrupt)
    plot(arguments.out.with_suffix(".png"), runs, arguments.corrupt, arguments.clean)
    console.print(f"written: {arguments.out} and {arguments.out.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
