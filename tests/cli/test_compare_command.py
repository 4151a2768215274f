"""``compare`` and ``report``: names of runs, shared cases, settings that differ, and the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import errors, run
from pages import CASES, records

from prism_meta.cli.comparing import differing_settings, short_names
from prism_meta.records import write_records
from prism_meta.training.config import load_config


def run_folder(folder: Path, *overrides: str, extra: float = 0.0, cases: int = 4) -> Path:
    """What ``compare`` reads of a run."""
    facts = {
        "started": "", "command": ["prism-meta", "train"], "seed": 0, "versions": {}, "data": None,
        "train": {}, "test": [],
        "config": load_config(overrides=list(overrides)).model_dump(mode="json"),
    }  # fmt: skip
    (folder / "evaluation").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(facts))
    kept = [r for r in records(extra) if r.case in CASES[:cases]]
    write_records(folder / "evaluation" / "records.csv", kept)
    return folder


def test_several_runs_and_the_page(tmp_path: Path) -> None:
    a = run_folder(tmp_path / "a")
    b = run_folder(tmp_path / "b", "meta.strategy=reptile", extra=0.05, cases=3)
    c = run_folder(tmp_path / "c", "training.steps=7")
    out = tmp_path / "pages" / "runs.html"
    code, output = run("report", a, b, c, "--out", out)
    assert code == 0 and f"page in {out}" in output
    code, output = run("compare", a, b, c)
    assert code == 0 and "b minus a" in output and "c minus a" in output
    assert (
        "Over the 3 cases that all runs have; left out: a has 1 more (p1); c has 1 more (p1)."
        in output
    )
    html = out.read_text(encoding="utf-8")
    assert all(key in html for key in ("meta.strategy", "reptile", "training.steps", "+5.0*"))
    code, output = run("compare", a, c)
    assert code == 0 and "left out" not in output


def test_settings_that_differ(tmp_path: Path) -> None:
    a = run_folder(tmp_path / "a")
    b = run_folder(tmp_path / "b", "meta.strategy=reptile")
    c = run_folder(tmp_path / "c", "training.steps=7")
    steps = str(load_config().training.steps)
    expected = {
        "meta.strategy": ["single_level", "reptile", "single_level"],
        "training.steps": [steps, steps, "7"],
    }
    assert differing_settings([a, b, c]) == expected
    inside = [a / "evaluation", b / "evaluation" / "records.csv", c]
    assert differing_settings(inside) == expected
    assert differing_settings([a, a]) == {}
    write_records(tmp_path / "alone.csv", records())
    assert differing_settings([a, b, tmp_path / "alone.csv"]) == {}


def test_names_tell_the_runs_apart() -> None:
    assert short_names([Path("x/run"), Path("y/run"), Path("x/run")]) == [
        "x/run",
        "y/run",
        "x/run (2)",
    ]
    assert short_names([Path("a"), Path("a")]) == ["a", "a (2)"]


@pytest.mark.parametrize("what", ["modalities", "regions"])
def test_runs_that_do_not_match(tmp_path: Path, what: str) -> None:
    write_records(tmp_path / "a.csv", records())
    other = [
        r for r in records()
        if ("t2" not in r.subset if what == "modalities" else r.region != "ET")
    ]  # fmt: skip
    write_records(tmp_path / "b.csv", other)
    both = (tmp_path / "a.csv", tmp_path / "b.csv")
    code, output = run("report", *both, "--out", tmp_path / "x.html")
    there = {"modalities": "flair, t1ce, t1", "regions": "WT, TC"}[what]
    wanted = {"modalities": "flair, t1ce, t1, t2", "regions": "WT, TC, ET"}[what]
    assert (code, errors(output)) == (
        2,
        [f"b.csv: has {what} {there}, but a.csv has {wanted}; compare runs with the same {what}"],
    )
    assert not (tmp_path / "x.html").exists()
    assert run("compare", *both) == (code, output)
