"""The notebooks of docs/examples run, and what is saved in them is complete."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
NOTEBOOKS = sorted((DOCS / "examples").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_four() -> None:
    assert len(NOTEBOOKS) == 4


@each_notebook
def test_saved_output_is_complete_and_names_no_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert sum(bool(cell["outputs"]) for cell in code) >= 2
    for cell in code:
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            shown = json.dumps({k: v for k, v in output.items() if k != "data"})
            shown += json.dumps(output.get("data", {}).get("text/plain", ""))
            assert not re.search(r"/\w+/[\w.-]+/|[A-Z]:\\\\", shown), f"a path: {shown}"


@pytest.mark.slow
@each_notebook
def test_a_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Kernels that share the cores with other tests are faster with one thread each.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pytest.importorskip("nbclient", reason="pip install 'prism-meta[test]'")
    pytest.importorskip("ipykernel", reason="pip install 'prism-meta[test]'")
    execute: Any = runpy.run_path(str(DOCS / "run_notebooks.py"))["execute"]
    done = execute(path)  # raises if a cell does
    assert all(cell.execution_count for cell in done.cells if cell.cell_type == "code")
