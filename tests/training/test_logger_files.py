"""Files of Lightning's loggers, read back with the loggers' own libraries."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from commands import SMALL

import prism_meta as pm
from prism_meta.training.loggers.kinds import KINDS
from prism_meta.training.loggers.numbers import numbers_of

INSTALLED = [kind for kind in KINDS if all(find_spec(name) is not None for name in kind.packages)]
STEPS, EVERY = 6, 2


def needs(name: str) -> Any:
    installed = name in [kind.name for kind in INSTALLED]
    reason = f'{name} is not installed: pip install "prism-meta[loggers]"'
    return pytest.mark.skipif(not installed, reason=reason)


class KilledError(Exception):
    """A training that ends without saving anything."""


@pytest.fixture(scope="module")
def trained(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all loggers that was killed after step 4, and went on from its checkpoint of step 3."""
    folder = tmp_path_factory.mktemp("runs")
    # A process that loads data would fail with W&B's hooks, if it were forked after W&B had begun.
    common = [*SMALL, f"training.steps={STEPS}", "training.checkpoint_every=3", "model.width=1",
              "validation.cases=1", f"validation.every={EVERY}", "data.workers=1"]  # fmt: skip
    names = json.dumps([kind.name for kind in INSTALLED])
    config = pm.load_config(overrides=[*common, f"training.loggers={names}"])

    def kill(step: int, line: Any) -> None:
        if step == 4:
            raise KilledError

    with pytest.MonkeyPatch.context() as environment:
        for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE"):
            environment.delenv(name, raising=False)
        with pytest.raises(KilledError):
            pm.train(cases, config, out=folder / "run", progress=False, on_step=kill)
        # Otherwise the next run of the process would take it for its server.
        assert "MLFLOW_TRACKING_URI" not in os.environ
        pm.train(cases, out=folder / "run", resume=True, progress=False)
    pm.train(cases, pm.load_config(overrides=common), out=folder / "without", progress=False)
    return folder / "run"


def expected(trained: Path) -> dict[str, dict[int, float]]:
    """Name -> step -> number, from metrics.jsonl."""
    series: dict[str, dict[int, float]] = {}
    for line in map(json.loads, (trained / "metrics.jsonl").read_text().splitlines()):
        for name, value in numbers_of(line).items():
            series.setdefault(name, {})[line["step"]] = value
    assert {"train_loss", "meta_loss", "lr", "gradient_norm", "epoch"} <= series.keys()
    assert "validation/last/subsets/flair+t1ce" in series and "terms/fuse" in series
    assert list(series["lr"]) == [1, 2, 3, 4, 5, 6]
    assert list(series["validation/last/dice"]) == [2, 4, 6]
    return series


# The packages warn of each other's and of their own old functions.
@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(not INSTALLED, reason='pip install "prism-meta[loggers]"')
def test_loggers_change_nothing(trained: Path) -> None:
    for name in ("metrics.jsonl", "weights/last.safetensors", "weights/best.safetensors"):
        assert (trained / name).read_bytes() == (trained.parent / "without" / name).read_bytes()


@pytest.mark.filterwarnings("default")
@needs("tensorboard")
def test_tensorboard_has_all_numbers_once(trained: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    read = EventAccumulator(str(trained / "loggers" / "tensorboard")).Reload()
    series = expected(trained)
    assert set(read.Tags()["scalars"]) == {*series, "hp_metric"}
    for name, values in series.items():
        events = read.Scalars(name)
        assert [event.step for event in events] == list(values), name
        assert [event.value for event in events] == pytest.approx(list(values.values()), rel=1e-6)
    assert [event.step for event in read.Images("prediction")] == [2, 4, 6]
    content = read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    assert found["training.steps"].number_value == STEPS
    assert found["data.patch"].string_value == "[16, 16]"


@pytest.mark.filterwarnings("default")
@needs("mlflow")
def test_mlflow_has_all_numbers_once(trained: Path) -> None:
    from mlflow.tracking import MlflowClient

    folder = trained / "loggers"
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("prism-meta")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED" and found.info.run_name == "run"
    assert found.info.run_id == json.loads((folder / "mlflow.json").read_text())["id"]
    assert found.data.params["training.steps"] == str(STEPS)
    series = expected(trained)
    assert set(found.data.metrics) == {name.replace("+", " ") for name in series}
    for name in ("train_loss", "lr", "validation/last/dice", "validation/last/subsets/flair+t1ce"):
        history = client.get_metric_history(found.info.run_id, name.replace("+", " "))
        assert [(metric.step, metric.value) for metric in history] == list(series[name].items())
    images = [f.path for f in client.list_artifacts(found.info.run_id, "images")]
    assert sorted(int(p.split("+")[2]) for p in images if p.endswith(".png")) == [2, 4, 6]


@pytest.mark.filterwarnings("default")
@needs("wandb")
def test_wandb_has_all_numbers_once(trained: Path) -> None:
    folder = trained / "loggers"
    id = json.loads((folder / "wandb.json").read_text())["id"]
    records = [
        record
        for path in sorted(folder.glob(f"wandb/offline-run-*/run-{id}.wandb"))
        for record in _records(path)
    ]
    assert {record.run.run_id for record in records if record.HasField("run")} == {id}
    rows = [
        {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert [row["_step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["_step"] for row in rows if "prediction/path" in row] == [2, 4, 6]
    for name, values in expected(trained).items():
        assert {row["_step"]: row[name] for row in rows if name in row} == values, name
    kept = {update.key: update.value_json for r in records for update in r.config.update}
    assert kept["training.steps"] == str(STEPS)


def _records(path: Path) -> Iterator[Any]:
    """The records of a file of W&B: a header of 7 bytes, then blocks of parts as LevelDB's logs have."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""
