"""The examples in the README, in docs/*.md and in docs/examples run, and their tables agree with the code."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import statistics
from pathlib import Path
from typing import Any

import pytest

import prism_meta as pm
from prism_meta.integrations.learn2learn import INSTALL
from prism_meta.training.config.baselines import BASELINES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
SCRIPTS = sorted((ROOT / "docs" / "examples").glob("*.py"))


def blocks_of(page: Path) -> list[str]:
    """The blocks of Python on a page."""
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(blocks_of(page))
]


def run(source: str, tmp_path: Path) -> dict[str, Any]:
    """The names that a script defines; ``source`` runs as a file of its own."""
    script = tmp_path / "example.py"
    script.write_text(source, encoding="utf-8")
    registered = list(pm.ALL_STRATEGIES)
    try:
        return runpy.run_path(str(script))
    finally:
        pm.ALL_STRATEGIES[:] = registered  # without a strategy that an example registers


@pytest.mark.parametrize("block", BLOCKS)
def test_an_example_runs(block: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "learn2learn" in block and importlib.util.find_spec("learn2learn") is None:
        pytest.skip(f"learn2learn is not installed: {INSTALL}")
    run(block, tmp_path)
    if "print(" in block:
        assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_of_docs_examples_runs(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_first_becomes_second_order_by_one_word(tmp_path: Path) -> None:
    (block,) = (b for b in blocks_of(ROOT / "README.md") if "pm.FirstOrder(pm.SGD(lr=0.05))" in b)
    results = {}
    for word in ("FirstOrder", "SecondOrder"):
        learner = run(block.replace("pm.FirstOrder", f"pm.{word}"), tmp_path)["learner"]
        results[type(learner.strategy).__name__] = next(learner.model.parameters()).sum().item()
    assert results.keys() == {"FirstOrder", "SecondOrder"}


def test_the_table_of_strategies_is_the_registry() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| `(\w+)` \| .*? \| ([^|]+) \| [^|]+ \|$", README, re.MULTILINE
    )
    ours = [k for k in pm.ALL_STRATEGIES if k.__module__.startswith("prism_meta.")]
    assert rows == [(k.__name__, k.name, k.units) for k in ours]


def test_the_table_of_baselines_is_complete() -> None:
    (table,) = re.findall(r"\| `--baseline` \|.*?\n\n", README, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", table)) == set(BASELINES)


def results(name: str) -> dict[tuple[str, int], dict[str, Any]]:
    """The methods' measurements in a result of first_vs_second_order.py, by net and K."""
    path = ROOT / "benchmarks" / "results" / f"first_vs_second_order{name}.json"
    every = json.loads(path.read_text(encoding="utf-8"))["results"]
    return {(r["setting"]["net"], r["setting"]["steps"]): r["methods"] for r in every}


def time_ratio(methods: dict[str, Any], method: str, base: str) -> float:
    rounds = zip(methods[method]["seconds"], methods[base]["seconds"], strict=True)
    return statistics.median(a / b for a, b in rounds)


def test_the_measurements_are_those_of_the_results() -> None:
    rows = re.findall(r"^\| ((?:time|memory)[ ,][^|]+) \| (.*) \| [^|]+ \|$", README, re.MULTILINE)
    told = {name: re.findall(r"\d\.\d\d", cells) for name, cells in rows}
    stored, recomputed = "SecondOrder stored", "SecondOrder recomputed"
    one = [results("")[net, 1] for net in ("unet", "prismnet", "segresnet")]
    large = [("_unet_32", "unet"), ("_prismnet_40", "prismnet"), ("_segresnet_64", "segresnet")]
    first, ten = ([results(file)[net, k] for file, net in large] for k in (1, 10))
    small = [results("_prismnet_16_k1")["prismnet", 1], results("_segresnet_24_k1")["segresnet", 1]]
    memory = "peak_mib"
    expected = [
        [time_ratio(m, stored, "FirstOrder") for m in one],
        [time_ratio(m, stored, "higher") for m in one],
        [m[stored][memory] / m["higher"][memory] for m in one],
        [time_ratio(m, recomputed, "higher") for m in ten],
        [m[recomputed][memory] / m["higher"][memory] for m in ten],
        [b[recomputed][memory] / a[recomputed][memory] for a, b in zip(first, ten, strict=True)],
        [time_ratio(m, stored, "learn2learn") for m in small],
    ]
    assert list(told.values()) == [[f"{ratio:.2f}" for ratio in row] for row in expected]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_pictures_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in (t for t in targets if "://" not in t):
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in anchors, f"{page.name} links to {target}"


def test_mathematics_has_every_equation() -> None:
    text = (ROOT / "docs" / "mathematics.md").read_text(encoding="utf-8")
    numbers = [int(n) for n in re.findall(r"^### E(\d+): ", text, re.MULTILINE)]
    assert numbers == list(range(1, 13))
    assert text.count("$$") % 2 == 0
