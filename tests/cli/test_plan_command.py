"""The command ``prism-meta plan``, and what ``train`` plans without settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import errors, run
from niftis import write_cases

from prism_meta.training.config import load_config
from prism_meta.training.planning import plan as planning
from prism_meta.training.planning import result as plan_result
from prism_meta.training.planning import search as plan_search

pytestmark = pytest.mark.usefixtures("memory_by_voxels")


def test_it_writes_a_configuration_that_trains(cases: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.toml"
    code, output = run(
        "plan", cases, "--memory", "1.2GB", "--time", "1h", "--out", out, "-s", "seed=3",
        "-s", "model.network=unet", "-s", "fabric.accelerator=cpu",
    )  # fmt: skip
    assert code == 0, output
    assert f"configuration in {out}; train with: prism-meta train {cases} -c {out}" in " ".join(
        output.split()
    )
    config = load_config(out)
    assert (config.seed, config.model.network) == (3, "unet")
    assert config.training.steps > 1 and "training.steps" in output
    assert len(config.data.patch) == 3 and config.data.spacing == (1.0, 1.0, 1.0)
    code, output = run(
        "train", cases, "-c", out, "-s", "training.steps=1", "--out", tmp_path / "run"
    )
    assert code == 0, output


def test_train_without_sizes_plans(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "device_kind", lambda accelerator: "cpu")
    monkeypatch.setattr(planning, "ON_CPU", 8 * 10**8)
    monkeypatch.setattr(plan_result, "OUTSIDE", {"cpu": 690 * 10**6})
    for module in (planning, plan_search):
        monkeypatch.setattr(module, "preparation", lambda config, found: 0)
    code, output = run(
        "train", cases, "--out", tmp_path / "run", "-s", "seed=4", "--time-limit", "1s"
    )
    assert code in (0, 143), output
    said = " ".join(output.split())
    assert "planned for 800.0 MB of memory: data.spacing = [1.0, 1.0, 1.0], data.patch = " in said
    assert (
        "prism-meta plan says why; give --config, or set one of these keys, to choose yourself"
        in said
    )
    if (tmp_path / "run" / "run.json").exists():
        facts = json.loads((tmp_path / "run" / "run.json").read_text())
        assert facts["config"]["data"]["spacing"] == [1.0, 1.0, 1.0] and facts["seed"] == 4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--memory", "x"], "memory: got 'x'; give a size such as 10GB or 800MB"),
        (["--memory", "0"], "memory: got '0'; give a size such as 10GB or 800MB"),
        (["--memory", "-3GB"], "memory: got '-3GB'; give a size such as 10GB or 800MB"),
        (["--memory", "nan"], "memory: got 'nan'; give a size such as 10GB or 800MB"),
        (["--memory", "1e400GB"], "memory: got '1e400GB'; give a size such as 10GB or 800MB"),
        (
            ["--time", "soon"],
            "time limit: got 'soon'; give days, hours, minutes or seconds, e.g. 11h30m",
        ),
    ],
)
def test_sizes_that_are_none(
    cases: Path, tmp_path: Path, options: list[str], expected: str
) -> None:
    code, output = run("plan", cases, *options, "--out", tmp_path / "plan.toml")
    assert code == 2 and errors(output) == [expected]
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(cases: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.toml"
    out.write_text("seed = 1")
    code, output = run("plan", cases, "--out", out)
    assert code == 2 and errors(output) == [
        f"{out}: exists already; give another --out, or remove it"
    ]
    assert out.read_text() == "seed = 1"


def test_faults_of_the_cases_come_first(tmp_path: Path) -> None:
    root = write_cases(tmp_path / "cases", 3)
    (root / "p1" / "p1_t1.nii.gz").write_bytes(b"no NIfTI")
    (root / "p2" / "p2_seg.nii.gz").unlink()
    code, output = run("plan", root, "--out", tmp_path / "plan.toml")
    assert code == 2 and len(errors(output)) == 2, output
    assert not (tmp_path / "plan.toml").exists()
