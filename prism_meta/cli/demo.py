"""Sizes and settings of the demo, which runs in minutes on two cores."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from prism_meta.data.availability import draw_availability
from prism_meta.data.phantom import write_phantoms
from prism_meta.training.config import Config, load_config

#: Missing rates of flair, t1ce, t1 and t2 in the training cases.
RATES = (0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True)
class Demo:
    """Sizes and settings of a demo; see ``FULL`` and ``QUICK``.

    Args:
        train: number of phantoms to train on; their files are missing at ``RATES``.
        validation: number of complete phantoms more, on which weights and clean-up are chosen.
        test: number of complete phantoms to evaluate on.
        shape: voxels of a phantom.
        spacing: voxel size of a phantom in mm.
        overrides: changes to the default configuration.
    """

    train: int
    validation: int
    test: int
    shape: tuple[int, int, int]
    spacing: float
    overrides: tuple[str, ...]

    def config(self, seed: int) -> Config:
        """The configuration of the demo's run."""
        names = [f"case_{k:03d}" for k in range(self.train, self.train + self.validation)]
        watched = [f"validation.cases={json.dumps(names)}"] if names else []
        return load_config(overrides=[*self.overrides, *watched, f"seed={seed}"])

    @property
    def phantoms(self) -> int:
        """The number of all phantoms."""
        return self.train + self.validation + self.test

    def write(
        self, folder: Path, *, seed: int, on_case: Callable[[int], None]
    ) -> tuple[Path, Path]:
        """Write the phantoms, and return the folder of training and validation cases and that of tests."""
        incomplete = draw_availability(self.train, RATES, seed=seed)
        watched, complete = (
            torch.ones(n, len(RATES), dtype=torch.bool) for n in (self.validation, self.test)
        )
        sets = {
            "train": (torch.cat([incomplete, watched]), 2 * seed, 0),
            "test": (complete, 2 * seed + 1, self.train + self.validation),
        }
        for name, (availability, set_seed, offset) in sets.items():
            write_phantoms(
                folder / name,
                availability,
                seed=set_seed,
                shape=self.shape,
                spacing=self.spacing,
                on_case=partial(_later, on_case, offset),
            )
        return folder / "train", folder / "test"


FULL = Demo(
    train=24,
    validation=4,
    test=4,
    shape=(80, 96, 72),
    spacing=2.0,
    overrides=(
        "data.spacing=[3, 3, 3]",
        "data.patch=[48, 48]",
        # Fewer samples in more steps: as many as five minutes on two cores allow.
        "data.batch_size=6",
        # As PRISM's training script: two levels, one Adam for both steps, and the last weights.
        "meta.strategy=first_order",
        "meta.inner=adamw",
        "meta.inner_lr=0.01",
        "meta.inner_state=shared",
        "meta.alpha=1.0",
        "training.ema=0",
        "training.steps=800",
        "validation.every=400",
        "evaluation.overlap=0.25",
    ),
)

#: The same steps in under a minute, too short to learn much.
QUICK = Demo(
    train=6,
    validation=0,
    test=2,
    shape=(40, 48, 36),
    spacing=4.0,
    overrides=(
        "data.spacing=[4, 4, 4]",
        "data.patch=[32, 32]",
        "model.width=4",
        "training.steps=40",
    ),
)


def _later(on_case: Callable[[int], None], offset: int, case: int) -> None:
    """Count on from the first set."""
    on_case(offset + case + 1)
