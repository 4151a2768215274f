"""The loggers of Lightning that a run can write to: how each is opened, fed and closed."""

from __future__ import annotations

import logging
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from prism_meta.errors import ConfigError, raise_faults

#: How a training ended; one that was stopped can go on.
Status = Literal["success", "stopped", "failed"]
#: Project of W&B and experiment of MLflow that all runs belong to.
_PROJECT = "prism-meta"
#: Numbers that MLflow takes at a time.
_PER_CALL = 1000
#: Tag of the pictures.
_PICTURE = "prediction"


class Kind(ABC):
    """One of Lightning's loggers.

    Args:
        folder: its files go below this folder.
        run: name of the run.
        id: of the logger's run to go on with. Defaults to a new one.
    """

    #: Name in configurations.
    name: ClassVar[str]
    #: Packages beyond those of prism-meta that it imports.
    packages: ClassVar[tuple[str, ...]]

    @abstractmethod
    def __init__(self, folder: Path, *, run: str, id: str | None) -> None:
        self.logger: Any
        #: Identifies the run in the logger.
        self.id = ""

    def log_settings(self, settings: Mapping[str, bool | int | float | str]) -> None:
        """Keep the settings of the run as hyper-parameters."""
        self.logger.log_hyperparams(dict(settings))

    def log_numbers(self, steps: Mapping[int, Mapping[str, float]]) -> None:
        """Log the numbers of some steps, by step and name."""
        for step, numbers in steps.items():
            self.logger.log_metrics(dict(numbers), step=step)

    @abstractmethod
    def log_picture(self, picture: NDArray[np.uint8], step: int) -> None:
        """Log a picture, (H, W, 3), before the numbers of its step."""

    def save(self) -> None:
        """Write what was logged, so that a process that is killed loses nothing."""
        self.logger.save()

    def close(self, status: Status) -> None:
        """Say how the training ended."""
        self.logger.finalize(status)


class TensorBoard(Kind):
    """Event files in ``tensorboard``: ``tensorboard --logdir RUN/loggers`` shows them."""

    name = "tensorboard"
    packages = ("tensorboard",)

    def __init__(self, folder: Path, *, run: str, id: str | None) -> None:
        from lightning_fabric.loggers import TensorBoardLogger

        self.logger = TensorBoardLogger(folder, name=self.name, version="")
        self.id = ""

    def log_picture(self, picture: NDArray[np.uint8], step: int) -> None:
        self.logger.experiment.add_image(_PICTURE, picture, step, dataformats="HWC")


class MLflow(Kind):
    """A database ``mlflow.db`` and a folder ``mlflow``, or the server of MLFLOW_TRACKING_URI."""

    name = "mlflow"
    # The last two are for the database.
    packages = ("mlflow", "pytorch_lightning", "sqlalchemy", "alembic")

    def __init__(self, folder: Path, *, run: str, id: str | None) -> None:
        # By default it reports usage to its makers, and its seven retries hold up the training for minutes
        # when the server is down.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        import mlflow
        from mlflow.tracking import MlflowClient
        from pytorch_lightning.loggers import MLFlowLogger

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it logs every table that it creates
        server = os.environ.get("MLFLOW_TRACKING_URI")
        place = folder.resolve()
        uri = server or f"sqlite:///{place / 'mlflow.db'}"
        client = MlflowClient(uri)
        if client.get_experiment_by_name(_PROJECT) is None:  # Lightning would warn of that
            artifacts = None if server else (place / self.name).as_uri()
            client.create_experiment(_PROJECT, artifact_location=artifacts)
        self.logger = MLFlowLogger(_PROJECT, run_name=run, tracking_uri=uri, run_id=id)
        self.id = self.logger.run_id
        mlflow.set_tracking_uri(server)  # Lightning sets it for the whole process, and its children
        client.update_run(self.id, status="RUNNING")

    def log_numbers(self, steps: Mapping[int, Mapping[str, float]]) -> None:
        # Together, because each call waits for the disk or for the server.
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [
            Metric(_allowed(name), value, now, step)
            for step, numbers in steps.items()
            for name, value in numbers.items()
        ]
        for k in range(0, len(metrics), _PER_CALL):
            self.logger.experiment.log_batch(self.id, metrics[k : k + _PER_CALL])

    def log_picture(self, picture: NDArray[np.uint8], step: int) -> None:
        client = self.logger.experiment
        client.log_image(self.id, picture, key=_PICTURE, step=step, synchronous=True)

    def close(self, status: Status) -> None:
        self.logger.finalize("KILLED" if status == "stopped" else status)


class WandB(Kind):
    """Offline files in ``wandb``, which ``wandb sync`` uploads; WANDB_MODE=online uploads at once."""

    name = "wandb"
    packages = ("wandb", "pytorch_lightning")

    def __init__(self, folder: Path, *, run: str, id: str | None) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb
        from pytorch_lightning.loggers import WandbLogger

        # Pictures of patients do not leave the machine unless someone asks for it.
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        # WandbLogger would go on with a run of the caller's.
        begun = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=run,
            id=id,
            dir=folder,
            mode=mode,
            resume="allow" if mode == "online" else None,
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.logger = WandbLogger(experiment=begun)
        self.id = begun.id

    # WandbLogger's own methods let W&B count its steps, which a resumed run would count from 0.
    def log_numbers(self, steps: Mapping[int, Mapping[str, float]]) -> None:
        for step, numbers in steps.items():
            self.logger.experiment.log(dict(numbers), step=step, commit=True)

    def log_picture(self, picture: NDArray[np.uint8], step: int) -> None:
        from wandb import Image

        self.logger.experiment.log({_PICTURE: Image(picture)}, step=step, commit=False)

    def close(self, status: Status) -> None:
        self.logger.finalize(status)
        self.logger.experiment.finish(exit_code=0 if status == "success" else 1)


#: All of them, in the order of the documentation.
KINDS: tuple[type[Kind], ...] = (TensorBoard, MLflow, WandB)


def check_loggers(names: Sequence[str]) -> None:
    """Check that the packages of the loggers are installed, without importing them.

    Raises:
        ConfigError: some are not (the faults of all loggers together).

    Example:
        >>> check_loggers([])
    """
    faults = []
    for kind in KINDS:
        missing = [name for name in kind.packages if find_spec(name) is None]
        if kind.name in names and missing:
            faults.append(
                f"training.loggers: {kind.name} needs {', '.join(missing)}, not installed here; install "
                f'with pip install "prism-meta[loggers]", or leave {kind.name} out'
            )
    raise_faults(ConfigError, faults)


def _allowed(name: str) -> str:
    """A name that MLflow takes: the modalities of a subset are parted by a space instead of a plus."""
    spaced = name.replace("+", " ")
    return re.sub(r"[^a-zA-Z0-9_/. -]", lambda found: f"_{ord(found[0]):x}", spaced)
