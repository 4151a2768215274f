"""Installs the wheel in clean environments, and checks there what a new user does first.

    python tools/clean_environments.py build/environments --python python3.10 python3.13

For each Python, and for the lowest and the newest versions of all dependencies, it makes an environment,
installs the wheel, runs ``prism-meta doctor`` and the examples of the README, and measures how long
``import prism_meta`` and ``prism-meta --help`` take, as ratios to ``import torch``. With ``--tests`` it
also runs tests. The results are written to environments.json and as a table to standard output. An
environment that is there is used again, e.g. one with another build of torch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomlkit

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 3
#: Prints the seconds that an import takes.
IMPORT = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def main() -> None:
    """Read the command line, and check one environment after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the environments and the results")
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="Python programs")
    parser.add_argument(
        "--versions", nargs="+", choices=("lowest", "newest"), default=["lowest", "newest"]
    )
    parser.add_argument("--tests", nargs="*", default=[], help="tests to run with pytest")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    wheel = build_wheel(out)
    results = [
        Environment(out, python, versions).check(wheel, options.tests)
        for python in options.python
        for versions in options.versions
    ]
    (out / "environments.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    if any(result["faults"] for result in results):
        raise SystemExit(1)


def build_wheel(out: Path) -> Path:
    """Build the wheel from a copy of the checkout, which stays clean."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignored)
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", out, copy]
        subprocess.run(command, check=True)
    return max(out.glob("prism_meta-*.whl"), key=lambda path: path.stat().st_mtime)


def lowest() -> list[str]:
    """The lower bounds of all dependencies as constraints of pip."""
    project = tomlkit.parse((ROOT / "pyproject.toml").read_text(encoding="utf-8")).unwrap()[
        "project"
    ]
    bounds = [re.match(r"([\w-]+)>=([\w.]+)", text) for text in project["dependencies"]]
    return [f"{bound[1]}=={bound[2]}" for bound in bounds if bound is not None]


class Environment:
    """A virtual environment with one Python and one choice of versions."""

    def __init__(self, out: Path, python: str, versions: str) -> None:
        self.versions, self.faults = versions, list[str]()
        said = subprocess.run([python, "--version"], capture_output=True, text=True, check=True)
        self.python = said.stdout.split()[1]
        self.folder = out / f"python{self.python}-{versions}"
        if not self.folder.exists():
            subprocess.run([python, "-m", "venv", self.folder], check=True)
        self.programs = self.folder / ("Scripts" if os.name == "nt" else "bin")

    def check(self, wheel: Path, tests: Sequence[str]) -> dict[str, Any]:
        """Install and measure; what fails is a fault, and the rest goes on."""
        result: dict[str, Any] = {"python": self.python, "versions": self.versions}
        self.install(wheel, ["pytest", "higher", "einops"] if tests else [])
        doctor = self.run("prism-meta", "doctor", "--json")
        if doctor is not None:
            told = json.loads(doctor)
            packages = [package for package in told["packages"] if not package["extra"]]
            result["packages"] = {package["name"]: package["version"] for package in packages}
            result["doctor"] = {test["name"]: test["seconds"] for test in told["self_test"]}
        result["examples"] = self.examples()
        result |= self.ratios()
        if tests:
            start = time.perf_counter()
            # Old packages use what newer packages that they need have deprecated.
            warn = ["-W", "default"] if self.versions == "lowest" else []
            output = self.run("pytest", "-q", "-p", "no:cacheprovider", *warn, *tests)
            result["tests"] = (output or "failed").strip().splitlines()[-1]
            result["tests_seconds"] = round(time.perf_counter() - start)
        return {**result, "faults": self.faults}

    def install(self, wheel: Path, more: Sequence[str]) -> None:
        """Install the wheel and its dependencies."""
        constraints: list[object] = []
        if self.versions == "lowest":
            file = self.folder / "lowest.txt"
            file.write_text("\n".join(lowest()) + "\n")
            constraints = ["-c", file]
        self.run("python", "-m", "pip", "install", "--quiet", *constraints, wheel, *more)

    def examples(self) -> str:
        """Run the Python blocks of the README, but those that need an optional package."""
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        blocks = [block for block in blocks if "learn2learn" not in block]
        passed = 0
        for block in blocks:
            with tempfile.TemporaryDirectory() as folder:
                script = Path(folder) / "example.py"
                script.write_text(block, encoding="utf-8")
                passed += self.run("python", script) is not None
        return f"{passed} of {len(blocks)}"

    def ratios(self) -> dict[str, float | None]:
        """Seconds of ``import torch``, and the others as ratios to it; minima of several rounds."""
        best: dict[str, float] = {}
        for _ in range(ROUNDS):
            for module, env in (
                ("torch", {}),
                ("prism_meta", {}),
                ("prism_meta", {"EAGER_IMPORT": "1"}),
            ):
                name = module + "".join(env)
                seconds = self.run("python", "-c", IMPORT.format(module), env=env)
                best[name] = min(best.get(name, 1e9), float(seconds or "nan"))
            start = time.perf_counter()
            self.run("prism-meta", "--help")
            best["help"] = min(best.get("help", 1e9), time.perf_counter() - start)
        return {
            "import_torch_seconds": round(best["torch"], 2),
            "import_ratio": round(best["prism_meta"] / best["torch"], 3),
            "import_all_ratio": round(best["prism_metaEAGER_IMPORT"] / best["torch"], 2),
            "help_seconds": round(best["help"], 2),
            "help_ratio": round(best["help"] / best["torch"], 2),
        }

    def run(
        self, program: str, *arguments: object, env: dict[str, str] | None = None
    ) -> str | None:
        """Standard output of a program of the environment; None, and a fault, if it fails."""
        words = [str(self.programs / program), *map(str, arguments)]
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            cwd=ROOT if program == "pytest" else self.folder,
            env={**os.environ, **(env or {})},
            check=False,
        )
        if done.returncode == 0:
            return done.stdout
        said = (done.stdout[-3000:] + done.stderr[-3000:]).strip()
        self.faults.append(f"{program} {' '.join(words[1:4])}: {said}")
        print(f"python {self.python}, {self.versions}: {self.faults[-1]}", file=sys.stderr)
        return None


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown."""
    columns = (
        "python", "versions", "examples", "import_torch_seconds", "import_ratio", "import_all_ratio",
        "help_seconds", "help_ratio", "tests",
    )  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for result in results:
        lines.append("| " + " | ".join(str(result.get(name, "-")) for name in columns) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
