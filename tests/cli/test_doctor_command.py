"""``prism-meta doctor``: what it tells of packages and the machine, and that its self-test can fail."""

from __future__ import annotations

import re
from importlib import metadata
from typing import Any

import pytest
import torch
from commands import errors, run, run_json

import prism_meta as pm
from prism_meta.bilevel.strategies import SecondOrder
from prism_meta.cli import checkup, doctor_command, installation
from prism_meta.cli.installation import Package, packages
from prism_meta.integrations.learn2learn import INSTALL


def test_it_tells_what_a_report_of_a_bug_needs() -> None:
    code, output = run("doctor")
    assert code == 0, output
    for word in (pm.__version__, torch.__version__.partition("+")[0], "learn2learn", "free disk"):
        assert word in output
    assert len(re.findall(r"passed +\d", output)) == len(checkup.TESTS) == 4


def test_the_json_has_the_same() -> None:
    code, found, _ = run_json("doctor")
    assert code == 0 and found["faults"] == [] and found["version"] == pm.__version__
    by_name = {package["name"]: package for package in found["packages"]}
    assert by_name["torch"]["version"] == metadata.version("torch")
    assert by_name["learn2learn"]["needs"] == "==0.2.0"
    assert found["machine"]["devices"][0]["device"] == "cpu" and found["machine"]["free_disk"] > 0
    assert sum(test["seconds"] for test in found["self_test"]) < 10


def test_a_wrong_second_order_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = SecondOrder.meta_gradient

    def wrong(self: SecondOrder, *arguments: Any, **more: Any) -> Any:
        result = right(self, *arguments, **more)
        for slope in result.gradient.values():
            slope.mul_(1.001)
        return result

    monkeypatch.setattr(SecondOrder, "meta_gradient", wrong)
    code, found, notes = run_json("doctor")
    (fault,) = errors(notes)
    assert code == 2 and found["faults"] == [fault]
    assert re.fullmatch(
        r"second-order gradient against finite differences, float64: ArithmeticError: the derivative is "
        r"\S+, expected \S+",
        fault,
    )


def test_each_command_that_installs_optional_packages_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor_command, "self_test", lambda: [])
    missing = [Package(name, "", None, False, "loggers") for name in ("wandb", "tensorboard")]
    monkeypatch.setattr(doctor_command, "packages", lambda: missing)
    code, output = run("doctor")
    assert code == 0
    line = "optional, and not installed: wandb, tensorboard; run pip install 'prism-meta[loggers]'"
    assert output.count("optional, and not installed") == 1 and line in output


def test_a_package_that_is_too_old_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_command, "self_test", lambda: [])
    version = metadata.version
    old = {"torch": "1.13.1", "wandb": "0.1"}
    monkeypatch.setattr(
        installation.metadata, "version", lambda name: old.get(name) or version(name)
    )
    needs = next(package.needs for package in packages() if package.name == "torch")
    code, output = run("doctor")
    assert (code, errors(output)) == (
        2, [f"torch: is version 1.13.1, expected {needs}; run pip install 'torch{needs}'"],
    )  # fmt: skip


def test_the_commands_that_install() -> None:
    absent = Package("learn2learn", "==0.2.0", None, False, "learn2learn")
    assert absent.install == INSTALL and absent.fault is None
    assert (
        Package("wandb", ">=1", None, False, "loggers").install
        == "pip install 'prism-meta[loggers]'"
    )
    lost = Package("monai", ">=1.5", None, False)
    assert lost.fault == "monai: is not installed, expected >=1.5; run pip install 'monai>=1.5'"


def test_a_folder_that_was_not_installed_asks_for_nothing() -> None:
    assert packages("no-such-distribution") == []
