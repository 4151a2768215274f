"""Runs the notebooks of docs/examples and keeps their output, which the site shows.

python docs/run_notebooks.py [NAME ...]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parent / "examples"


def execute(path: Path, *, timeout: int = 600) -> nbformat.NotebookNode:
    """The notebook with the output of a new kernel, and no times of execution.

    Raises:
        CellExecutionError: a cell raised an error.
    """
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=timeout, resources=where, coalesce_streams=True).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        if cell.cell_type == "code":  # warnings name folders of this machine
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    return notebook


def main() -> None:
    for path in sorted(EXAMPLES.glob("*.ipynb")):
        if len(sys.argv) == 1 or path.stem in sys.argv[1:]:
            begin = time.perf_counter()
            nbformat.write(execute(path), path)
            sys.stdout.write(f"{path.name}: {time.perf_counter() - begin:.0f} s\n")


if __name__ == "__main__":
    main()
