"""How close do finite differences come to E4, for each radius and floating-point type?

    python benchmarks/finite_differences.py                          # all nets, one seed
    python benchmarks/finite_differences.py --net unet --seeds 0 1 2
    python benchmarks/finite_differences.py --net unet --size 40     # more voxels, more kinks

The error is that of the meta-gradient of a float32 net (K = 1, SGD), relative to the norm of the same
step unrolled in float64. A gradient jumps where an activation has a kink (LeakyReLU), and a difference
mistakes the jump for curvature; the smooth net has no kinks. PrismNet uses mean fusion and an objective
without distillation: nothing in them is detached, so that differences and derivatives have the same
limit. Time is that of the second call, relative to first order. The table shows the asymmetry that the
strategy reports in brackets.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import facts
from nets import LR, Setting, build, flat, loss_of
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.func import functional_call

import prism_meta as pm
from prism_meta.networks.fusion import MeanFusion

Episode = tuple[nn.Module, Callable[..., Any], Any, Any]


def cross_entropy(forward: Callable[..., Any], batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(forward(batch.image), batch.target)


def mlp(seed: int, activation: Callable[[], nn.Module]) -> Episode:
    """A net of three layers with 64 hidden units; each batch has 64 points."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(20, 64), activation(), nn.Linear(64, 64), activation(), nn.Linear(64, 5)
    )
    train, meta = (
        pm.Batch(torch.randn(64, 20), torch.ones(64, 20).bool(), torch.randint(5, (64,)))
        for _ in range(2)
    )
    return net, cross_entropy, train, meta


def prismnet(seed: int, size: int) -> Episode:
    _, _, train, meta = build(Setting("prismnet", 1, size, 2, 1, seed))
    torch.manual_seed(seed)
    objective = pm.PrismObjective(weighted=False, beta=0.0, delta=0.0)
    return pm.PrismNet(4, 4, 3, 8, fusion=MeanFusion), objective, train, meta


NETS: dict[str, Callable[[int, int], Episode]] = {
    "smooth MLP": lambda seed, size: mlp(seed, nn.Tanh),
    "LeakyReLU MLP": lambda seed, size: mlp(seed, nn.LeakyReLU),
    "unet": lambda seed, size: build(Setting("unet", 1, size, 2, 1, seed)),
    "prismnet": prismnet,
}


def differences(dtype: torch.dtype, radius: float | None = None) -> pm.MetaStrategy:
    return pm.FiniteDifference(pm.SGD(LR), dtype=dtype, radius=radius)


METHODS: dict[str, pm.MetaStrategy] = {
    "FirstOrder": pm.FirstOrder(pm.SGD(LR)),
    "SecondOrder": pm.SecondOrder(pm.SGD(LR)),
    "float64, 2e-12 (default)": differences(torch.float64),
    "float64, 1e-8": differences(torch.float64, 1e-8),
    "float64, 6e-6": differences(torch.float64, 6e-6),
    "float64, 5e-3": differences(torch.float64, 5e-3),
    "float32, 3e-2": differences(torch.float32, 3e-2),
    "float32, 5e-3": differences(torch.float32),
    "float32, 2e-4": differences(torch.float32, 2e-4),
    "float32, 2e-5": differences(torch.float32, 2e-5),
}


def oracle(net: nn.Module, objective: Any, train: Any, meta: Any) -> torch.Tensor:
    """E4, unrolled by hand. ``net`` and the images must be in float64."""
    phi = dict(net.named_parameters())

    def loss(at: dict[str, Any], batch: Any) -> torch.Tensor:
        return loss_of(objective(lambda *args: functional_call(net, at, args), batch))

    grads = torch.autograd.grad(
        loss(phi, train), [*phi.values()], create_graph=True, materialize_grads=True
    )
    adapted = {n: p - LR * g for (n, p), g in zip(phi.items(), grads, strict=True)}
    return flat(
        dict(
            zip(
                phi,
                torch.autograd.grad(loss(adapted, meta), [*phi.values()], materialize_grads=True),
                strict=True,
            )
        )
    )


def measure(name: str, seed: int, size: int) -> dict[str, Any]:
    """Error, asymmetry and seconds of every method on one net."""
    wide, objective, *batches = NETS[name](seed, size)
    exact = oracle(wide.double(), objective, *(_in_float64(b) for b in batches))
    net, objective, train, meta = NETS[name](seed, size)
    results = {}
    for method, strategy in METHODS.items():
        result = strategy.meta_gradient(net, objective, train, meta)
        start = time.perf_counter()
        strategy.meta_gradient(net, objective, train, meta)
        seconds = time.perf_counter() - start
        asymmetry = result.diagnostics.get("asymmetry")
        results[method] = {
            "error": float((flat(result.gradient) - exact).norm() / exact.norm()),
            "asymmetry": None if asymmetry is None else float(asymmetry),
            "seconds": seconds,
        }
    return {"net": name, "seed": seed, "size": size, "methods": results}


def _in_float64(batch: pm.Batch) -> pm.Batch:
    return pm.Batch(batch.image.double(), batch.mask, batch.target)


def show(console: Console, results: list[dict[str, Any]]) -> None:
    """Print one column per net and seed: error, asymmetry in brackets, and relative time."""
    table = Table(title="relative error (asymmetry), time / first order", title_justify="left")
    table.add_column("method (type, radius)")
    for result in results:
        table.add_column(f"{result['net']} {result['seed']}", justify="right")
    for method in METHODS:
        cells = []
        for result in results:
            values, base = result["methods"][method], result["methods"]["FirstOrder"]
            told = "" if values["asymmetry"] is None else f" ({values['asymmetry']:.0e})"
            cells.append(f"{values['error']:.1e}{told}, {values['seconds'] / base['seconds']:.1f}")
        table.add_row(method, *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--net", nargs="+", choices=NETS, default=list(NETS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="default: 0")
    parser.add_argument(
        "--size", type=int, default=16, help="voxels per side of a patch (default 16)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    default = Path(__file__).parent / "results/finite_differences.json"
    parser.add_argument("--out", type=Path, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.seed, arguments.rounds = arguments.seeds, 1  # for facts()
    results = [
        measure(name, seed, arguments.size) for name in arguments.net for seed in arguments.seeds
    ]
    console = Console(width=160)
    show(console, results)
    told = facts(arguments, ("prism-meta", "torch"))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**told, "results": results}, indent=1) + "\n")
    console.print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
