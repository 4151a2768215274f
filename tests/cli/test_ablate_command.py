"""The command ``prism-meta ablate``: a whole small study on files, interrupted and gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import errors, run, run_json
from filelock import FileLock
from niftis import write_cases

from prism_meta.errors import PrismError
from prism_meta.training.stopping import TrainingStopped
from prism_meta.training.study import runner
from prism_meta.training.study.jobs import Plan
from prism_meta.training.study.results import Results
from prism_meta.training.study.schema import read_study
from prism_meta.training.study.work import run_job

STUDY = """
data = "{cases}"
folds = 2
seeds = 2
evaluations = 8
[settings.data]
spacing = [1, 1, 1]
patch = [16, 16]
batch_size = 2
[settings.model]
network = "unet"
width = 2
depth = 2
[settings.objective]
unimodal = false
[search]
validation = 1
evaluations = 2
[[methods]]
name = "one level"
[methods.settings.meta]
strategy = "single_level"
[methods.search]
"training.lr" = [0.01, 0.001]
[[methods]]
name = "two levels"
[methods.settings.meta]
strategy = "second_order"
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_cases(folder / "cases", 6)
    path = folder / "small.toml"
    path.write_text(STUDY.format(cases=folder / "cases"))
    return path


@pytest.fixture(scope="module")
def whole(study: Path) -> Path:
    """The folder of a study that ran without an interruption."""
    out = study.parent / "whole"
    code, output = run("ablate", study, "--out", out, "--jobs", 1)
    assert code == 0, output
    assert "runs made, 0 left" in output and f"report in {out / 'study.html'}" in output
    return out


def _numbers(folder: Path) -> dict[str, Any]:
    """The results, without times, which differ, and what follows from them."""
    return {
        key: (result.title, result.scores, result.validation, result.curves)
        for key, result in Results(folder).items()
        if not result.title.endswith("time")
    }


def test_every_case_is_tested_once_per_seed(whole: Path) -> None:
    tested: dict[str, list[str]] = {}
    for result in Results(whole).values():
        if result.title.endswith("evaluations"):
            method, seed = result.title.split("  ")[0], result.title.split("seed ")[1].split()[0]
            tested.setdefault(method + seed, []).extend(result.scores)
    assert len(tested) == 4
    assert {tuple(sorted(names)) for names in tested.values()} == {tuple(f"p{i}" for i in range(6))}


def test_nothing_of_a_run_is_left(whole: Path) -> None:
    assert list((whole / "work").iterdir()) == []


def test_the_search_is_in_the_report(whole: Path) -> None:
    page = (whole / "study.html").read_text()
    assert "training.lr = 0.001" in page and "The search of each method" in page


def test_a_finished_study_makes_no_run(study: Path, whole: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(runner, "run_job", None)
    before = (whole / "runs.jsonl").read_bytes()
    code, output = run("ablate", study, "--out", whole)
    assert code == 0 and "0 runs made, 0 left" in output
    assert (whole / "runs.jsonl").read_bytes() == before


@pytest.mark.slow
def test_an_interrupted_study_ends_with_the_same_scores(
    study: Path, whole: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    made, job = 0, runner.run_job

    def interrupted(*given: Any, **more: Any) -> Any:
        nonlocal made
        made += 1
        if made == 4:
            raise KeyboardInterrupt
        return job(*given, **more)

    monkeypatch.setattr(runner, "run_job", interrupted)
    code, output = run("ablate", study, "--out", tmp_path, "--jobs", 1)
    assert code == 130 and "run the same command again" in output
    assert len(Results(tmp_path)) == 3
    code, output = run("ablate", study, "--out", tmp_path, "--jobs", 1)
    assert code == 0, output
    assert _numbers(tmp_path) == _numbers(whole)


def test_a_stopped_run_goes_on_in_a_relative_folder(
    study: Path, whole: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("study")
    job = Plan(read_study(study), Results(folder)).due()[0]
    answers = iter([False] * 3)
    with pytest.raises(TrainingStopped):
        run_job(job, study.parent / "cases", folder, should_stop=lambda: next(answers, True))
    assert (folder / "work" / job.key / "run.json").exists()
    expected = Results(whole)[job.key]
    results = Results(folder)
    results.append(run_job(job, study.parent / "cases", folder))
    made = Results(folder)[job.key]
    assert (made.scores, made.validation) == (expected.scores, expected.validation)


@pytest.mark.slow
def test_a_run_that_fails_stops_no_other_and_is_told(
    study: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    job = runner.run_job

    def failing(one: Any, *given: Any, **more: Any) -> Any:
        if one.method == "two levels" and one.seed == 0:
            raise PrismError("step 3: train_loss is nan; use a smaller rate")
        return job(one, *given, **more)

    monkeypatch.setattr(runner, "run_job", failing)
    code, output = run("ablate", study, "--out", tmp_path, "--jobs", 1)
    assert code == 2
    assert errors(output) == [
        f"two levels  all  seed 0 fold {fold}  evaluations: step 3: train_loss is nan; use a smaller rate"
        for fold in (0, 1)
    ]
    assert "two levels" in (tmp_path / "study.md").read_text()  # of the other seed


def test_runs_of_another_process_are_left_to_it_and_others_are_made(
    study: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Also if the first runs, as many as are planned at once, are all taken."""
    monkeypatch.setattr(runner, "_WAVE", 1)
    known = Plan(read_study(study), Results(tmp_path)).due()
    (tmp_path / "work").mkdir()
    with FileLock(tmp_path / "work" / f"{known[0].key}.lock"):
        code, output = run("ablate", study, "--out", tmp_path, "--jobs", 1)
    assert code == 0 and "runs made, 1 left" in output
    made = set(Results(tmp_path))
    assert known[0].key not in made and {job.key for job in known[1:]} <= made


def test_list_says_what_is_to_come(study: Path, tmp_path: Path) -> None:
    code, output = run("ablate", study, "--out", tmp_path / "none", "--list")
    assert code == 0 and not (tmp_path / "none").exists()
    assert "to do one level  all  seed 10000  search" in output
    assert "0 of 6 runs are made" in output


def test_no_time_makes_no_run(study: Path, tmp_path: Path) -> None:
    code, output = run("ablate", study, "--out", tmp_path, "--report")
    assert code == 2
    assert errors(output) == [f"{tmp_path}: has no run with scores yet; let the study run longer"]


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--jobs", "0"], "invalid value for '--jobs': "),
        (
            ["--time", "soon"],
            "time limit: got 'soon'; give days, hours, minutes or seconds, e.g. 11h30m",
        ),
    ],
)
def test_bad_options(study: Path, tmp_path: Path, arguments: list[str], fault: str) -> None:
    code, output = run("ablate", study, "--out", tmp_path / "out", *arguments)
    assert code == 2 and errors(output)[0].startswith(fault)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_study(tmp_path: Path) -> None:
    code, output = run("ablate", tmp_path / "none.toml", "--out", tmp_path / "out")
    assert code == 2
    assert errors(output) == [
        f"{tmp_path / 'none.toml'}: cannot be read as TOML (No such file or directory); correct the file"
    ]


def test_results_are_valid_lines(whole: Path) -> None:
    lines = (whole / "runs.jsonl").read_text().splitlines()
    assert all(set(json.loads(line)) >= {"key", "scores", "seconds", "machine"} for line in lines)


def test_the_json_of_a_study(study: Path, whole: Path) -> None:
    code, found, _ = run_json("ablate", study, "--out", whole, "--report")
    assert code == 0 and Path(found["report"]) == whole / "study.html"
    table = found["tables"][0]
    assert [row["method"] for row in table["methods"]] == ["one level", "two levels"]
    assert table["methods"][0]["against_reference"] is None
    against = table["methods"][1]["against_reference"]
    assert against["seeds"] == 2 and set(against["mean"]) == {"mean", "low", "high", "cases"}
    code, found, _ = run_json("ablate", study, "--out", whole, "--list")
    assert code == 0 and found["made"] == len(found["runs"]) > 0
