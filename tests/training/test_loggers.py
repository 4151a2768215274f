"""Loggers beside metrics.jsonl: what they get, what a failure does, and what a resumed run adds."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import SMALL, errors, run, settings
from numpy.typing import NDArray

import prism_meta as pm
from prism_meta.errors import ConfigError
from prism_meta.training.loggers import kinds
from prism_meta.training.loggers.following import Loggers, following
from prism_meta.training.loggers.journal import Journal
from prism_meta.training.loggers.kinds import Kind, Status
from prism_meta.training.loggers.picture import draw_outlines
from prism_meta.training.stopping import TrainingStopped

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
