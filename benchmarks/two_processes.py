"""Two processes of one thread each: what they send, what that costs, and their steps alone and together."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning_fabric import Fabric
from nets import Setting as Shape
from nets import build
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_leaves

import prism_meta as pm
from prism_meta.training.build import build_strategy
from prism_meta.training.config.meta import MetaConfig
from prism_meta.training.trainer import Trainer

#: What an outer step averages over processes, and the alpha with which it does.
ALPHAS = {"gradient": 0.0, "gradient and pull": 0.5}
#: Bytes of the messages that are timed.
SIZES = [2**power for power in range(10, 25, 2)]


@dataclass(frozen=True)
class Setting:
    """What both processes measure."""

    size: int
    batch: int
    rounds: int
    seed: int
    folder: str


class Recording:
    """A launched fabric that writes down the bytes that it averages."""

    def __init__(self, fabric: Fabric) -> None:
        self.fabric, self.sent = fabric, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fabric, name)

    def all_reduce(self, values: Any, **options: Any) -> Any:
        sent: list[Tensor] = tree_leaves(values)
        self.sent += sum(tensor.numel() * tensor.element_size() for tensor in sent)
        return self.fabric.all_reduce(values, **options)


def trainer(name: str, setting: Setting, fabric: Any, *, alpha: float = 0.0) -> Trainer:
    """A trainer whose every step is the same: one episode of PrismNet."""
    shape = Shape("prismnet", 1, setting.size, setting.batch, 1, setting.seed)
    net, objective, train, meta = build(shape)
    strategy = build_strategy(MetaConfig(strategy=name), torch.tensor(0.01), weight_decay=0.0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    learner = pm.MetaLearner(net, objective, strategy, optimizer, alpha=alpha, clip_norm=5.0)
    return Trainer(learner, [(train, meta)], fabric=fabric)


def tiny(fabric: Any, steps: int = 1) -> Trainer:
    """A trainer of two parameters, whose step takes hardly any time."""
    net, batch = nn.Linear(1, 1), torch.ones(1, 1)
    learner = pm.MetaLearner(
        net,
        lambda forward, x: forward(x).square().mean(),
        pm.FirstOrder(pm.SGD(0.01)),
        torch.optim.AdamW(net.parameters(), lr=1e-4),
        alpha=0.0,
    )
    return Trainer(learner, [(batch, batch)] * steps, fabric=fabric)


def in_turns(fabric: Fabric, trainers: dict[str, Trainer], rounds: int) -> dict[str, list[float]]:
    """Seconds of one outer step of each trainer in every round.

    They are wall-clock seconds. Under the name with " (processor)" are the seconds of the processor, which
    other work on the machine hardly changes.
    """
    found: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for key, step in trainers.items():
            fabric.barrier()
            start, busy = time.perf_counter(), time.process_time()
            step.fit(steps=1)
            if number:  # the first round warms up
                found.setdefault(key, []).append(time.perf_counter() - start)
                found.setdefault(f"{key} (processor)", []).append(time.process_time() - busy)
    return found


def calls_of(fabric: Fabric) -> float:
    """Calls per outer step in which processes wait for each other; an object is gathered in two."""
    counted = {"all_reduce": 1, "barrier": 1, "all_gather_object": 2}

    def count(steps: int) -> int:
        with ExitStack() as stack:
            watched = {
                name: stack.enter_context(
                    mock.patch.object(distributed, name, wraps=getattr(distributed, name))
                )
                for name in counted
            }
            tiny(fabric, steps).fit(steps=steps)
            return sum(times * watched[name].call_count for name, times in counted.items())

    return (count(21) - count(1)) / 20


def measure_messages(fabric: Fabric, rounds: int) -> dict[int, list[float]]:
    """Seconds of the mean over both processes of buffers of several sizes."""
    found: dict[int, list[float]] = {size: [] for size in SIZES}
    for number in range(rounds + 1):
        for size in SIZES:
            buffer = torch.zeros(size // 4)
            fabric.barrier()
            start = time.perf_counter()
            fabric.all_reduce(buffer, reduce_op="mean")
            if number:  # the first round connects and warms up
                found[size].append(time.perf_counter() - start)
    return found


def bytes_of(name: str, setting: Setting, fabric: Fabric, alpha: float) -> int:
    """What an outer step of a strategy sends."""
    recording = Recording(fabric)
    trainer(name, setting, recording, alpha=alpha).fit(steps=1)
    return recording.sent


def one_of_two(fabric: Fabric, values: dict[str, Any]) -> None:
    """What each of the two processes measures and writes down."""
    torch.set_num_threads(1)
    setting, alone = Setting(**values), Fabric(accelerator="cpu", devices=1)
    names = [kind.name for kind in pm.ALL_STRATEGIES]
    empty = {"alone": tiny(alone), "together": tiny(fabric)}
    found = {
        "messages": measure_messages(fabric, setting.rounds),
        "calls": calls_of(fabric),
        "empty": in_turns(fabric, empty, 3 * setting.rounds),
        "sent": {
            name: {what: bytes_of(name, setting, fabric, alpha) for what, alpha in ALPHAS.items()}
            for name in names
        },
        "steps": {
            name: in_turns(
                fabric,
                {
                    "alone": trainer(name, setting, alone),
                    "together": trainer(name, setting, fabric),
                },
                setting.rounds,
            )
            for name in names
        },
    }
    (Path(setting.folder) / f"{fabric.global_rank}.json").write_text(json.dumps(found))


def in_two_processes(setting: Setting) -> list[dict[str, Any]]:
    """What each of the two found."""
    both = Fabric(accelerator="cpu", devices=2, strategy="ddp_spawn")
    both.launch(one_of_two, asdict(setting))
    return [json.loads((Path(setting.folder) / f"{rank}.json").read_text()) for rank in (0, 1)]
