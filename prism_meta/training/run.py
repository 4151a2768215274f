"""A run folder: all files of a training run, from which it can be inspected, resumed and used.

config.toml              the resolved configuration
run.json                 versions, seed, command, cases and the modalities that they have
folds.json               the folds by the names of their cases, if data.folds is set
metrics.jsonl            one line per step
checkpoint.pt            state of the training, from which it can be resumed
checkpoint.previous.pt   the one before, in case that the newest is damaged
loggers                  files of TensorBoard, MLflow and W&B, with training.loggers
weights/last.safetensors the model's weights after the last step
weights/best.safetensors those that were best on the validation cases, with validation.cases
weights/ema.safetensors  their moving average, with training.ema
postprocessing.json      the clean-up that was best on the validation cases, with validation.cases
.lock                    locked while a process trains here
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prism_meta.data.cases import Case
from prism_meta.errors import PrismError
from prism_meta.evaluation.predictor import Predictor
from prism_meta.files import cannot_write, writable_folder, write_whole
from prism_meta.training.build import build_model, build_predictor
from prism_meta.training.cleanup.file import CLEANUP, read_cleanup
from prism_meta.training.config import Config, load_config
from prism_meta.training.folder import log
from prism_meta.training.folder.checkpoint import load_checkpoint
from prism_meta.training.folder.facts import (
    check_unchanged,
    command_line,
    read_facts,
    read_settings,
    versions,
)
from prism_meta.training.folder.lock import LOCK
from prism_meta.training.folder.weights import (
    WEIGHTS,
    Kind,
    load_weights,
    weights_file,
    written_kinds,
)
from prism_meta.training.loggers.following import LOGGERS


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

    def weights(self, kind: Kind = "last") -> Path:
        """The model's weights of one kind."""
        return weights_file(self.folder, kind)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of weights that the training writes, the one to use first."""
        return written_kinds(self.config)

    @property
    def evaluation(self) -> Path:
        """The default folder of an evaluation's report."""
        return self.folder / "evaluation"

    @staticmethod
    def check_new(folder: Path | str) -> None:
        """Check that a run can be started in ``folder``, without making it.

        Raises:
            PrismError: it is a file, or holds a run already, or files that the run would overwrite.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise cannot_write(folder, FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)))
        if (folder / "run.json").exists():
            raise PrismError(
                f"{folder}: holds a run already; continue it with --resume, or give another --out"
            )
        # A run that was killed while it started leaves its lock beside such files.
        names = (
            "config.toml", "folds.json", "metrics.jsonl", "checkpoint.pt", LOGGERS, WEIGHTS, CLEANUP,
        )  # fmt: skip
        taken = [name for name in names if (folder / name).exists()]
        if taken and not (folder / LOCK).exists():
            raise PrismError(
                f"{folder}: has a {taken[0]}, which the run would overwrite; give another --out"
            )

    @classmethod
    def create(
        cls,
        folder: Path | str,
        config: Config,
        *,
        root: Path | None,
        train: Sequence[Case],
        test: Sequence[Case],
        validation: Sequence[Case] = (),
        own: Mapping[str, str] | None = None,
        folds: str | None = None,
        adaptation: Mapping[str, Any] | None = None,
    ) -> Run:
        """Start a run in an empty or new folder.

        Args:
            folder: the run folder.
            config: the configuration of the run.
            root: folder of the cases, if they come from one.
            train: training cases.
            test: cases that are held out.
            validation: cases to validate on.
            own: class names of the objects that replace configured ones, e.g. ``{"model": "WrappedNet"}``.
            folds: the content of ``folds.json``.
            adaptation: how the weights of another run were adapted, ``AdaptationFacts`` as a dictionary.

        Raises:
            PrismError: the folder holds a run already, or cannot be written.
        """
        cls.check_new(folder)
        folder = writable_folder(folder)
        facts = {
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": command_line(),
            "seed": config.seed,
            "versions": versions(),
            "data": None if root is None else str(root.resolve()),
            "train": {case.id: sorted(case.files) for case in train},
            "test": [case.id for case in test],
            "validation": {case.id: sorted(case.files) for case in validation},
            "own": dict(own or {}),
            "adaptation": dict(adaptation or {}),
            "config": config.model_dump(mode="json"),
        }
        # run.json comes last: with it the run exists.
        write_whole(folder / "config.toml", config.to_toml())
        if folds is not None:
            write_whole(folder / "folds.json", folds)
        write_whole(folder / "run.json", json.dumps(facts, indent=2) + "\n")
        return cls(folder, config, facts)

    @classmethod
    def open(cls, folder: Path | str) -> Run:
        """Open the run in ``folder``.

        Raises:
            PrismError: there is none, or its files cannot be read.
        """
        folder = Path(folder)
        try:
            facts = read_facts(folder / "run.json")
        except OSError as error:
            if isinstance(error, FileNotFoundError) and (folder / LOCK).exists():
                raise PrismError(
                    f"{folder}: the run ended before its first step; start it again with prism-meta "
                    f"train CASES --out {folder}"
                ) from error
            reason = (error.strerror or str(error)).lower()
            raise PrismError(
                f"{folder}: no run in this folder (run.json: {reason}); "
                "give the folder that prism-meta train wrote"
            ) from error
        return cls(folder, read_settings(folder / "config.toml"), facts)

    def check_resumable(self) -> None:
        """Check that the configuration is still that which the run was started with.

        Raises:
            PrismError: the run was adapted, which takes minutes and starts again.
            ConfigError: keys of ``config.toml`` were changed.
        """
        if self.facts.get("adaptation"):
            raise PrismError(
                f"{self.folder}: was written by prism-meta adapt, whose training cannot be resumed; adapt "
                "again, or train a new run from it with --init"
            )
        check_unchanged(self.folder / "config.toml", self.config, self.facts)

    def extended(self, steps: int) -> Run:
        """The run with ``steps`` more outer steps; ``resumed`` writes it.

        Raises:
            ConfigError: there are too many steps.
        """
        total = self.config.training.steps + steps
        config = load_config(self.folder / "config.toml", [f"training.steps={total}"])
        return replace(self, config=config)

    def resumed(self, root: Path | None) -> Run:
        """The run as it goes on, with the folder that its cases are in now; what changed is written.

        Args:
            root: the folder of the cases; None if it is as it was.

        Raises:
            PrismError: its checkpoints are damaged, or nothing can be written.
        """
        load_checkpoint(self.checkpoint, torch.device("cpu"))  # before anything is changed
        facts = {
            **self.facts,
            "data": self.facts["data"] if root is None else str(root.resolve()),
            "config": self.config.model_dump(mode="json"),
        }
        if facts != self.facts:
            # A process that is killed before it writes config.toml leaves the old one there.
            facts["config_before"] = self.facts["config"]
            write_whole(self.folder / "run.json", json.dumps(facts, indent=2) + "\n")
        if load_config(self.folder / "config.toml") != self.config:
            write_whole(self.folder / "config.toml", self.config.to_toml())
        return replace(self, facts=facts)

    def check_cases(self, cases: Sequence[Case], validation: Sequence[Case] = ()) -> None:
        """Check that the cases are still those that the run was started with.

        Args:
            cases: the training cases.
            validation: those to validate on.

        Raises:
            PrismError: cases or files were added or removed.
        """
        then = {**self.facts["train"], **self.facts.get("validation", {})}
        now = {case.id: sorted(case.files) for case in (*cases, *validation)}
        changed = sorted(name for name in {**then, **now} if then.get(name) != now.get(name))
        if changed:
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise PrismError(
                f"{self.facts['data'] or 'cases'}: the cases have changed since {self.folder} was started "
                f"({', '.join(changed[:5])}{more}); restore them, give the folder they moved to, or start "
                "a new run"
            )

    def existing_weights(self, kind: Kind | None = None) -> Path:
        """The file of the trained weights.

        Args:
            kind: which ones. Defaults to the first of ``kinds``: the best ones of a run with validation,
                otherwise the averaged ones, otherwise the last ones.

        Raises:
            PrismError: training has not ended, or it writes no such weights.
        """
        if kind not in (None, *self.kinds):
            needs = {"best": "validation.cases", "ema": "training.ema"}[str(kind)]
            raise PrismError(
                f"{self.folder}: was trained without {needs}, and has no {kind} weights; use "
                f"{' or '.join(self.kinds)}"
            )
        if not self.weights().exists():
            raise PrismError(
                f"{self.folder}: the training has not ended (no {WEIGHTS}/{self.weights().name}); "
                f"continue it with prism-meta train --resume {self.folder}"
            )
        return self.weights(kind or self.kinds[0])

    def load_model(
        self,
        device: torch.device | str = "cpu",
        *,
        model: nn.Module | None = None,
        weights: Kind | None = None,
    ) -> nn.Module:
        """Load the trained weights.

        Args:
            device: device of the model.
            model: gets the weights; needed for a run that trained a model of your own. Defaults to the
                configured network.
            weights: which ones, see ``existing_weights``.

        Returns:
            The model, in evaluation mode.

        Raises:
            PrismError: training has not ended, the run needs ``model``, there are no such weights, or
                they do not fit.
        """
        if model is None:
            name = self.facts.get("own", {}).get("model")
            if name is not None:
                raise PrismError(
                    f"{self.folder}: this run trained a model of its own ({name}), which config.toml "
                    "cannot build; load it in Python with Run.open(folder).predictor(model=...)"
                )
            model = build_model(self.config)
        load_weights(self.existing_weights(weights), model)
        return model.to(device).eval()

    def predictor(
        self,
        device: torch.device | str | None = None,
        *,
        model: nn.Module | None = None,
        weights: Kind | None = None,
    ) -> Predictor:
        """The trained model with the run's preprocessing, labels, window and clean-up.

        Args:
            device: device of the model. Defaults to the GPU if there is one.
            model: see ``load_model``.
            weights: see ``load_model``.

        Raises:
            PrismError: see ``load_model`` and ``read_cleanup``.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded = self.load_model(device, model=model, weights=weights)
        return build_predictor(self.config, loaded, cleanup=read_cleanup(self.folder, self.config))

    def history(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``.

        Raises:
            PrismError: the file cannot be read, or has lines of another form.
        """
        return log.read(self.metrics)
