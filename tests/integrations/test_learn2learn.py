"""The integration with learn2learn where it is missing, what its import prints, and its examples."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import LR, run_example
from peers import needs_learn2learn
from torch import nn

from prism_meta.bilevel import inner as ours
from prism_meta.integrations import MissingPackageError
from prism_meta.integrations import learn2learn as integration
from prism_meta.integrations.learn2learn import Learn2LearnStrategy, PrismLearner


@needs_learn2learn
@pytest.mark.parametrize("owner", [PrismLearner, Learn2LearnStrategy])
def test_the_example_runs(owner: type) -> None:
    run_example(owner)


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The integration, as it is where learn2learn is not installed."""
    name = integration.__name__
    monkeypatch.setitem(sys.modules, "learn2learn", None)
    for part in [part for part in sys.modules if f"{part}.".startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, part)
    yield importlib.import_module(name)
    # ``import a.b`` sets an attribute of a, which monkeypatch knows nothing of.
    sys.modules["prism_meta.integrations"].learn2learn = integration  # type: ignore[attr-defined]


def test_without_learn2learn_the_error_has_the_command(missing: Any) -> None:
    command = (
        "pip install cython setuptools wheel && pip install --no-build-isolation "
        '--config-settings="--global-option=build_ext" learn2learn==0.2.0'
    )
    for make in (
        lambda: missing.PrismLearner(nn.Linear(1, 1), ours.SGD(LR)),
        lambda: missing.Learn2LearnStrategy(nn.Linear(1, 1)),
    ):
        with pytest.raises(MissingPackageError, match="learn2learn: cannot be imported") as caught:
            make()
        assert str(caught.value).endswith(f"; install it with: {command}")
        assert isinstance(caught.value, ImportError)


def test_without_learn2learn_the_package_is_whole() -> None:
    """Nothing but the integration imports it."""
    code = "import sys, prism_meta; assert not {'learn2learn', 'higher', 'gym'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_learn2learn
def test_the_import_prints_nothing() -> None:
    code = "import prism_meta.integrations.learn2learn"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")
