"""The site builds strictly, links hold, every public name has an entry, and nothing comes from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import prism_meta as pm

ROOT = Path(__file__).parents[2]
PICTURES: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "pictures.py"))["PICTURES"]
pytestmark = pytest.mark.slow


class Page(HTMLParser):
    """The ids of a page, its links, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attrs if value is not None}
        self.ids |= {found[key] for key in ("id", "name") if key in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag == "link" and found.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loads.append(found["href"])
        if "src" in found:
            self.loads.append(found["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once."""
    for module in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install 'prism-meta[docs]'")
    out = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(out),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}


def test_links_and_anchors_hold(pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            found = pages.get(target)
            if not target.exists() or (
                parts.fragment and found and parts.fragment not in found.ids
            ):
                broken.append(f"{path.name}: {link}")
    assert not broken
    assert sum(len(page.links) for page in pages.values()) > 1000


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    """Hospital networks have no way out, and the site can be opened from a folder."""
    for path, page in pages.items():
        assert page.loads
        for load in page.loads:
            parts = urlsplit(load)
            assert parts.scheme in ("", "data"), f"{path.name} loads {load}"
            assert not parts.netloc, f"{path.name} loads {load}"
            if not parts.scheme:
                assert (path.parent / unquote(parts.path)).exists(), f"{path.name} lacks {load}"


def test_every_public_name_has_an_entry(site: Path, pages: dict[Path, Page]) -> None:
    ids = set().union(*(page.ids for path, page in pages.items() if path.parent.name == "api"))
    wanted = {f"prism_meta.{name}" for name in pm.__all__ if name != "losses"}
    wanted |= {f"prism_meta.objective.losses.{name}" for name in pm.losses.__all__}
    assert not wanted - ids


def test_formulas_are_mathml(pages: dict[Path, Page], site: Path) -> None:
    text = (site / "mathematics.html").read_text(encoding="utf-8")
    assert text.count("<math") > 100
    assert "arithmatex" not in text


def test_tables_are_filled_in(pages: dict[Path, Page], site: Path) -> None:
    text = (site / "choose.html").read_text(encoding="utf-8")
    assert (
        "<!--"
        not in re.sub(r"(?s)<head>.*?</head>", "", text).split("<article")[1].split("</article")[0]
    )
    for kind in pm.ALL_STRATEGIES:
        assert f"<code>{kind.name}</code>" in text


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_what_its_script_draws(name: str) -> None:
    drawn = (ROOT / "docs" / "images" / f"{name}.svg").read_text(encoding="utf-8")
    assert drawn == PICTURES[name](), "run python docs/pictures.py"
