"""``build_fabric``: devices, nodes and precisions that this machine does not have."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import faults_of

from prism_meta.errors import ConfigError
from prism_meta.training import devices
from prism_meta.training.config.schema import FabricConfig
from prism_meta.training.devices import build_fabric, memory_of

LAUNCHERS = ("MASTER_ADDR", "NODE_RANK")


@pytest.fixture(autouse=True)
def _a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(devices.os, "cpu_count", lambda: 8)  # type: ignore[attr-defined]
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            FabricConfig(accelerator="foo"),
            "fabric.accelerator: got 'foo', but this machine has a CPU with 8 cores; use auto or cpu",
        ),
        (FabricConfig(accelerator=""), "fabric.accelerator: got ''"),
        (FabricConfig(accelerator="cuda"), "fabric.accelerator: got 'cuda', but this machine has"),
        (
            FabricConfig(devices=0),
            "fabric.devices: got 0 with accelerator 'auto', expected devices",
        ),
        (FabricConfig(devices=-1), "fabric.devices: got -1"),
        (FabricConfig(devices="abc"), "fabric.devices: got 'abc'"),
        (FabricConfig(devices=""), "fabric.devices: got ''"),
        (FabricConfig(devices="3,"), "fabric.devices: got '3,'"),
        (FabricConfig(devices="0,1"), "which has a CPU with 8 cores ("),
        (FabricConfig(devices="17"), "fabric.devices: got 17 processes on 8 cores; use at most 16"),
        (
            FabricConfig(devices=1000),
            "fabric.devices: got 1000 processes on 8 cores; use at most 16",
        ),
        (
            FabricConfig(precision="16-mixed"),
            "fabric.precision: got '16-mixed' on a CPU, where Lightning Fabric uses bfloat16 instead; use "
            "bf16-mixed or 32-true, or a GPU",
        ),
        (
            FabricConfig(nodes=2),
            "fabric.nodes: got 2, but no launcher has started this process; start",
        ),
    ],
    ids=str,
)
def test_what_this_machine_does_not_have(config: FabricConfig, message: str) -> None:
    (fault,) = faults_of(partial(build_fabric, config), ConfigError)
    assert message in fault and "; " in fault


def test_the_accelerators_of_the_machine_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    (fault,) = faults_of(partial(build_fabric, FabricConfig(accelerator="mps")), ConfigError)
    assert fault.endswith("has a CPU with 8 cores, 2 CUDA devices; use auto or cpu or cuda or gpu")


def test_a_launcher_knows_the_other_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(LAUNCHERS, ("10.0.0.1", "0"), strict=True):
        monkeypatch.setenv(name, value)
    assert build_fabric(FabricConfig(accelerator="cpu", nodes=2)).world_size == 2


def test_what_it_has_is_built() -> None:
    assert build_fabric(FabricConfig(accelerator="cpu", devices="auto")).world_size == 1
    assert build_fabric(FabricConfig(accelerator="cpu", devices=2)).world_size == 2
    build_fabric(FabricConfig(accelerator="cpu", precision="bf16-mixed"))


def test_memory_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    own = memory_of("cpu")
    assert own is None or own > 2**28
    assert memory_of("auto") == own
