"""What is imported when, and how long that takes compared with torch."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time

import pytest

import prism_meta as pm

#: Optional or heavy packages, which are imported where they are used.
HEAVY = (
    "monai", "scipy.ndimage", "scipy.stats", "matplotlib", "pandas", "lightning_fabric",
    "pytorch_lightning", "lightning", "joblib", "jinja2", "mlflow", "wandb", "tensorboard", "learn2learn",
    "higher", "onnx", "onnxruntime", "huggingface_hub", "IPython", "PIL", "sklearn",
)  # fmt: skip
ROUNDS = 2


def python(code: str, **environment: str) -> str:
    """Standard output of a new Python."""
    env = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    return done.stdout


def imported(code: str, **environment: str) -> set[str]:
    """The modules that a new Python has imported after ``code``."""
    return set(python(f"import sys\n{code}\nprint(*sys.modules)", **environment).split())


def seconds(module: str, **environment: str) -> float:
    """How long an import takes in a new Python."""
    code = f"import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
    return float(python(code, **environment))


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert not imported("import prism_meta") & {"torch", "numpy", "nibabel", "rich", *HEAVY}


def test_importing_the_whole_api_imports_torch_and_nothing_heavier() -> None:
    everything = imported("import prism_meta", EAGER_IMPORT="1")
    assert "torch" in everything and not everything & set(HEAVY)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "from prism_meta.cli import main\nsys.argv = ['prism-meta', '--help']\n"
        "try: main()\nexcept SystemExit: pass"
    )
    assert not imported(code) & {"torch", "numpy", "pydantic", "tomlkit", *HEAVY}


def test_imports_and_help_are_fast() -> None:
    """The whole API in less than twice the time of torch, and the help in a fraction of it."""
    torch, api, help_ = [], [], []
    for _ in range(ROUNDS):
        torch.append(seconds("torch"))
        api.append(seconds("prism_meta", EAGER_IMPORT="1"))
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "prism_meta", "--help"], capture_output=True, check=True
        )
        help_.append(time.perf_counter() - start)
    assert min(api) < 2 * min(torch), (api, torch)
    assert min(help_) < 0.6 * min(torch), (help_, torch)


EACH_ALONE = """
import pkgutil, sys
import torch, prism_meta
names = [m.name for m in pkgutil.walk_packages(prism_meta.__path__, "prism_meta.")]
others = {name for name in sys.modules}
for name in names:
    if name == "prism_meta.__main__":
        continue
    for loaded in [n for n in sys.modules if n.partition(".")[0] == "prism_meta"]:
        del sys.modules[loaded]
    __import__(name)
print(len(names))
"""


@pytest.mark.slow
def test_each_module_can_be_imported_first() -> None:
    """The API used to be imported before any module, in one order, which would hide a cycle."""
    assert int(python(EACH_ALONE).splitlines()[-1]) > 200


@pytest.mark.parametrize("name", pm.__all__)
def test_a_name_of_the_api(name: str) -> None:
    found = getattr(pm, name)
    assert name in dir(pm)
    if isinstance(found, type):
        assert found.__name__ == name and pickle.loads(pickle.dumps(found)) is found


def test_no_module_is_shadowed() -> None:
    code = (
        "import pkgutil, types, prism_meta as pm\n"
        "names = [m.name for m in pkgutil.iter_modules(pm.__path__) if m.name != '__main__']\n"
        "assert not set(names) & set(pm.__all__)\n"
        "[getattr(pm, name) for name in pm.__all__]\n"
        "for name in names:\n"
        "    __import__(f'prism_meta.{name}')\n"
        "    assert isinstance(getattr(pm, name), types.ModuleType), name\n"
        "print(len(names))"
    )
    assert int(python(code)) > 10


def test_a_star_import_is_the_api() -> None:
    names = python("from prism_meta import *\nprint(*sorted(n for n in dir() if n[0] != '_'))")
    assert names.split() == sorted(pm.__all__)


def test_a_wrong_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="No prism_meta attribute FirstOder") as raised:
        pm.FirstOder  # noqa: B018
    assert raised.value.name == "FirstOder" and raised.value.obj is pm  # Python suggests a name
