"""The command ``prism-meta cases``: its tables, its JSON and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import errors, run, settings
from niftis import cut, write_case, write_cases
from typer.testing import CliRunner

from prism_meta.cli.commands import app


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three cases; the first lacks t2, and the second flair."""
    for k, missing in enumerate((("t2",), ("flair",), ("t1", "t2"))):
        write_case(tmp_path / "cases" / f"p{k}", missing=missing, seed=k)
    return tmp_path / "cases"


def test_the_tables(root: Path) -> None:
    code, output = run("cases", root, *settings())
    assert code == 0 and not errors(output)
    lines = [" ".join(line.split()) for line in output.splitlines()]
    assert f"{root}: a folder per case, 3 cases of 3 patients" in lines
    (case,) = (line for line in lines if line.startswith("p0 "))
    assert case.startswith("p0 ● ● ● ○ 20×24×16 1×1×1 3rd ")
    assert "never in one case: flair+t2" in lines
    (modality,) = (line for line in lines if line.startswith("t2 "))
    assert modality.startswith("t2 1 67 % ")


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_terminal(tmp_path: Path, width: int) -> None:
    write_cases(tmp_path, 2)
    for k in range(2):
        (tmp_path / f"p{k}").rename(tmp_path / f"Brats18_TCIA0{k}_378_1")
    result = CliRunner().invoke(
        app, ["cases", str(tmp_path), *settings()], env={"COLUMNS": str(width)}
    )
    table = result.stdout[result.stdout.index("case ") :].splitlines()
    assert any(line.startswith("Brats18_TCIA00_378_1 ") for line in table)
    assert max(map(len, table)) <= width


def test_json_is_all_that_is_on_standard_output(root: Path) -> None:
    result = CliRunner().invoke(app, ["cases", str(root), "--json", *settings()])
    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert [case["case"] for case in found["cases"]] == ["p0", "p1", "p2"]
    assert found["never_together"] == [["flair", "t2"]]
    assert "layout: a folder per case, 3 cases" in result.stderr


def test_faults_come_last_and_the_code_is_2(root: Path) -> None:
    cut(root / "p1" / "p1_t1.nii.gz")
    (root / "p2" / "p2_seg.nii.gz").unlink()
    code, output = run("cases", root, *settings())
    assert code == 2
    assert [fault.split(" ")[1] for fault in errors(output)] == ["p1:", "p2:"]
    assert "✗ p1" in output and "✗ p2" in output and "✗ p0" not in output
    result = CliRunner().invoke(app, ["cases", str(root), "--json", *settings()])
    assert result.exit_code == 2
    assert json.loads(result.stdout)["faults"] == errors(result.stderr)


def test_headers_alone_find_less(root: Path) -> None:
    cut(root / "p1" / "p1_t1.nii.gz")
    code, output = run("cases", root, "--fast", *settings())
    assert code == 0 and "largest voxel" not in output and "Grid of the files" in output


def test_no_cases(tmp_path: Path) -> None:
    code, output = run("cases", tmp_path, "--json")
    assert code == 2
    assert "no case found" in errors(output)[0]
