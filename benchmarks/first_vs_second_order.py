"""How much do first and second order cost, and how exact are they, compared with other libraries?

    python benchmarks/first_vs_second_order.py                  # all nets, K = 1, 2, 5, 10
    python benchmarks/first_vs_second_order.py --net unet --steps 1 --rounds 5

Every method runs on the same net and batches. For time, all methods take turns in one process, in a new
order each round; the table shows the median and the range of the ratios to first order in the same
round. For memory, each method has its own process; the table shows the peak of the resident set above
what the net, its batches and the libraries take. The error is that of the float32 gradient, relative to
the same steps unrolled in float64. Libraries that are not installed are left out, with a message. One
unit is a forward and a backward pass of the objective.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import importlib.util
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from measuring import Peak, facts, in_a_process_of_its_own, in_each_round
from nets import LR, Params, Setting, build, flat, loss_of
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call

import prism_meta as pm

# ---------------------------------------------------------------- methods

Method = Callable[[nn.Module, Callable[..., Any], Any, Any, int], Params]


def ours(strategy: Callable[[int], pm.MetaStrategy]) -> Method:
    """A method that runs one of prism-meta's strategies with K steps."""

    def run(net: nn.Module, objective: Any, train: Any, meta: Any, steps: int) -> Params:
        return strategy(steps).meta_gradient(net, objective, train, meta).gradient

    return run


def with_higher(net: nn.Module, objective: Any, train: Any, meta: Any, steps: int) -> Params:
    import higher

    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (functional, inner):
        for _ in range(steps):
            inner.step(loss_of(objective(functional, train)))
        loss = loss_of(objective(functional, meta))
        names = [n for n, _ in net.named_parameters()]
        grads = torch.autograd.grad(loss, list(net.parameters()), materialize_grads=True)
    return dict(zip(names, grads, strict=True))


def with_learn2learn(net: nn.Module, objective: Any, train: Any, meta: Any, steps: int) -> Params:
    import learn2learn as l2l

    maml = l2l.algorithms.MAML(net, lr=LR, first_order=False, allow_unused=True)
    learner = maml.clone()
    for _ in range(steps):
        learner.adapt(loss_of(objective(learner, train)), allow_nograd=False)
    loss = loss_of(objective(learner, meta))
    names = [n for n, _ in net.named_parameters()]
    grads = torch.autograd.grad(loss, list(net.parameters()), materialize_grads=True)
    return dict(zip(names, grads, strict=True))


def with_torchopt(net: nn.Module, objective: Any, train: Any, meta: Any, steps: int) -> Params:
    import torchopt

    copied = copy.deepcopy(net)
    names = [n for n, _ in copied.named_parameters()]
    leaves = list(copied.parameters())
    optimizer = torchopt.MetaSGD(copied, lr=LR)
    for _ in range(steps):
        optimizer.step(loss_of(objective(copied, train)))
    grads = torch.autograd.grad(loss_of(objective(copied, meta)), leaves, materialize_grads=True)
    return dict(zip(names, grads, strict=True))


METHODS: dict[str, Method] = {
    "SingleLevel": ours(lambda k: pm.SingleLevel()),
    "FirstOrder": ours(lambda k: pm.FirstOrder(pm.SGD(LR), k)),
    "Reptile": ours(lambda k: pm.Reptile(pm.SGD(LR), k)),
    "SecondOrder stored": ours(lambda k: pm.SecondOrder(pm.SGD(LR), k, graph="stored")),
    "SecondOrder recomputed": ours(lambda k: pm.SecondOrder(pm.SGD(LR), k, graph="recomputed")),
    "FiniteDifference": ours(lambda k: pm.FiniteDifference(pm.SGD(LR), k)),
    "ImplicitMAML": ours(lambda k: pm.ImplicitMAML(pm.SGD(LR), k, proximal=10.0, cg_steps=3)),
    "higher": with_higher,
    "learn2learn": with_learn2learn,
    "TorchOpt": with_torchopt,
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PEERS = {"higher": "higher", "learn2learn": "learn2learn", "TorchOpt": "torchopt"}
#: Methods that compute or approximate E4: only these are compared with the oracle.
AIMS_AT_E4 = (
    "FirstOrder",
    "SecondOrder stored",
    "SecondOrder recomputed",
    "FiniteDifference",
    *PEERS,
)


def oracle(net: nn.Module, objective: Any, train: Any, meta: Any, steps: int) -> Params:
    """E4, unrolled by hand in float64."""
    net = copy.deepcopy(net).double()
    train, meta = (replace(b, image=b.image.double()) for b in (train, meta))
    phi = {n: p.detach().requires_grad_() for n, p in net.named_parameters()}
    params = phi

    def loss(at: Params, batch: Any) -> Tensor:
        return loss_of(objective(lambda *args: functional_call(net, at, args), batch))

    for _ in range(steps):
        grads = torch.autograd.grad(
            loss(params, train), list(params.values()), create_graph=True, materialize_grads=True
        )
        params = {n: p - LR * g for (n, p), g in zip(params.items(), grads, strict=True)}
    grads = torch.autograd.grad(loss(params, meta), list(phi.values()), materialize_grads=True)
    return dict(zip(phi, grads, strict=True))


# ---------------------------------------------------------------- measuring


def measure_memory(setting: Setting, method: str) -> dict[str, float]:
    net, objective, train, meta = build(setting)
    run = METHODS[method]
    # A first call on a small patch loads libraries and starts threads, which should not be counted.
    small = build(replace(setting, size=16))
    run(*small, 1)
    del small
    gc.collect()
    with Peak() as peak:
        run(net, objective, train, meta, setting.steps)
    return {"peak_mib": peak.mib}


def measure_time(
    setting: Setting, methods: list[str], rounds: int, *, with_oracle: bool, clock: str
) -> dict[str, Any]:
    net, objective, train, meta = build(setting)
    results: dict[str, Any] = {name: {"seconds": [], "error": None} for name in methods}
    gradients = {  # the first call of each method is not timed
        name: flat(METHODS[name](net, objective, train, meta, setting.steps)) for name in methods
    }
    cosine = None
    if with_oracle:
        exact = flat(oracle(net, objective, train, meta, setting.steps))
        cosine = float(nn.functional.cosine_similarity(gradients["FirstOrder"], exact, dim=0))
        for name in (n for n in methods if n in AIMS_AT_E4):
            results[name]["error"] = float((gradients[name] - exact).norm() / exact.norm())
    order, now = random.Random(setting.seed), CLOCKS[clock]
    for _ in range(rounds):
        # In a new order each round: the method that ran before affects what is in the caches.
        for name in order.sample(methods, len(methods)):
            gc.collect()
            start = now()
            METHODS[name](net, objective, train, meta, setting.steps)
            results[name]["seconds"].append(now() - start)
    return {"methods": results, "cosine": cosine}


def job(arguments: argparse.Namespace) -> None:
    setting = Setting(**json.loads(arguments.job))
    torch.set_num_threads(setting.threads)
    with contextlib.redirect_stdout(sys.stderr):
        if arguments.memory:
            result = measure_memory(setting, arguments.memory)
        else:
            result = measure_time(
                setting,
                arguments.methods,
                arguments.rounds,
                with_oracle=arguments.oracle,
                clock=arguments.clock,
            )
    sys.stdout.write(json.dumps(result) + "\n")


# ---------------------------------------------------------------- report


def ratios(result: dict[str, Any], name: str) -> list[float]:
    """Time relative to first order, round by round."""
    methods = result["methods"]
    return in_each_round(methods[name]["seconds"], methods["FirstOrder"]["seconds"])


def show(console: Console, setting: Setting, result: dict[str, Any], units: float) -> None:
    title = f"{setting.net}, {setting.size}^3, batch {setting.batch}, K = {setting.steps}"
    if result["cosine"] is not None:
        title += f": cosine of first with second order {result['cosine']:.4f}"
    table = Table(title=title, title_justify="left")
    for column in ("method", "time / first order", "spread", "units", "memory, MiB", "error"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, values in result["methods"].items():
        ratio = ratios(result, name)
        error = values["error"]
        table.add_row(
            name,
            f"{statistics.median(ratio):.2f}",
            f"{min(ratio):.2f}-{max(ratio):.2f}",
            f"{units * statistics.median(ratio):.1f}",
            f"{values['peak_mib']:.0f}",
            "" if error is None else f"{error:.1e}",
        )
    console.print(table)


def plot(path: Path, results: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    nets = sorted({r["setting"]["net"] for r in results})
    figure, axes = plt.subplots(
        2, len(nets), figsize=(max(6, 4.2 * len(nets)), 7.5), squeeze=False, layout="constrained"
    )
    rows = ("peak memory, MiB", "time / first order")
    for column, net in enumerate(nets):
        of_net = [r for r in results if r["setting"]["net"] == net]
        shown = ["FirstOrder", "SecondOrder stored", "SecondOrder recomputed", *PEERS]
        shown = [name for name in shown if name in of_net[0]["methods"]]
        width = 0.8 / len(shown)
        for i, name in enumerate(shown):
            at = [group + (i - (len(shown) - 1) / 2) * width for group in range(len(of_net))]
            memory = [r["methods"][name]["peak_mib"] for r in of_net]
            slowness = [statistics.median(ratios(r, name)) for r in of_net]
            for row, values in enumerate((memory, slowness)):
                axes[row][column].bar(at, values, width, label=name)
        for row, label in enumerate(rows):
            ticks = [f"K = {r['setting']['steps']}" for r in of_net]
            axes[row][column].set_xticks(range(len(of_net)), ticks)
            axes[row][column].set_ylabel(label)
        axes[0][column].set_title(f"{net}, {of_net[0]['setting']['size']}^3")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--net", nargs="+", default=["unet", "prismnet", "segresnet"], help="default: all three"
    )
    parser.add_argument(
        "--steps", nargs="+", type=int, default=[1, 2, 5, 10], help="K (default 1 2 5 10)"
    )
    parser.add_argument(
        "--size", type=int, default=32, help="voxels per side of a patch (default 32)"
    )
    parser.add_argument("--batch", type=int, default=2, help="samples per batch (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="wall-clock time, or with --threads 1 CPU time, which other programs disturb less",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="default: all")
    results_folder = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results_folder / "first_vs_second_order.json")
    parser.add_argument(
        "--oracle",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute errors and cosines, which is slow on large patches",
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        return job(arguments)

    console = Console()
    missing = [n for n, module in PEERS.items() if importlib.util.find_spec(module) is None]
    for name in missing:
        console.print(f"{name} is not installed and is left out")
    methods = [name for name in arguments.methods if name not in missing]
    if "FirstOrder" not in methods:
        methods.insert(0, "FirstOrder")  # ratios are relative to it
    packages = ("prism-meta", "torch", "monai", *(PEERS[n].lower() for n in PEERS if n in methods))
    told = {**facts(arguments, packages), "left_out": missing}
    console.print(told)
    results = []
    for net in arguments.net:
        for steps in arguments.steps:
            setting = Setting(
                net, steps, arguments.size, arguments.batch, arguments.threads, arguments.seed
            )
            result = in_a_process_of_its_own(
                __file__,
                asdict(setting),
                "--rounds", str(arguments.rounds), "--clock", arguments.clock, "--methods", *methods,
                "--oracle" if arguments.oracle else "--no-oracle",
            )  # fmt: skip
            for name in methods:
                memory = in_a_process_of_its_own(
                    __file__, asdict(setting), "--memory", name, memory=True
                )
                result["methods"][name].update(memory)
            # First order takes K + 1 units; the units of the others follow from their ratio to it.
            show(console, setting, result, units=steps + 1.0)
            results.append({"setting": asdict(setting), **result})
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps({**told, "results": results}, indent=1) + "\n")
    plot(arguments.out.with_suffix(".png"), results)
    console.print(f"written: {arguments.out} and {arguments.out.with_suffix('.png').name}")
    return None


if __name__ == "__main__":
    main()
