"""The workflow, templates, recipes and citation: they follow their schemas, and agree with the project."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomlkit

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
PROJECT = tomlkit.parse((ROOT / "pyproject.toml").read_text(encoding="utf-8")).unwrap()["project"]
FILES = [
    ("github-workflows", GITHUB / "workflows" / "ci.yml"),
    *(("github-issue-forms", GITHUB / "ISSUE_TEMPLATE" / f"{n}.yml") for n in ("bug", "feature", "question")),
    ("github-issue-config", GITHUB / "ISSUE_TEMPLATE" / "config.yml"),
    ("citation-file-format", ROOT / "CITATION.cff"),
]  # fmt: skip


def parsed(path: Path) -> Any:
    yaml = pytest.importorskip("ruamel.yaml", reason="pip install check-jsonschema")
    return yaml.YAML(typ="safe").load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("schema", "path"), FILES, ids=lambda value: getattr(value, "name", value))
def test_a_file_follows_its_schema(schema: str, path: Path) -> None:
    pytest.importorskip("check_jsonschema", reason="pip install check-jsonschema")
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        f"vendor.{schema}",
        path,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_workflow_covers_what_the_project_promises() -> None:
    jobs = parsed(GITHUB / "workflows" / "ci.yml")["jobs"]
    matrix = jobs["tests"]["strategy"]["matrix"]
    promised = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert matrix["python"] == promised
    assert matrix["os"] == ["ubuntu-latest", "macos-latest", "windows-latest"]
    assert any(step.get("run") == "bash .ci/run" for step in jobs["whole"]["steps"])
    (lowest,) = (s["with"] for s in jobs["lowest"]["steps"] if "setup-python" in s.get("uses", ""))
    assert PROJECT["requires-python"] == f">={lowest['python-version']}"


def test_pre_commit_runs_what_make_lint_runs() -> None:
    (local,) = parsed(ROOT / ".pre-commit-config.yaml")["repos"]
    hooks = {hook["entry"].split()[0].rpartition("/")[2] for hook in local["hooks"]}
    (recipe,) = re.findall(
        r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    assert hooks == set(re.findall(r"\$\(BIN\)/([\w-]+)", recipe))


def test_a_report_of_a_bug_asks_for_doctor() -> None:
    body = parsed(GITHUB / "ISSUE_TEMPLATE" / "bug.yml")["body"]
    (doctor,) = (part for part in body if part.get("id") == "doctor")
    assert (
        "prism-meta doctor" in doctor["attributes"]["label"] and doctor["validations"]["required"]
    )


def test_the_images_are_built_from_what_is_sent_and_run_as_a_user() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    sent = (ROOT / ".dockerignore").read_text().split()
    assert {f"!{name}" for name in copied} <= set(sent) and sent[0] == "*"
    assert [line.split()[1] for line in lines if line.startswith("USER")] == ["prism"]
    recipe = (ROOT / "apptainer.def").read_text()
    (files,) = re.findall(r"^%files\n((?:    .*\n)+)", recipe, re.MULTILINE)
    assert {line.split()[0] for line in files.splitlines()} == copied
    assert all((ROOT / name).exists() for name in copied)
