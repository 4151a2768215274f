"""Settings for the whole suite, and a fixture with cases that several files train on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from niftis import write_cases
from torch import Tensor, nn

from prism_meta.errors import ConfigError
from prism_meta.evaluation import predictor
from prism_meta.training import train as train_module
from prism_meta.training.config import Config
from prism_meta.training.planning import search as plan_search
from prism_meta.training.profiling.memory import StepMemory

# The tests are many small operations, which a second thread would only slow down.
torch.set_num_threads(1)


#: It registers a strategy, which only the process that asks for it should do.
collect_ignore = ["own_strategy.py"]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four cases; the first has no t2."""
    root = write_cases(tmp_path_factory.mktemp("cases"), 4)
    (root / "p0" / "p0_t2.nii.gz").unlink()
    return root


@pytest.fixture
def without_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are empty. Drawing takes half of the time of a small evaluation; tests/report looks at it."""
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, file, **options: file.write(b"drawn")
    )


_checked: dict[str, Exception | None] = {}


@pytest.fixture
def checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each configuration is checked once in the session, which takes most of the time of a refusal."""
    check = train_module.check_configuration

    def once(config: Config, *, model: nn.Module | None = None) -> None:
        key = config.model_dump_json()
        if model is not None or key not in _checked:
            try:
                check(config, model=model)
            except ConfigError as error:
                _checked[key] = error
                raise
            _checked[key] = None
        elif (error := _checked[key]) is not None:
            raise error

    monkeypatch.setattr(train_module, "check_configuration", once)


@pytest.fixture
def memory_by_voxels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of a step is 1000 bytes per voxel and channel, which takes no time to estimate."""

    def memory(config: Config, masks: Sequence[Tensor]) -> StepMemory:
        voxels = config.data.batch_size * math.prod(config.data.patch)
        return StepMemory(0, 0, 1000 * voxels * config.model.width)

    monkeypatch.setattr(plan_search, "step_memory", memory)


@pytest.fixture
def without_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Dice is 0. Distances take a third of the time of a small evaluation."""
    monkeypatch.setattr(
        predictor,
        "measure",
        lambda *maps, labels, **options: dict.fromkeys(labels.regions, (0.0, 0.0)),
    )
