"""The command ``prism-meta profile``: its tables, its JSON and where the size of a case comes from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import errors, run, run_json, settings
from niftis import write_cases

from prism_meta.bilevel.strategies import ALL_STRATEGIES
from prism_meta.training.profiling import profile as profiling
from prism_meta.training.profiling.size import typical_size
from prism_meta.training.run import Run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    cases = write_cases(folder / "cases", 3)
    options = settings("training.steps=1", "data.holdout=1")
    code, output = run("train", cases, "--out", folder / "run", *options)
    assert code == 0, output
    return folder / "run"


#: Keys of a time.
SECONDS = {"median", "low", "high", "rounds"}


def schema(value: Any) -> Any:
    """Types instead of values; a list has the schema of its first entry."""
    if isinstance(value, dict):
        return {key: schema(each) for key, each in value.items()}
    if isinstance(value, list):
        return [schema(each) for each in value[:1]]
    return type(value).__name__


def test_the_json_has_all_numbers(trained: Path) -> None:
    code, told, notes = run_json(
        "profile",
        trained,
        "--repeats",
        2,
        "--subsets",
        "t2+flair, t1",
        "--strategies",
        "first_order",
    )
    assert code == 0, notes
    seconds = {"median": "float", "low": "float", "high": "float", "rounds": ["float"]}
    work = {"flops": "int", "memory": "int", "allocated": "NoneType"}
    assert schema({**told, "machine": {**told["machine"], "versions": {}}}) == {
        "run": "str",
        "weights": "str",
        "network": "str",
        "parameters": "int",
        "machine": {"device": "str", "name": "str", "threads": "int", "versions": {}},
        "seed": "int",
        "rounds": "int",
        "prediction": {
            "subsets": [
                {
                    "subset": "str",
                    "modalities": "int",
                    "window": seconds,
                    "case": seconds,
                    "case_seconds": "float",
                    "window_flops": "int",
                    "case_flops": "int",
                    "work": work,
                }
            ],
            "shape": ["int"],
            "shape_source": "str",
            "patch": ["int"],
            "windows": "int",
            "batch": "int",
            "case_measured": "bool",
        },
        "training": {
            "strategies": [
                {
                    "strategy": "str",
                    "fault": "NoneType",
                    "step": seconds,
                    "ratio": "float",
                    "work": work,
                }
            ],
            "patch": ["int"],
            "batch_size": "int",
            "inner_steps": "int",
            "episodes": "int",
        },
    }
    assert [each["subset"] for each in told["prediction"]["subsets"]] == ["t1", "flair+t2"]
    assert [each["strategy"] for each in told["training"]["strategies"]] == ["first_order"]
    assert {"python", "torch", "prism-meta"} <= told["machine"]["versions"].keys()
    assert (told["run"], told["weights"], told["rounds"]) == (str(trained), "last", 2)
    assert all(len(each["window"]["rounds"]) == 2 for each in told["prediction"]["subsets"])


def test_the_tables_name_every_subset_and_strategy(trained: Path) -> None:
    code, output = run("profile", trained, "--only", "predict", "--repeats", 2)
    assert code == 0, output
    assert sum(line.split()[:1] == ["flair+t1ce+t1+t2"] for line in output.splitlines()) == 1
    assert "The ratio compares cases with flair+t1ce+t1+t2" in " ".join(output.split())
    assert "Training" not in output and "median of 1 held-out case" in output
    code, output = run(
        "profile", trained, "--only", "train", "--repeats", 2, "--strategies", "single_level"
    )
    assert code == 0, output
    assert "single_level" in output and "Prediction" not in output and "second_order" not in output


def test_a_long_case_is_estimated(trained: Path) -> None:
    code, output = run(
        "profile", trained, "--only", "predict", "--repeats", 2, "--subsets", "t1", "--shape",
        "2000x2000x900", "--limit", "1s",
    )  # fmt: skip
    assert code == 0, output
    text = " ".join(output.split())
    assert "case, estimated" in text and "A case has 55800900 windows (given), 16 in each" in text
    assert "--limit gives more time" in text


def test_the_size_is_that_of_the_held_out_cases(trained: Path, tmp_path: Path) -> None:
    opened = Run.open(trained)
    found = typical_size(opened)
    assert found.source == "median of 1 held-out case" and found.shape == (20, 24, 16)
    opened.facts["test"] = []
    assert typical_size(opened).source == "median of 2 training cases"
    opened.facts["data"] = str(tmp_path / "gone")
    gone = typical_size(opened)
    assert gone.shape == (240, 240, 155) and "no header of a case can be read" in gone.source


def test_the_help_lists_the_strategies() -> None:
    code, output = run("profile", "--help")
    assert code == 0 and "Examples" in output
    said = "".join(output.replace("│", " ").split())
    assert ",".join(kind.name for kind in ALL_STRATEGIES) in said


def test_a_run_that_did_not_end(trained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    shutil.rmtree(folder / "weights")
    code, output = run("profile", folder)
    assert code == 2 and errors(output) == [
        f"{folder}: the training has not ended (no weights/last.safetensors); continue it with prism-meta "
        f"train --resume {folder}"
    ]


def test_not_enough_memory_is_one_line(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        )

    monkeypatch.setattr(profiling, "profile_prediction", fail)
    code, output = run("profile", trained)
    assert code == 2 and errors(output) == [
        f"{trained}: predictions need more memory than is free; profile it on a machine with more memory, "
        "or give a smaller --shape or --limit"
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--subsets", "flair+pet,t1"],
            "subsets: 'flair+pet' is no subset of the modalities; join different ones of flair, t1ce, t1, "
            "t2 by +",
        ),
        (["--subsets", " , "], "subsets: got ' , '; give at least one subset, e.g. flair+t1ce"),
        (["--subsets", "t1,t1"], "subsets: 't1,t1' has one of them twice; give each once"),
        (
            ["--strategies", "reptil"],
            "strategies: unknown strategy 'reptil'; use some of single_level, joint, first_order, "
            "second_order, reptile, finite_difference, implicit",
        ),
        (
            ["--shape", "160x192"],
            "shape: got '160x192'; give three numbers of voxels, e.g. 160x192x144",
        ),
    ],
)
def test_arguments_that_make_no_sense(trained: Path, options: list[str], expected: str) -> None:
    code, output = run("profile", trained, *options)
    assert code == 2 and errors(output) == [expected]
