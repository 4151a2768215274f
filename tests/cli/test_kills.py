"""Killed at any moment, or stopped by a full disk, a command can be given again, and nothing is lost."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import run, settings
from disk import PARTIAL, FullDisk, State, longest_file, read, restore, states_of, watching
from niftis import write_cases

from prism_meta.training import train as train_module
from prism_meta.training.folder.lock import HOLDER

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="file names of this system differ"),
    pytest.mark.usefixtures("without_drawing"),
]

OPTIONS = settings(
    'data.modalities=["flair","t1"]', "training.steps=2", "training.checkpoint_every=1", "data.holdout=1",
    "meta.strategy=first_order", "meta.inner=adamw", "meta.inner_state=carried",
    "objective.weighting=learned",
)  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """A command, and what is on the disk before it.

    Args:
        start: writes what is there before.
        command: the arguments of the command, which depend on what an earlier one left, as a user would
            give them.
    """

    start: Callable[[Path], None]
    command: Callable[[Path], list[object]]


def train(root: Path) -> list[object]:
    out = root / "run"
    if (out / "run.json").exists():
        return ["train", "--resume", out]
    return ["train", root.parent / "cases", "--out", out, *OPTIONS]


def extend(root: Path) -> list[object]:
    out = root / "run"
    longer = "steps = 3" in (out / "config.toml").read_text()
    return ["train", "--resume", out, *([] if longer else ["--extend", 1])]


def adapt(root: Path) -> list[object]:
    cases, out = root.parent / "cases", root / "site"
    if (out / "run.json").exists():
        # It comes last, so that all is done. Who held the lock is read only while it is held.
        (out / HOLDER).unlink(missing_ok=True)
        return ["cases", cases]
    return ["adapt", root / "run", cases, "--out", out, "--steps", 1, "--lr", 0.01]


def nothing(root: Path) -> None:
    pass


def trained(root: Path) -> None:
    succeed(train(root))


def cut_off(root: Path) -> None:
    """A run that was killed when it had logged its first step, whose checkpoint was not yet written."""
    states = states_of(root, lambda: trained(root))
    restore(root, next(s for _, s in states if s.get("run/metrics.jsonl")))


SCENES = {
    "train": Scene(nothing, train),
    "resume": Scene(cut_off, train),
    "extend": Scene(trained, extend),
    "evaluate": Scene(trained, lambda root: ["evaluate", root / "run"]),
    "predict": Scene(
        trained, lambda root: ["predict", root / "run", root.parent / "cases", root / "labels"]
    ),
    "adapt": Scene(trained, adapt),
}
every_scene = pytest.mark.parametrize("name", SCENES)
# What resuming and extending write, training writes, too.
every_writer = pytest.mark.parametrize("name", ["train", "evaluate", "predict", "adapt"])


def succeed(arguments: list[object]) -> None:
    code, output = run(*arguments)
    assert code == 0, output


def compared(state: State) -> dict[str, object]:
    """What two runs of the same seed have in common: all names, and all that does not tell the time."""
    kept: dict[str, object] = {}
    for name, content in state.items():
        kept[name] = content
        if name.endswith("run.json") and content is not None:
            facts = json.loads(content)
            kept[name] = [facts[key] for key in ("config", "train", "test", "data")]
        elif ".prism-meta-cache/" in name or "checkpoint" in name:
            kept[name] = content is None  # equal tensors, but the files keep them in another order
    return kept


def different(first: State, second: State) -> list[str]:
    one, other = compared(first), compared(second)
    return [name for name in sorted({**one, **other}) if one.get(name, ...) != other.get(name, ...)]


@pytest.fixture(autouse=True)
def without_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checking a configuration takes half of the time of such a short training, and writes nothing."""
    monkeypatch.setattr(train_module, "check_configuration", lambda *args, **options: None)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_cases(tmp_path / "cases", 3)
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.mark.slow
@every_scene
def test_killed_at_any_moment(root: Path, name: str) -> None:
    scene = SCENES[name]
    scene.start(root)
    states = states_of(root, lambda: succeed(scene.command(root)))
    end = states[-1][1]
    assert any(PARTIAL in file for _, state in states for file in state)
    for moment, state in states:
        restore(root, state)
        code, output = run(*scene.command(root))
        assert code == 0, f"{moment}\n{output}"
        assert different(read(root), end) == [], moment


@pytest.mark.slow
@every_writer
def test_the_disk_is_full_at_any_moment(root: Path, name: str) -> None:
    scene = SCENES[name]
    scene.start(root)
    start = read(root)
    space = FullDisk(math.inf)
    with watching(root, space):
        succeed(scene.command(root))
    end, needed = read(root), space.seen
    assert needed > 3
    left: list[dict[str, object]] = []
    for count in range(needed):
        restore(root, start)
        with watching(root, FullDisk(count)):
            code, output = run(*scene.command(root))
        check_full(root, start, code, output, "no space left on device")
        if compared(read(root)) not in left:
            left.append(compared(read(root)))
            succeed(scene.command(root))
            assert different(read(root), end) == [], count


@pytest.mark.slow
@every_writer
def test_files_may_not_grow(root: Path, name: str) -> None:
    """The system itself refuses to write on, in the middle of a file; its message differs."""
    scene = SCENES[name]
    scene.start(root)
    start = read(root)
    succeed(scene.command(root))
    end = read(root)
    sizes = {len(c) for n, c in end.items() if c and start.get(n) != c}
    assert sizes
    for size in sorted(sizes):
        restore(root, start)
        with longest_file(size - 1):
            code, output = run(*scene.command(root))
        check_full(root, start, code, output, "file too large")
        succeed(scene.command(root))
        assert different(read(root), end) == [], size


def check_full(root: Path, start: State, code: int, output: str, reason: str) -> None:
    """One line says what cannot be written, and no half file is left that was not there before."""
    lines = [line for line in output.splitlines() if "error: " in line]
    assert code == 2 and len(lines) == 1, output
    assert re.search(rf"error: cannot write \S+: {reason}; free some space$", lines[0]), output
    assert PARTIAL not in lines[0] and "Traceback" not in output, output
    new = read(root).keys() - start.keys()
    assert not [n for n in new if PARTIAL in n or n.endswith(HOLDER)]
