"""The wheel and the source distribution, the version, and the command line of an installation."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import tomlkit

import prism_meta as pm

ROOT = Path(__file__).parents[2]
PROJECT = tomlkit.parse((ROOT / "pyproject.toml").read_text(encoding="utf-8")).unwrap()["project"]
#: Files of the package that are no modules.
DATA = [
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "prism_meta").rglob("*")
    if path.is_file() and path.suffix not in (".py", ".pyc")
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both distributions, built from a copy without network."""
    setuptools = pytest.importorskip(
        "setuptools", minversion="77", reason="pip install 'setuptools>=77', which builds the wheel"
    )
    assert setuptools is not None
    copy = tmp_path_factory.mktemp("build") / "copy"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    code = (
        "from setuptools import build_meta as b; b.build_wheel('../out'); b.build_sdist('../out')"
    )
    (copy.parent / "out").mkdir()
    subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, check=True)
    return copy.parent / "out"


def test_the_wheel_has_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        metadata = message_from_bytes(
            archive.read(f"prism_meta-{PROJECT['version']}.dist-info/METADATA")
        )
        entry = archive.read(f"prism_meta-{PROJECT['version']}.dist-info/entry_points.txt")
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "prism_meta").rglob("*.py")}
    assert set(names) == {*modules, *DATA}
    assert {"prism_meta/py.typed", "prism_meta/__init__.pyi"} <= set(DATA)
    assert b"prism-meta = prism_meta.cli:main" in entry
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    urls = dict(url.split(", ", 1) for url in metadata.get_all("Project-URL") or [])
    assert urls == PROJECT["urls"] and len(urls) >= 4


def test_the_source_distribution_has_what_its_tests_need(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    needed = {
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "pyproject.toml",
    }
    needed |= {"tests/conftest.py", "docs/mathematics.md", "benchmarks/measuring.py", *DATA}
    assert needed <= names
    assert not [name for name in names if name.endswith(".pyc") or "/." in f"/{name}"]


def test_every_dependency_has_a_lower_bound() -> None:
    """And none an upper one without a reason, which would keep users from newer releases."""
    for text in PROJECT["dependencies"]:
        assert re.fullmatch(r"[\w-]+>=[\d.]+", text), text


def test_the_versions_agree() -> None:
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited is not None and cited[1] == PROJECT["version"] == pm.__version__


def test_the_command_says_its_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prism_meta", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"prism-meta {pm.__version__}\n"
