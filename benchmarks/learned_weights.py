"""Do learned weights (E12) find the modality whose labels are wrong?

    python benchmarks/learned_weights.py                       # about 10 minutes on two cores
    python benchmarks/learned_weights.py --steps 60 --seeds 0  # a short look

PRISM is trained on phantoms in first order with LearnedWeights. The labels of one modality are
corrupted in the train batches: its image is turned and moved against them, another way in each
sample, so that where it says tumour the labels do not, while the other modalities and all meta batches
are as they are. Distillation then teaches this modality's branch to answer from a wrong image. Printed
and plotted: beta of each modality over the outer steps, beside a control run without corruption.

What was seen (one seed, flair): its beta rises to 0.15 and falls to 0.13, where that of the control ends
at 0.17. But t1ce and t1 fall too: a wrong image spoils the fused teacher of all that is shown beside it.
So beta tells that distillation harms, and not whose fault it is.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measuring import facts
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import prism_meta as pm
from prism_meta.data import CachedCase, prepare
from prism_meta.episodes import Episodes
from prism_meta.phantom import write_phantoms
from prism_meta.weighting import LearnedWeights

PATCH = 48
START = 0.1


def corrupted(batch: pm.Batch, modality: int, generator: torch.Generator) -> pm.Batch:
    """The batch with the image of one modality turned upside down and moved, another way each time."""
    image = batch.image.clone()
    for one in image[:, modality]:
        shift = torch.randint(PATCH // 4, PATCH, (2,), generator=generator).tolist()
        one.copy_(one.flip(0, 1).roll(shift, (0, 1)))
    return replace(batch, image=image)


def phantoms(folder: Path, count: int, seed: int) -> list[CachedCase]:
    """Complete cases, so that every modality is shown as often."""
    complete = torch.ones(count, len(pm.BRATS), dtype=torch.bool)
    write_phantoms(folder / "cases", complete, seed=seed, shape=(80, 96, 72), spacing=2.0)
    cases = pm.load_cases(folder / "cases", pm.BRATS)
    grid = pm.Preprocessing((3.0, 3.0, 3.0))
    return prepare(cases, grid, pm.BRATS_LABELS, folder / "cache")


def train(
    cases: list[CachedCase], modality: int | None, steps: int, seed: int, label: str
) -> list[list[float]]:
    """Beta of each modality after every outer step; ``modality`` is corrupted, if there is one."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = pm.PrismNet(num_modalities=4, num_classes=4, spatial_dims=2)
    objective = pm.PrismObjective(
        weighted=False, weighting=LearnedWeights(4, beta=START, delta=0.01)
    )
    # Gradients of the first steps are far larger than later ones, which a long memory would stifle.
    weights = list(objective.learned().values())
    optimizer = torch.optim.AdamW(
        [
            {"params": list(net.parameters())},
            {"params": weights, "lr": 0.02, "betas": (0.9, 0.95), "weight_decay": 0.0},
        ],
        lr=1e-2,
    )
    learner = pm.MetaLearner(net, objective, pm.FirstOrder(pm.SGD(0.05)), optimizer, clip_norm=5.0)
    episodes = Episodes(cases, patch=(PATCH, PATCH), batch_size=8, steps=steps, seed=seed)
    history = []
    for step in track(range(steps), description=label):
        batch, meta = episodes[step]
        if modality is not None:
            batch = corrupted(batch, modality, generator)
        learner.step(batch, meta)
        beta: Tensor = objective.weights()["beta"]
        history.append(beta.tolist())
    return history


def plot(path: Path, runs: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(runs), figsize=(4 * len(runs), 3.2), sharey=True, layout="constrained", squeeze=False
    )
    for axis, run in zip(axes[0], runs, strict=True):
        wrong = run["corrupted"]
        for m, name in enumerate(pm.BRATS):
            curve = [row[m] for row in run["beta"]]
            label = f"{name}, labels wrong" if name == wrong else name
            axis.plot(curve, label=label, linewidth=2.4 if name == wrong else 1.2)
        axis.set(title=f"seed {run['seed']}: {wrong or 'nothing'} corrupted", xlabel="outer step")
        axis.legend(fontsize=8, frameon=False)
    axes[0][0].set_ylabel("beta, weight of pixel distillation")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corrupt", nargs="+", choices=pm.BRATS, default=["flair", "t2"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--threads", type=int, default=2)
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results / "learned_weights.json")
    arguments = parser.parse_args()
    arguments.rounds, arguments.seed = 1, arguments.seeds
    torch.set_num_threads(arguments.threads)
    console = Console()
    told = facts(arguments, ("prism-meta", "torch", "monai"))
    console.print(told)
    runs: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            cases = phantoms(Path(folder), arguments.cases, seed)
            for wrong in (None, *arguments.corrupt):
                modality = None if wrong is None else pm.BRATS.index(wrong)
                label = f"seed {seed}, {wrong or 'nothing'} corrupted"
                beta = train(cases, modality, arguments.steps, seed, label)
                runs.append({"seed": seed, "corrupted": wrong, "beta": beta})
    table = Table(title=f"beta after {arguments.steps} steps, from {START}", title_justify="left")
    for column in ("seed", "corrupted", *pm.BRATS):
        table.add_column(column)
    for run in runs:
        cells = [
            f"[bold]{b:.3f}[/]" if name == run["corrupted"] else f"{b:.3f}"
            for name, b in zip(pm.BRATS, run["beta"][-1], strict=True)
        ]
        table.add_row(str(run["seed"]), run["corrupted"] or "-", *cells)
    console.print(table)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**told, "start": START, "runs": runs}, indent=1) + "\n")
    plot(arguments.out.with_suffix(".png"), runs)
    console.print(f"written: {arguments.out} and {arguments.out.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
