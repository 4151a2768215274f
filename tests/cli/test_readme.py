"""The README's Python examples run as they stand."""

from __future__ import annotations

import importlib.util
import re
import runpy
from pathlib import Path

import pytest

from prism_meta.integrations.learn2learn import INSTALL

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_an_example_runs(block: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "learn2learn" in block and importlib.util.find_spec("learn2learn") is None:
        pytest.skip(f"learn2learn is not installed: {INSTALL}")
    script = tmp_path / "example.py"
    script.write_text(block, encoding="utf-8")
    runpy.run_path(str(script))
    if "print(" in block:
        assert capsys.readouterr().out.strip()


def test_first_becomes_second_order_by_one_word(tmp_path: Path) -> None:
    (block,) = (b for b in BLOCKS if "pm.FirstOrder(pm.SGD(lr=0.05))" in b)
    script = tmp_path / "example.py"
    results = {}
    for word in ("FirstOrder", "SecondOrder"):
        script.write_text(block.replace("pm.FirstOrder", f"pm.{word}"), encoding="utf-8")
        learner = runpy.run_path(str(script))["learner"]
        results[type(learner.strategy).__name__] = next(learner.model.parameters()).sum().item()
    assert results.keys() == {"FirstOrder", "SecondOrder"}
