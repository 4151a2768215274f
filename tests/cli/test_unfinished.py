"""An evaluation that was killed goes on where it stopped, and ends with the same report to the byte."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import errors, run, settings
from niftis import cut, write_cases

from prism_meta.cli import evaluating
from prism_meta.cli.unfinished import UNFINISHED
from prism_meta.data.cases import Case
from prism_meta.evaluation.predictor import Predictor
from prism_meta.records import Record
from prism_meta.report.overlays import OverlayCollector

NAMES = ("p0", "p1", "p2", "p3", "p4")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, beside a folder of five cases."""
    folder = tmp_path_factory.mktemp("trained")
    root = write_cases(folder / "cases", len(NAMES))
    options = settings("training.steps=1", 'data.modalities=["flair","t1"]')
    code, output = run("train", root, "--out", folder / "run", *options)
    assert code == 0, output
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def expected(trained: Path) -> dict[str, bytes]:
    """The report of an evaluation that nothing interrupts."""
    code, output = run(*command(trained, trained / "whole"))
    assert code == 0 and "measured before" not in output
    found = content(trained / "whole")
    assert sorted(found) == ["records.csv", "report.html", "summary.json"]
    return found


def command(trained: Path, out: Path) -> list[object]:
    return ["evaluate", trained / "run", trained / "cases", "--out", out]


class Killed(BaseException):
    """Stands for a signal."""


def watch(monkeypatch: pytest.MonkeyPatch, *, kill: str | None = None) -> list[str]:
    """The names of the cases that are measured from now on; ``kill`` interrupts the measuring of one."""
    measured: list[str] = []
    evaluate_case = Predictor.evaluate_case

    def watched(self: Predictor, case: Case, *args: object, **options: object) -> list[Record]:
        def predicted(*values: object) -> None:
            if case.id == kill:
                raise Killed
            options["on_prediction"](*values)  # type: ignore[operator]

        measured.append(case.id)
        return evaluate_case(self, case, *args, on_prediction=predicted)  # type: ignore[arg-type]

    monkeypatch.setattr(Predictor, "evaluate_case", watched)
    return measured


def interrupt(trained: Path, out: Path, *, at: str) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        watch(patch, kill=at)
        run(*command(trained, out))


def goes_on(
    trained: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *, measured: tuple[str, ...]
) -> str:
    found = watch(monkeypatch)
    code, output = run(*command(trained, out))
    assert code == 0, output
    assert tuple(found) == measured
    return output


@pytest.mark.parametrize("at", NAMES)
def test_the_same_report(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: dict[str, bytes],
    at: str,
) -> None:
    """Pictures, too: they show the first three cases, some of them from before the kill."""
    before = NAMES.index(at)
    interrupt(trained, tmp_path / "out", at=at)
    assert [p.name for p in tmp_path.glob("out/*")] == [UNFINISHED] * (before > 0)
    output = goes_on(trained, tmp_path / "out", monkeypatch, measured=NAMES[before:])
    line = f"{before} of 5 cases were measured before; delete {tmp_path / 'out' / UNFINISHED} to repeat"
    assert (line in output.splitlines()) == (before > 0)
    assert content(tmp_path / "out") == expected


def test_several_kills(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes]
) -> None:
    for at in ("p1", "p1", "p4"):
        interrupt(trained, tmp_path, at=at)
    goes_on(trained, tmp_path, monkeypatch, measured=("p4",))
    assert content(tmp_path) == expected


def test_a_finished_evaluation_is_repeated(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes]
) -> None:
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            goes_on(trained, tmp_path, patch, measured=NAMES)
        assert content(tmp_path) == expected


SIGKILL = """
import os, signal, sys
import torch
from prism_meta.cli import main
from prism_meta.evaluation.predictor import Predictor

torch.set_num_threads(1)
evaluate_case = Predictor.evaluate_case

def killed(self, case, *args, **options):
    if case.id == "p3":
        os.kill(os.getpid(), signal.SIGKILL)
    return evaluate_case(self, case, *args, **options)

Predictor.evaluate_case = killed
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="this system has no SIGKILL")
def test_a_real_kill(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes]
) -> None:
    arguments = [str(argument) for argument in command(trained, tmp_path)]
    ended = subprocess.run(
        [sys.executable, "-c", SIGKILL, *arguments], capture_output=True, timeout=240, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert list(content(tmp_path)) == [UNFINISHED]
    output = goes_on(trained, tmp_path, monkeypatch, measured=("p3", "p4"))
    assert "3 of 5 cases were measured before" in output
    assert content(tmp_path) == expected


@pytest.mark.parametrize("size", [0.3, 0.999])
def test_a_line_that_was_cut_off(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: dict[str, bytes],
    size: float,
) -> None:
    """Only its case is measured again, and the lines that follow are whole."""
    interrupt(trained, tmp_path, at="p2")
    file = tmp_path / UNFINISHED
    *_, last = file.read_bytes().rstrip().splitlines(keepends=True)
    file.write_bytes(file.read_bytes().rstrip()[: -int(len(last) * (1 - size)) - 1])
    interrupt(trained, tmp_path, at="p3")
    goes_on(trained, tmp_path, monkeypatch, measured=("p3", "p4"))
    assert content(tmp_path) == expected


def _weights(folder: Path) -> None:
    other = folder / "other"
    code, _ = run(
        "train", folder / "cases", "--out", other,
        *settings("training.steps=2", 'data.modalities=["flair","t1"]'),
    )  # fmt: skip
    assert code == 0
    name = "weights/last.safetensors"
    (folder / "run" / name).write_bytes((other / name).read_bytes())


def _configuration(folder: Path) -> None:
    path = folder / "run" / "config.toml"
    text = path.read_text()
    assert 'empty = "brats"' in text
    path.write_text(text.replace('empty = "brats"', 'empty = "nan"'))


def _label(folder: Path) -> None:
    path = folder / "cases" / "p1" / "p1_seg.nii.gz"
    os.utime(path, ns=(1, 1))


CHANGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "weights": (_weights, NAMES),
    "configuration": (_configuration, NAMES),
    "label of a case": (_label, ("p1", "p3", "p4")),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_has_changed_is_measured_anew(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    for name in ("run", "cases"):
        shutil.copytree(trained / name, tmp_path / name)
    change, measured = CHANGES[what]
    interrupt(tmp_path, tmp_path / "out", at="p3")
    change(tmp_path)
    goes_on(tmp_path, tmp_path / "out", monkeypatch, measured=measured)
    resumed = content(tmp_path / "out")
    code, _ = run(*command(tmp_path, tmp_path / "out"))
    assert code == 0 and content(tmp_path / "out") == resumed


def test_a_case_without_a_picture_gets_one_if_an_earlier_case_is_damaged(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fourth case was measured without its slice, which the report then needs."""
    for name in ("run", "cases"):
        shutil.copytree(trained / name, tmp_path / name)
    interrupt(tmp_path, tmp_path / "out", at="p4")
    cut(tmp_path / "cases" / "p1" / "p1_t1.nii.gz")
    found = watch(monkeypatch)
    code, output = run(*command(tmp_path, tmp_path / "out"))
    assert code == 2 and errors(output)[0].startswith("case p1: ")
    assert [name for name in found if name != "p1"] == ["p3", "p4"]
    resumed = content(tmp_path / "out")
    assert json.loads(resumed["summary.json"])["overall"]["cases"] == 4
    assert run(*command(tmp_path, tmp_path / "out"))[0] == 2
    assert content(tmp_path / "out") == resumed


#: With p1 gone, p3 is one of the three worst cases.
DICE = {"p0": 0.9, "p1": 0.1, "p2": 0.2, "p3": 0.95, "p4": 0.99}


@pytest.mark.usefixtures("without_drawing")
def test_a_case_without_planes_gets_them_if_a_worse_case_is_damaged(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("run", "cases"):
        shutil.copytree(trained / name, tmp_path / name)
    evaluate_case = Predictor.evaluate_case

    def scored(self: Predictor, case: Case, **options: Any) -> list[Record]:
        return [replace(r, dice=DICE[case.id]) for r in evaluate_case(self, case, **options)]

    monkeypatch.setattr(Predictor, "evaluate_case", scored)
    # One slice, so that no case is measured for its slice's sake.
    monkeypatch.setattr(evaluating, "OverlayCollector", lambda: OverlayCollector(1))
    interrupt(tmp_path, tmp_path / "out", at="p4")
    cut(tmp_path / "cases" / "p1" / "p1_t1.nii.gz")
    with pytest.MonkeyPatch.context() as patch:
        found = watch(patch)
        assert run(*command(tmp_path, tmp_path / "out"))[0] == 2
    assert [name for name in found if name != "p1"] == ["p3", "p4"]
    page = content(tmp_path / "out")["report.html"].decode()
    assert re.findall(r'alt="(p\d), axial: ', page) == ["p2", "p0", "p3"]
    resumed = content(tmp_path / "out")
    assert run(*command(tmp_path, tmp_path / "out"))[0] == 2
    assert content(tmp_path / "out") == resumed


def test_a_file_that_cannot_be_read(trained: Path, tmp_path: Path) -> None:
    (tmp_path / UNFINISHED).mkdir()
    code, output = run(*command(trained, tmp_path))
    assert code == 2
    assert errors(output) == [
        f"cannot write {tmp_path / UNFINISHED}: is a directory; remove it, or choose another folder"
    ]


def test_a_report_among_the_cases_is_no_case_while_it_is_unfinished(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("run", "cases"):
        shutil.copytree(trained / name, tmp_path / name)
    out = tmp_path / "cases" / "report"
    interrupt(tmp_path, out, at="p4")
    goes_on(tmp_path, out, monkeypatch, measured=("p4",))
