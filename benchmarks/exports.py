"""How far are exported networks from those of the run, over all subsets of modalities?

    python benchmarks/exports.py
    python benchmarks/exports.py --nets unet --dims 2

Each network of four modalities gets random weights, which are far from those that it starts with, so that
parts that start at 0 matter. It is exported as ONNX and as a torch.export program. Then all 15 subsets of a
random image are predicted: by the network itself, and by the exported ones, which find NaN where the subset
hides a modality. The image has the size of the patch, and for networks of any size also half more.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from measuring import facts
from rich.console import Console
from rich.table import Table
from torch import Tensor

import prism_meta as pm
from prism_meta.export.preprocessing import PREPROCESSING
from prism_meta.export.programs import ONNX, PROGRAM, write_onnx, write_program
from prism_meta.training.folder.weights import save_weights
from prism_meta.training.networks import build_model
from prism_meta.training.run import Run

#: Settings of the networks; those of the package have three scales and four channels at the finest.
SMALL = ("model.width=4", "model.depth=3")
NETS: dict[str, tuple[str, ...]] = {
    "prism, region-aware": SMALL,
    "prism, mean": (*SMALL, "model.fusion=mean"),
    "prism, attention": (*SMALL, "model.fusion=attention"),
    "unet": (*SMALL, "model.network=unet"),
    "conditioned_unet": (*SMALL, "model.network=conditioned_unet"),
    "monai:SegResNet": (
        "model.network=monai:SegResNet",
        "model.arguments={init_filters = 8, blocks_down = [1, 1, 1], blocks_up = [1, 1]}",
    ),
}
PATCHES = {2: (32, 32), 3: (16, 16, 16)}


def shaken_run(folder: Path, settings: tuple[str, ...], *, seed: int) -> Run:
    """A run with random weights."""
    torch.manual_seed(seed)
    config = pm.load_config(overrides=settings)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    run = Run.create(folder, config, root=None, train=[], test=[])
    save_weights(run.weights(), model)
    return run


def measure(run: Run, out: Path) -> dict[str, Any]:
    """The largest differences of both formats, their sizes and times."""
    out.mkdir()
    seconds = {}
    for name, write in (("onnx", write_onnx), ("program", write_program)):
        start = time.perf_counter()
        write(run, out)
        seconds[name] = time.perf_counter() - start
    multiple = json.loads((out / PREPROCESSING).read_text())["network"]["multiple"]
    session = onnxruntime.InferenceSession(out / ONNX, providers=["CPUExecutionProvider"])
    program = torch.export.load(out / PROGRAM).module()
    model: Any = run.load_model()
    patch = run.config.data.patch
    sizes = [patch] if multiple is None else [patch, (patch[0] * 3 // 2, *patch[1:])]
    subsets = pm.subsets(4)

    def by_onnx(image: Tensor, mask: Tensor) -> Tensor:
        found = session.run(None, {"image": image.numpy(), "mask": mask.numpy()})
        return torch.from_numpy(found[0])

    differences = {"onnx": 0.0, "program": 0.0}
    largest = 0.0
    for size in sizes:
        image = torch.randn(len(subsets), 4, *size)
        damaged = image.clone()
        damaged[~subsets] = torch.nan
        with torch.no_grad():
            wanted = model.segment(image, subsets)
            for name, exported in (("onnx", by_onnx), ("program", program)):
                found = (exported(damaged, subsets) - wanted).abs().max().item()
                differences[name] = max(differences[name], found)
        largest = max(largest, wanted.abs().max().item())
    return {
        "multiple": multiple,
        "largest_difference": differences,
        "largest_logit": largest,
        "seconds": seconds,
        "bytes": {"onnx": (out / ONNX).stat().st_size, "program": (out / PROGRAM).stat().st_size},
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS), help="default: all")
    parser.add_argument("--dims", nargs="+", type=int, choices=PATCHES, default=list(PATCHES))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    results_folder = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results_folder / "exports.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    told = facts(arguments, ("prism-meta", "torch", "monai", "onnx", "onnxscript", "onnxruntime"))
    console.print(told)
    results = []
    for dims in arguments.dims:
        for net in arguments.nets:
            patch = list(PATCHES[dims])
            with tempfile.TemporaryDirectory() as folder:
                settings = (*NETS[net], f"data.patch={patch}")
                run = shaken_run(Path(folder) / "run", settings, seed=arguments.seed)
                found = measure(run, Path(folder) / "exported")
            results.append({"net": net, "dims": dims, "patch": patch, **found})
            console.print(results[-1])
            arguments.out.write_text(json.dumps({**told, "results": results}, indent=1) + "\n")
    table = Table(
        "network", "ONNX", "program", "largest logit", title="Largest differences of logits"
    )
    for one in results:
        both = (f"{one['largest_difference'][name]:.1e}" for name in ("onnx", "program"))
        table.add_row(f"{one['net']}, {one['dims']}-D", *both, f"{one['largest_logit']:.1f}")
    console.print(table)
    console.print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
