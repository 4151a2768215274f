"""Loggers beside metrics.jsonl: what they get, what a failure does, and what a resumed run adds."""

from __future__ import annotations

import json
import logging
import os
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import SMALL, errors, run, settings
from numpy.typing import NDArray

import prism_meta as pm
from prism_meta.errors import ConfigError
from prism_meta.training.journal import Journal
from prism_meta.training.loggers import kinds
from prism_meta.training.loggers.following import Loggers, following
from prism_meta.training.loggers.kinds import KINDS, Kind, Status
from prism_meta.training.loggers.numbers import numbers_of
from prism_meta.training.loggers.picture import draw_outlines
from prism_meta.training.stopping import TrainingStopped

# --------------------------------------------------------------------- loggers that are only recorded

LINES = [{"step": step, "lr": step / 10} for step in range(1, 7)]


class Recorder(Kind):
    """Keeps what it is told; fails when it is asked to."""

    name = "recorder"
    packages = ()
    told: list[Any]
    fails: str
    more = ""

    def __init__(self, folder: Path, *, run: str, id: str | None) -> None:
        self.id = id or f"{run}-1"
        self.tell("open", id)

    def tell(self, *what: Any) -> None:
        if self.fails == what[0]:
            raise ConnectionError("server is down" + self.more + "\nsecond line")
        self.told.append(what)

    def log_settings(self, settings: Any) -> None:
        self.tell("settings", settings)

    def log_numbers(self, steps: Any) -> None:
        for step, numbers in steps.items():
            self.tell("numbers", step, numbers)

    def log_picture(self, picture: NDArray[np.uint8], step: int) -> None:
        self.tell("picture", step)

    def save(self) -> None:
        self.tell("save")

    def close(self, status: Status) -> None:
        self.tell("close", status)

    @classmethod
    def steps(cls) -> list[int]:
        return [what[1] for what in cls.told if what[0] == "numbers"]


@pytest.fixture
def recorder() -> type[Recorder]:
    return type("Fresh", (Recorder,), {"told": [], "fails": ""})


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, "prism_meta.training")
    return caplog


def opened(kind: type[Kind], folder: Path, **options: Any) -> Loggers:
    config = {"training": {"steps": 6, "init": None}, "data": {"labels": {"a": 1}}}
    return Loggers([kind], folder / "loggers", run="a", config=config, **options)


def picture() -> NDArray[np.uint8]:
    return np.zeros((2, 2, 3), dtype=np.uint8)


def test_a_logger_gets_settings_steps_and_pictures(
    recorder: type[Recorder], tmp_path: Path
) -> None:
    loggers = opened(recorder, tmp_path)
    loggers.add(LINES[:2])
    loggers.add(LINES[2:3], picture)
    loggers.close("success")
    assert recorder.told == [
        ("open", None),
        ("settings", {"training.steps": 6, "data.labels": '{"a": 1}'}),
        ("numbers", 1, {"lr": 0.1}),
        ("numbers", 2, {"lr": 0.2}),
        ("save",),
        ("picture", 3),
        ("numbers", 3, {"lr": 0.3}),
        ("save",),
        ("close", "success"),
    ]


def test_a_resumed_run_repeats_no_step_and_adds_those_that_lack(
    recorder: type[Recorder], tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    first = Journal(path, opened(recorder, tmp_path))
    first.begin(0)
    first.add(_with_losses(LINES[:3]), picture)
    # KilledError; the checkpoint is from step 2, so step 3 is trained and logged again.
    again = Journal(path, opened(recorder, tmp_path, resume=True))
    again.begin(2)
    again.add(_with_losses(LINES[2:3]), picture)
    recorder.fails = "numbers"
    again.add(_with_losses(LINES[3:4]))
    recorder.fails = ""
    last = Journal(path, opened(recorder, tmp_path, resume=True))
    last.begin(4)
    last.add(_with_losses(LINES[4:]))
    assert recorder.steps() == [1, 2, 3, 4, 5, 6]
    opens = [what for what in recorder.told if what[0] in ("open", "settings", "picture")]
    assert [what[0] for what in opens] == ["open", "settings", "picture", "open", "open"]
    assert opens[-1] == ("open", "a-1")


def _with_losses(lines: Any) -> Any:
    return [{**line, "train_loss": 1.0, "meta_loss": 1.0} for line in lines]


@pytest.mark.parametrize(
    ("action", "what"),
    [
        ("open", "cannot be opened"),
        ("settings", "cannot be opened"),
        ("numbers", "failed at step 2"),
        ("picture", "failed at step 2"),
        ("save", "failed at step 2"),
        ("close", "failed at its end"),
    ],
)
def test_a_logger_that_fails_is_left_out_with_one_warning(
    action: str,
    what: str,
    recorder: type[Recorder],
    tmp_path: Path,
    warned: pytest.LogCaptureFixture,
) -> None:
    recorder.fails = action
    loggers = opened(recorder, tmp_path)
    loggers.add(LINES[:2], picture)
    before = len(recorder.told)
    loggers.add(LINES[2:4], picture)
    loggers.close("success")
    assert warned.messages == [
        f"warning: recorder {what} (ConnectionError: server is down); the training goes on without it, "
        "metrics.jsonl has all numbers, and a resumed run gives it what it missed"
    ]
    assert action == "close" or len(recorder.told) == before
    closed = [told for told in recorder.told if told[0] == "close"]
    assert closed == ([] if action in ("open", "close") else [("close", "failed")])


def test_a_long_error_is_shortened(
    recorder: type[Recorder], tmp_path: Path, warned: pytest.LogCaptureFixture
) -> None:
    recorder.fails, recorder.more = "open", " and more" * 50
    opened(recorder, tmp_path).add(LINES[:1])
    (message,) = warned.messages
    assert "(ConnectionError: server is down and more" in message and " ...); the tr" in message
    assert len(message) < 350


def test_a_full_disk_and_a_picture_that_fails_are_only_warnings(
    recorder: type[Recorder], tmp_path: Path, warned: pytest.LogCaptureFixture
) -> None:
    def cannot_draw() -> NDArray[np.uint8]:
        raise RuntimeError

    loggers = opened(recorder, tmp_path)
    loggers.add(LINES[:1], cannot_draw)
    loggers.add(LINES[1:2], cannot_draw)
    assert warned.messages == ["warning: no pictures for the loggers (RuntimeError)"]
    (tmp_path / "loggers" / "recorder.json").unlink()
    (tmp_path / "loggers" / "recorder.json").mkdir()
    loggers.add(LINES[2:3])
    loggers.add(LINES[3:4])
    assert (
        len(warned.messages) == 2
        and "recorder failed at step 3 (OutputError: cannot write" in warned.messages[1]
    )
    assert recorder.steps() == [1, 2, 3]
    opened(recorder, tmp_path, resume=True).add(LINES[:1])
    assert "recorder cannot be opened (IsADirectoryError" in warned.messages[2]


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "success"), (TrainingStopped(1, 2), "stopped"), (ValueError(), "failed")],
)
def test_loggers_are_told_how_the_training_ended(
    error: Exception | None, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    recorder: type[Recorder],
) -> None:  # fmt: skip
    monkeypatch.setattr("prism_meta.training.loggers.following.KINDS", (recorder,))
    try:
        with following(["recorder"], tmp_path, run="a", config={}, resume=False) as loggers:
            loggers.add(LINES[:1])
            if error is not None:
                raise error
    except type(error or KeyError()):
        pass
    assert recorder.told[-1] == ("close", status)


def test_a_run_that_is_over_gives_a_logger_what_it_missed(
    recorder: type[Recorder], tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    Journal(path).add(_with_losses(LINES))
    loggers = opened(recorder, tmp_path, resume=True)
    Journal(path, loggers).begin(6)
    assert recorder.told == []  # nothing is opened before the processes that load data exist
    loggers.close("success")
    assert recorder.steps() == [1, 2, 3, 4, 5, 6] and recorder.told[-1] == ("close", "success")


# --------------------------------------------------------------------------------- packages that lack


def test_a_missing_package_is_told_before_anything_is_done(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kinds, "find_spec", lambda name: None)
    names = 'training.loggers=["tensorboard", "wandb"]'
    code, output = run("train", cases, "--out", tmp_path / "run", *settings(names))
    told = [
        f"training.loggers: {name} needs {packages}, not installed here; install with "
        f'pip install "prism-meta[loggers]", or leave {name} out'
        for name, packages in (
            ("tensorboard", "tensorboard"),
            ("wandb", "wandb, pytorch_lightning"),
        )
    ]
    assert (code, errors(output)) == (2, told)
    assert not (tmp_path / "run").exists()


def test_loggers_need_a_run_folder(cases: Path) -> None:
    config = pm.load_config(overrides=[*SMALL, "training.loggers=tensorboard"])
    assert config.training.loggers == ("tensorboard",)
    message = r"^training\.loggers: need a run folder; give out, or leave them out$"
    with pytest.raises(ConfigError, match=message):
        pm.train(cases, config, progress=False)


# -------------------------------------------------------------------------------------------- pictures


def test_a_picture_has_the_outlines_of_truth_and_prediction() -> None:
    image = torch.zeros(6, 8)
    image[1:5, 1:7] = 1.0
    image[1, 1] = 3.0
    truth, prediction = torch.zeros(6, 8).long(), torch.zeros(6, 8).long()
    truth[2, 5] = 1
    prediction[3:5, 1:3] = 2
    drawn = draw_outlines(image, truth, prediction)
    assert drawn.shape == (384, 288, 3) and drawn.dtype == np.uint8
    # A voxel has 48 pixels. The second axis runs upwards, the first one to the left.
    voxels = drawn.reshape(8, 48, 6, 48, 3)[::-1, :, ::-1].transpose(2, 0, 1, 3, 4)
    assert (voxels[0, 0] == 0).all() and (voxels[1, 1] == 191).all()  # outside; the brightest
    assert (voxels[2, 5] == 0).all()  # the inside of the true class keeps the grey value
    assert (voxels[1, 5, :, 0] == 255).all()  # on its right, towards the voxel
    assert (voxels[3, 5, :, -1] == 255).all() and (voxels[3, 5, :, 0] != 255).all()
    orange = np.array([255, 127, 14])
    assert (voxels[4, 2, 0] == orange).all() and (voxels[4, 2, :, 0] == orange).all()
    assert (voxels[4, 2, 24, 24] == voxels[3, 3, 24, 24]).all()  # not filled


# ------------------------------------------------------------------------------- Lightning's loggers

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
