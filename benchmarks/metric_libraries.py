"""By how much do other libraries differ in Dice, HD95 and surface Dice?

    pip install SimpleITK MedPy surface-distance torchmetrics pymia
    python benchmarks/metric_libraries.py

The pairs of masks are those of the tests (``tests/metric_cases.py``): random blobs on isotropic and
anisotropic voxels, masks that touch the border, single voxels, boxes, slices. No mask is empty. A library
that is not installed is left out. Differences are absolute, in mm for HD95. ``surface-distance`` 0.1 needs
NumPy 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import facts
from rich.console import Console
from rich.table import Table

from prism_meta.evaluation.metrics import TOLERANCE, overlap

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from metric_cases import PAIRS, MaskPair

#: Largest difference that counts as none.
SAME = 1e-5

Metrics = dict[str, Callable[[MaskPair], float]]


def ours() -> Metrics:
    def scores(pair: MaskPair) -> Any:
        masks = map(torch.from_numpy, (pair.prediction, pair.truth))
        return overlap(*masks, spacing=pair.spacing)

    return {
        "dice": lambda pair: scores(pair).dice,
        "hd95": lambda pair: scores(pair).hd95,
        "nsd": lambda pair: scores(pair).nsd,
    }


def monai() -> Metrics:
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.meandice import compute_dice
    from monai.metrics.surface_dice import compute_surface_dice

    def masks(pair: MaskPair) -> list[torch.Tensor]:
        return [torch.from_numpy(m)[None, None].float() for m in (pair.prediction, pair.truth)]

    def options(pair: MaskPair) -> dict[str, Any]:
        return {"include_background": True, "spacing": list(pair.spacing)}

    return {
        "dice": lambda p: float(compute_dice(*masks(p))),
        "hd95": lambda p: float(compute_hausdorff_distance(*masks(p), percentile=95, **options(p))),
        "nsd": lambda p: float(compute_surface_dice(*masks(p), [TOLERANCE], **options(p))),
    }


def simple_itk() -> Metrics:
    import SimpleITK  # noqa: F401, tests/simple_itk.py would skip a test without it
    from simple_itk import measured

    return {
        name: lambda pair, name=name: getattr(measured(pair, tolerance=TOLERANCE), name)
        for name in ("dice", "hd95", "nsd")
    }


def medpy() -> Metrics:
    from medpy.metric.binary import dc, hd95

    return {
        "dice": lambda p: dc(p.prediction, p.truth),
        "hd95": lambda p: hd95(p.prediction, p.truth, voxelspacing=p.spacing),
    }


def surface_distance() -> Metrics:
    import surface_distance as library

    def surfaces(pair: MaskPair) -> Any:
        return library.compute_surface_distances(pair.truth, pair.prediction, pair.spacing)

    return {
        "dice": lambda p: library.compute_dice_coefficient(p.truth, p.prediction),
        "hd95": lambda p: library.compute_robust_hausdorff(surfaces(p), 95),
        "nsd": lambda p: library.compute_surface_dice_at_tolerance(surfaces(p), TOLERANCE),
    }


def torchmetrics() -> Metrics:
    from torchmetrics.functional.segmentation import dice_score

    def dice(pair: MaskPair) -> float:
        masks = (torch.from_numpy(m)[None, None].long() for m in (pair.prediction, pair.truth))
        return float(dice_score(*masks, num_classes=1, input_format="one-hot"))

    return {"dice": dice}


def pymia() -> Metrics:
    import SimpleITK
    from pymia.evaluation.evaluator import SegmentationEvaluator
    from pymia.evaluation.metric import DiceCoefficient, HausdorffDistance, SurfaceDiceOverlap

    def evaluated(pair: MaskPair, metric: Any) -> float:
        images = [
            SimpleITK.GetImageFromArray(m.astype(np.uint8)) for m in (pair.prediction, pair.truth)
        ]
        for image in images:
            image.SetSpacing(pair.spacing[::-1])
        evaluator = SegmentationEvaluator([metric], {1: "tumour"})
        evaluator.evaluate(*images, "case")
        return float(evaluator.results[0].value)

    return {
        "dice": lambda p: evaluated(p, DiceCoefficient()),
        "hd95": lambda p: evaluated(p, HausdorffDistance(percentile=95)),
        "nsd": lambda p: evaluated(p, SurfaceDiceOverlap(tolerance=TOLERANCE)),
    }


#: Name on PyPI -> its metrics, which are there if the library is installed.
LIBRARIES: dict[str, Callable[[], Metrics]] = {
    "monai": monai,
    "SimpleITK": simple_itk,
    "MedPy": medpy,
    "torchmetrics": torchmetrics,
    "surface-distance": surface_distance,
    "pymia": pymia,
}


def differences(metric: Callable[[MaskPair], float], own: dict[str, float]) -> dict[str, Any]:
    """How the numbers of a library differ from ours, over all pairs."""
    apart: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, pair in PAIRS.items():
        try:
            apart[name] = abs(float(metric(pair)) - own[name])
        except Exception as error:  # a library may refuse what it likes
            failed[name] = f"{type(error).__name__}: {error}"
    worst = max(apart, key=lambda name: apart[name], default=None)
    return {
        "pairs": len(PAIRS),
        "same": sum(value <= SAME for value in apart.values()),
        "median": statistics.median(apart.values()) if apart else None,
        "largest": None if worst is None else apart[worst],
        "largest_on": worst,
        "failed": failed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    results_folder = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results_folder / "metric_libraries.json")
    arguments = parser.parse_args()
    arguments.threads, arguments.seed, arguments.rounds = torch.get_num_threads(), None, 1
    warnings.filterwarnings("ignore")
    own = {
        metric: {name: compute(pair) for name, pair in PAIRS.items()}
        for metric, compute in ours().items()
    }
    console = Console()
    found: dict[str, dict[str, Any]] = {}
    table = Table("library", "metric", "same", "median", "largest", "on", "failed")
    for library, metrics in LIBRARIES.items():
        try:
            there = metrics()
        except ImportError as error:
            console.print(f"{library} is left out: {error}")
            continue
        found[library] = {}
        for metric, compute in there.items():
            result = differences(compute, own[metric])
            found[library][metric] = result
            cells = [
                "-" if result[k] is None else f"{result[k]:.2g}" for k in ("median", "largest")
            ]
            same = f"{result['same']} of {result['pairs']}"
            failures = str(len(result["failed"]))
            table.add_row(library, metric, same, *cells, str(result["largest_on"]), failures)
    console.print(table)
    told = facts(arguments, ["torch", "numpy", "scipy", *found])
    arguments.out.write_text(json.dumps({**told, "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
