"""How much time does PRISM save by not computing missing modalities?

    python benchmarks/packing.py                       # 48^3, width 8, batch 1 and 2
    python benchmarks/packing.py --size 24 --rounds 2  # a short look

One training step is a forward and a backward pass of PrismObjective with distillation. The packed
network is PrismNet, which computes only what is shown. The loop is the same network with the same
weights, written like the published code: encoders and decoder passes run one after the other, on zeros
if a modality is missing, with torch's own layers and memory layout. Both give the same gradient; the
script checks this in float64 on a small patch.

Networks and settings take turns; the table shows the median and the range of ratios within a round.
Memory is the peak of the resident set above what the net and its batch take, in a separate process.
torch counts the FLOPs of one step.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import Peak, facts, in_a_process_of_its_own, in_each_round, with_spread
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, torch's own convention
from torch.utils.flop_counter import FlopCounterMode

import prism_meta as pm
from prism_meta.networks.prediction import DecoderOutput, Prediction, ShownPairs

#: Number of shown modalities -> target for the time of a step, relative to all four shown.
TARGETS = {4: 1.0, 2: 0.6, 1: 0.4}
#: Target: with all modalities shown, the packed network is this many times as fast as the loop.
FASTER = 2.0


@dataclass(frozen=True)
class Setting:
    """One measured step."""

    shown: int
    size: int
    batch: int
    width: int
    threads: int
    seed: int


class Loop(nn.Module):
    """PrismNet with the same weights, computed one modality at a time, missing modalities included."""

    def __init__(self, net: pm.PrismNet) -> None:
        super().__init__()
        self.net = _plain(copy.deepcopy(net))

    def forward(self, image: Tensor, mask: Tensor) -> Prediction:
        net, modalities = self.net, range(image.shape[1])
        hidden = ~mask.view(*mask.shape, *[1] * (image.ndim - 2))
        image = torch.where(hidden, torch.zeros_like(image), image)
        scales = [net.encoders[m](image[:, m, None]) for m in modalities]
        fused = self._fused(scales, mask)
        alone = [
            self._fused(scales, F.one_hot(torch.full((len(mask),), m), len(modalities)).bool())
            for m in modalities
        ]
        unimodal = [
            net.unimodal_decoder(lambda s, guide, m=m: scales[m][s]).logits for m in modalities
        ]
        pairs = ShownPairs.from_mask(mask)
        return Prediction(
            fused, _pick(alone, pairs), torch.stack(unimodal)[pairs.modality, pairs.sample], pairs
        )

    def _fused(self, scales: list[list[Tensor]], mask: Tensor) -> DecoderOutput:
        """Fuse all modalities; those that ``mask`` hides get the weight 0."""

        def fuse(scale: int, guide: Tensor | None) -> Tensor:
            fusion = self.net.fusions[scale]
            features = torch.stack([of_one[scale] for of_one in scales], 1)  # (B, M, C, *s)
            size = features.shape[3:]
            classes = self.net.num_classes
            if guide is None:
                regions = features.new_full((len(mask), classes, *size), 1 / classes)
            else:
                mode = "trilinear" if len(size) == 3 else "bilinear"
                regions = F.interpolate(guide.detach(), size=size, mode=mode).softmax(1)
            scores = []
            for m in range(mask.shape[1]):
                own = features[:, m]
                means = torch.einsum("bkv,bcv->bkc", regions.flatten(2), own.flatten(2))
                means = means / (regions.flatten(2).sum(2, keepdim=True) + 1e-6)
                worth = torch.einsum("bkc,kco->bko", means, fusion.by_region)
                worth = worth + fusion.by_modality[m]
                by_region = torch.einsum("bkv,bkc->bcv", regions.flatten(2), worth)
                scores.append(fusion.score(own) + by_region.view_as(own))
            hidden = ~mask.view(*mask.shape, *[1] * (features.ndim - 2))
            weights = torch.stack(scores, 1).masked_fill(hidden, -torch.inf).softmax(1)
            mean = (weights * features).sum(1)
            variance = (weights * (features - mean[:, None]).square()).sum(1)
            return fusion.mix(torch.cat((mean, variance), 1))

        return self.net.decoder(fuse)


def _pick(branches: list[DecoderOutput], pairs: ShownPairs) -> DecoderOutput:
    def pick(maps: list[Tensor]) -> Tensor:
        return torch.stack(maps)[pairs.modality, pairs.sample]

    prm = zip(*(b.prm for b in branches), strict=True)
    return DecoderOutput(
        pick([b.logits for b in branches]),
        pick([b.features for b in branches]),
        tuple(pick(list(maps)) for maps in prm),
    )


def _plain(net: pm.PrismNet) -> pm.PrismNet:
    """Replace our convolution, normalisation and memory layout by torch's own."""
    for module in net.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Conv3d):
                plain = nn.Conv3d(
                    child.in_channels, child.out_channels, child.kernel_size, child.stride,
                    child.padding, bias=child.bias is not None,
                )  # fmt: skip
            elif isinstance(child, nn.GroupNorm):
                plain = nn.InstanceNorm3d(child.num_channels, affine=True)
            else:
                continue
            plain.to(child.weight.dtype).load_state_dict(child.state_dict())
            setattr(module, name, plain)
    return net.to(memory_format=torch.contiguous_format)


def build(setting: Setting) -> tuple[pm.PrismNet, pm.Batch]:
    """A batch, and a net in which every parameter affects the output."""
    torch.manual_seed(setting.seed)
    net = pm.PrismNet(4, 4, 3, setting.width)
    with torch.no_grad():
        for fusion in net.fusions:  # they start at 0
            fusion.by_region.normal_(std=0.1)
            fusion.by_modality.normal_(std=0.1)
    shape = (setting.batch, 4, *[setting.size] * 3)
    # Each sample is shown other modalities.
    rows = [[(m + n) % 4 < setting.shown for m in range(4)] for n in range(setting.batch)]
    target = torch.randint(4, (setting.batch, *shape[2:]))
    return net, pm.Batch(torch.randn(shape), torch.tensor(rows), target)


def step(model: nn.Module, batch: pm.Batch) -> tuple[Tensor, list[Tensor]]:
    """A forward and a backward pass."""
    loss = pm.PrismObjective(beta=0.5, delta=0.1)(model, batch).loss
    grads = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return loss, list(grads)


MODELS: dict[str, Callable[[pm.PrismNet], nn.Module]] = {"packed": lambda net: net, "loop": Loop}


def difference(setting: Setting) -> float:
    """Relative difference of the two networks' gradients, in float64 on a small patch."""
    net, batch = build(replace(setting, size=16))
    net, batch = net.double(), replace(batch, image=batch.image.double())
    packed, loop = (step(make(net), batch)[1] for make in MODELS.values())
    total = torch.cat([g.flatten() for g in loop]).norm()
    return float(
        torch.cat([(a - b).flatten() for a, b in zip(packed, loop, strict=True)]).norm() / total
    )


def measure_time(settings: list[Setting], rounds: int) -> list[dict[str, Any]]:
    """Time all settings in every round, so that ratios compare measurements of the same time."""
    steps: dict[tuple[int, str], Callable[[], object]] = {}
    results: list[dict[str, Any]] = []
    for i, setting in enumerate(settings):
        net, batch = build(setting)
        results.append({"setting": asdict(setting), "flops": {}, "seconds": {}, "memory": {}})
        for name, make in MODELS.items():
            steps[i, name] = partial(step, make(net), batch)
            with FlopCounterMode(display=False) as counter:
                steps[i, name]()  # this is also the warm-up
            results[i]["flops"][name] = counter.get_total_flops()
            results[i]["seconds"][name] = []
        results[i]["gradient_difference"] = difference(setting)
    for _ in range(rounds):
        for (i, name), run in steps.items():
            start = time.perf_counter()
            run()
            results[i]["seconds"][name].append(time.perf_counter() - start)
    return results


def measure_memory(setting: Setting, name: str) -> dict[str, float]:
    net, batch = build(setting)
    model = MODELS[name](net)
    small, patch = build(replace(setting, size=16))
    step(
        MODELS[name](small), patch
    )  # loads libraries and starts threads, which should not be counted
    with Peak() as peak:
        step(model, batch)
    return {"peak_mib": peak.mib}


def show(console: Console, batch: int, results: list[dict[str, Any]]) -> None:
    """Print one table per batch size."""
    full = next(r for r in results if r["setting"]["shown"] == 4)
    table = Table(title=f"batch {batch}: one step of PRISM with distillation", title_justify="left")
    for column in (
        "shown",
        "network",
        "time / packed full",
        "GFLOP",
        "memory, MiB",
        "loop / packed",
    ):
        table.add_column(column, justify="left" if column == "network" else "right")
    for result in results:
        for name in MODELS:
            ratio = in_each_round(result["seconds"][name], full["seconds"]["packed"])
            times = in_each_round(result["seconds"]["loop"], result["seconds"]["packed"])
            table.add_row(
                f"{result['setting']['shown']} of 4",
                name,
                with_spread(ratio),
                f"{result['flops'][name] / 1e9:.1f}",
                f"{result['memory'][name]:.0f}",
                with_spread(times) if name == "packed" else "",
            )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--batch", nargs="+", type=int, default=[1, 2], help="batch sizes (default 1 2)"
    )
    parser.add_argument(
        "--size", type=int, default=48, help="voxels per side of a patch (default 48)"
    )
    parser.add_argument("--width", type=int, default=8, help="channels of PrismNet (default 8)")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/packing.json")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.job:
        setting = Setting(**json.loads(arguments.job))
        torch.set_num_threads(setting.threads)
        sys.stdout.write(json.dumps(measure_memory(setting, arguments.memory)) + "\n")
        return

    console = Console()
    told = facts(arguments, ("prism-meta", "torch"))
    console.print(told)
    every = []
    for batch in arguments.batch:
        settings = [
            Setting(
                shown, arguments.size, batch, arguments.width, arguments.threads, arguments.seed
            )
            for shown in TARGETS
        ]
        results = measure_time(settings, arguments.rounds)
        for setting, result in zip(settings, results, strict=True):
            result["memory"] = {
                name: in_a_process_of_its_own(
                    __file__, asdict(setting), "--memory", name, memory=True
                )["peak_mib"]
                for name in MODELS
            }
        show(console, batch, results)
        every += results
    worst = max(r["gradient_difference"] for r in every)
    console.print(f"largest relative difference of the two gradients: {worst:.1e}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**told, "results": every}, indent=1) + "\n")
    console.print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
