"""Pages with every section that they can have, made only of records and arrays."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prism_meta.data.cases import Case, Volume
from prism_meta.empty_masks import BratsEmpty
from prism_meta.modalities import BRATS, subset_name, subsets
from prism_meta.records import Record
from prism_meta.report.html import write_report
from prism_meta.report.overlays import Overlay, OverlayCollector
from prism_meta.report.runs_page import write_runs_page
from prism_meta.report.several import side_by_side
from prism_meta.report.worst import WorstCases

REGIONS = ("WT", "TC", "ET")
CLASSES = ("background", "core", "oedema")
CASES = ("p10", "p9", "p2", "p1")


def measured(case: str, *, shift: float = 0.0, modalities: tuple[str, ...] = BRATS) -> list[Record]:
    """Records of one case: all subsets and regions; Dice grows with the subset and with ``shift``."""
    names = [subset_name(row, BRATS) for row in subsets(len(BRATS)).tolist()]
    return [
        Record(
            case, name, region, min(1.0, 0.1 * (name.count("+") + 1) + 0.02 * i + shift), 9.0 - i,
            0.5, 4.0 + i, 5.0, 1, 0, 2, 240.0,
        )
        for name in names if set(name.split("+")) <= set(modalities)
        for i, region in enumerate(REGIONS)
    ]  # fmt: skip


def records(extra: float = 0.0) -> list[Record]:
    """Four cases; the first has no t2, and one region of the second has no Dice."""
    found = [
        record
        for i, case in enumerate(CASES)
        for record in measured(
            case, shift=0.03 * i + extra, modalities=BRATS[:3] if i == 0 else BRATS
        )
    ]
    lost = (CASES[1], "flair", "ET")
    return [
        Record(*lost, math.nan, math.nan, math.nan, 0.0, 0.0, 0, 0, 0, 240.0)
        if (record.case, record.subset, record.region) == lost
        else record
        for record in found
    ]


def seen_case(name: str, modalities: tuple[str, ...] = BRATS) -> Case:
    files = {modality: Path(f"{modality}.nii.gz") for modality in modalities}
    return Case(name, BRATS, files=files)


def volume(shape: tuple[int, int, int] = (12, 16, 8)) -> tuple[Volume, torch.Tensor]:
    """A ramp of 1 x 1 x 2.5 mm with a box of two classes."""
    image = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    labels = torch.zeros(shape, dtype=torch.int64)
    labels[3:8, 5:12, 2:6], labels[5:7, 7:9, 3:5] = 2, 1
    return Volume({"flair": image}, affine=np.diag([1.0, 1.0, 2.5, 1.0]), shape=shape), labels


def overlay() -> Overlay:
    collector = OverlayCollector()
    image, labels = volume()
    for subset in ("t1", "flair+t1ce+t1"):
        collector(seen_case(CASES[0]), image, subset, labels, labels.roll(1, 0))
    return collector.overlays(["t1", "flair+t1ce+t1"])[0]


def worst_cases() -> WorstCases:
    worst = WorstCases(2)
    image, labels = volume()
    for i, case in enumerate(CASES):
        modalities = BRATS[:3] if i == 0 else BRATS
        seen = seen_case(case, modalities)
        worst(seen, image, "+".join(modalities), labels, labels.roll(i, 1))
        worst.add(measured(case, shift=0.03 * i, modalities=modalities))
    return worst


HISTORY: list[dict[str, Any]] = [
    {
        "step": i, "epoch": 1 + i // 10, "train_loss": 2 / i, "meta_loss": 2.5 / i,
        "cosine": None if i == 3 else 1 - i / 40,
        "terms": {"fuse": 1 / i, "beta": [1.0, 0.9, 0.8, 0.7], "shown": [1, 1, 1, 1]},
        **({"validation": {"last": {"dice": i / 50, "worst": i / 90}}} if i % 10 == 0 else {}),
    }
    for i in range(1, 31)
]  # fmt: skip


def report_page(folder: Path) -> Path:
    """The report of one run."""
    return write_report(
        folder,
        title="A run with <names> & signs",
        records=records(),
        modalities=BRATS,
        class_names=CLASSES,
        policy_statement=BratsEmpty.statement,
        overlays=[overlay()],
        worst=worst_cases().found(),
        history=HISTORY,
        trained_on={
            "training": {f"q{i}": BRATS[i % 3 :] for i in range(6)},
            "validation": {"v1": BRATS},
        },
        facts={"seed": "17", "config": "[data]\nholdout = 4"},
        commands={"Trained with": "prism-meta train cases --out run", "Evaluated with": "a\nb"},
        faults=["case p7: no label file; add one"],
    )


def comparison_page(folder: Path) -> Path:
    """Three runs side by side; the second lacks a case of the first."""
    runs = side_by_side(
        {
            "first": records(),
            "second <b>": [r for r in records(0.05) if r.case != CASES[-1]],
            "a/third": records(-0.04),
        }
    )
    return write_runs_page(
        folder / "runs.html",
        runs,
        settings={"meta.strategy": ["first_order", "second_order", "reptile"]},
        command="prism-meta compare first second third --out runs.html",
    )
