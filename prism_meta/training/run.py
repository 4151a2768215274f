"""A run folder: all files of a training run, from which it can be inspected, resumed and used.

config.toml           the resolved configuration
run.json              versions, seed, command, cases and the modalities that they have
metrics.jsonl         one line per step
checkpoint.pt         state of the training, from which it can be resumed
weights.safetensors   the model's weights
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from prism_meta.data.cases import Case
from prism_meta.errors import PrismError
from prism_meta.evaluation.predictor import Predictor
from prism_meta.files import atomic, writable_folder
from prism_meta.training.build import build_model, build_predictor
from prism_meta.training.config import Config, load_config


@dataclass(frozen=True)
class Run:
    """One training run on disk.

    Args:
        folder: the run folder.
        config: the configuration that the run was started with.
        facts: the content of ``run.json``.
    """

    folder: Path
    config: Config
    facts: dict[str, Any]

    @property
    def metrics(self) -> Path:
        """The losses, one JSON object per step."""
        return self.folder / "metrics.jsonl"

    @property
    def checkpoint(self) -> Path:
        """State of the training."""
        return self.folder / "checkpoint.pt"

    @property
    def weights(self) -> Path:
        """The model's weights."""
        return self.folder / "weights.safetensors"

    @property
    def evaluation(self) -> Path:
        """The default folder of an evaluation's report."""
        return self.folder / "evaluation"

    @staticmethod
    def new_folder(folder: Path | str) -> Path:
        """Make the folder of a new run.

        Raises:
            PrismError: it holds a run already, or cannot be written.
        """
        folder = Path(folder)
        if (folder / "run.json").exists():
            raise PrismError(
                f"{folder}: holds a run already; continue it with --resume, or give another --out"
            )
        return writable_folder(folder)

    @classmethod
    def create(
        cls,
        folder: Path | str,
        config: Config,
        *,
        root: Path | None,
        train: Sequence[Case],
        test: Sequence[Case],
        own: Mapping[str, str] | None = None,
    ) -> Run:
        """Start a run in an empty or new folder.

        Args:
            folder: the run folder.
            config: the configuration of the run.
            root: folder of the cases, if they come from one.
            train: training cases.
            test: cases that are held out.
            own: class names of the objects that replace configured ones, e.g. ``{"model": "WrappedNet"}``.

        Raises:
            PrismError: the folder holds a run already, or cannot be written.
        """
        folder = cls.new_folder(folder)
        facts = {
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": command_line(),
            "seed": config.seed,
            "versions": _versions(),
            "data": None if root is None else str(root.resolve()),
            "train": {case.id: sorted(case.files) for case in train},
            "test": [case.id for case in test],
            "own": dict(own or {}),
        }
        with atomic(folder / "config.toml") as partial:
            partial.write_text(config.to_toml(), encoding="utf-8")
        with atomic(folder / "run.json") as partial:
            partial.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        return cls(folder, config, facts)

    @classmethod
    def open(cls, folder: Path | str) -> Run:
        """Open the run in ``folder``.

        Raises:
            PrismError: there is none, or its files cannot be read.
        """
        folder = Path(folder)
        try:
            facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PrismError(
                f"{folder}: no run in this folder (run.json cannot be read); "
                "give the folder that prism-meta train wrote"
            ) from error
        return cls(folder, load_config(folder / "config.toml"), facts)

    def check_cases(self, cases: Sequence[Case]) -> None:
        """Check that the training cases are still those that the run was started with.

        Raises:
            PrismError: cases or files were added or removed.
        """
        if {case.id: sorted(case.files) for case in cases} != self.facts["train"]:
            raise PrismError(
                f"{self.facts['data'] or 'cases'}: the cases have changed since {self.folder} was "
                "started; restore them or start a new run"
            )

    def save_weights(self, model: nn.Module) -> None:
        """Write the model's weights."""
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        with atomic(self.weights) as partial:
            save_file(state, partial)

    def load_model(
        self, device: torch.device | str = "cpu", *, model: nn.Module | None = None
    ) -> nn.Module:
        """Load the trained weights.

        Args:
            device: device of the model.
            model: gets the weights; needed for a run that trained a model of your own. Defaults to the
                configured network.

        Returns:
            The model, in evaluation mode.

        Raises:
            PrismError: training has not ended, the run needs ``model``, or the weights do not fit.
        """
        if model is None:
            name = self.facts.get("own", {}).get("model")
            if name is not None:
                raise PrismError(
                    f"{self.folder}: this run trained a model of its own ({name}), which config.toml "
                    "cannot build; load it in Python with Run.open(folder).predictor(model=...)"
                )
            model = build_model(self.config)
        try:
            model.load_state_dict(load_file(self.weights))
        except FileNotFoundError as error:
            raise PrismError(
                f"{self.folder}: the training has not ended (no {self.weights.name}); "
                f"continue it with prism-meta train --resume {self.folder}"
            ) from error
        except (RuntimeError, SafetensorError) as error:
            raise PrismError(
                f"{self.weights}: does not fit config.toml ({str(error).splitlines()[0]}); "
                "restore the file or train again"
            ) from error
        return model.to(device).eval()

    def predictor(
        self, device: torch.device | str | None = None, *, model: nn.Module | None = None
    ) -> Predictor:
        """The trained model with the run's preprocessing, labels and window.

        Args:
            device: device of the model. Defaults to the GPU if there is one.
            model: see ``load_model``.

        Raises:
            PrismError: see ``load_model``.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return build_predictor(self.config, self.load_model(device, model=model))

    def history(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``."""
        if not self.metrics.exists():
            return []
        return [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]


def command_line() -> list[str]:
    """The command line of this process, with the program's name instead of its path."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return ["python", "-m", program.parent.name, *sys.argv[1:]]
    return [program.name, *sys.argv[1:]]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("prism-meta", "torch", "monai", "nibabel", "numpy", "lightning-fabric"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source folder that was not installed
            found[package] = "not installed"
    return found
