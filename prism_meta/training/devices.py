"""The devices and processes that a configuration asks for, and what this machine has."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

import torch

from prism_meta.errors import ConfigError
from prism_meta.training.config.schema import FabricConfig

if TYPE_CHECKING:  # it takes two seconds to import
    from lightning_fabric import Fabric

#: More processes than this on a machine with fewer cores only wait for each other.
_PROCESSES = 16


def build_fabric(fabric: FabricConfig) -> Fabric:
    """The devices and processes, not launched yet.

    Raises:
        ConfigError: this machine does not have them, or they do not support the precision.

    Example:
        >>> build_fabric(FabricConfig(accelerator="cpu")).device
        device(type='cpu')
        >>> build_fabric(FabricConfig(accelerator="cpu", devices="abc"))
        Traceback (most recent call last):
        ...
        prism_meta.errors.ConfigError: fabric.devices: got 'abc' with accelerator 'cpu', expected ...
    """
    from lightning_fabric import Fabric
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    _check_accelerator(fabric.accelerator)
    _check_cpu(fabric)
    try:
        built = Fabric(
            accelerator=fabric.accelerator,
            devices=fabric.devices,
            num_nodes=fabric.nodes,
            precision=fabric.precision,
        )
    except (MisconfigurationException, RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(
            f"fabric.devices: got {fabric.devices!r} with accelerator {fabric.accelerator!r}, expected "
            f"devices of this machine, which has {_existing()} ({reason}); use their number, e.g. 1"
        ) from error
    _check_nodes(fabric, built)
    return built


def memory_of(accelerator: str) -> int | None:
    """Bytes of memory of the device that ``accelerator`` names; None if they are unknown."""
    if not _on_cpu(accelerator) and torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        return max(torch.cuda.get_device_properties(device).total_memory for device in devices)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not POSIX
        return None


def device_kind(accelerator: str) -> Literal["cpu", "cuda"]:
    """Where tensors live with this accelerator; every GPU counts as "cuda".

    Example:
        >>> device_kind("cpu")
        'cpu'
    """
    return "cpu" if _on_cpu(accelerator) else "cuda"


def _accelerators() -> dict[str, str]:
    """The accelerators of this machine, by their names in Lightning Fabric."""
    found = {"cpu": f"a CPU with {os.cpu_count()} cores"}
    if torch.cuda.is_available():
        found["cuda"] = f"{torch.cuda.device_count()} CUDA devices"
    if torch.backends.mps.is_available():
        found["mps"] = "an Apple GPU"
    return found


def _existing() -> str:
    return ", ".join(_accelerators().values())


def _on_cpu(accelerator: str) -> bool:
    return accelerator == "cpu" or (accelerator == "auto" and len(_accelerators()) == 1)


def _check_accelerator(name: str) -> None:
    found = _accelerators()
    usable = ["auto", *found, *(["gpu"] if len(found) > 1 else [])]
    if name not in usable:
        raise ConfigError(
            f"fabric.accelerator: got {name!r}, but this machine has {_existing()}; use "
            f"{' or '.join(usable)}"
        )


def _check_cpu(fabric: FabricConfig) -> None:
    """What Fabric would accept on a CPU, and then do something else or never end."""
    if not _on_cpu(fabric.accelerator):
        return
    if fabric.precision == "16-mixed":
        raise ConfigError(
            "fabric.precision: got '16-mixed' on a CPU, where Lightning Fabric uses bfloat16 instead; "
            "use bf16-mixed or 32-true, or a GPU"
        )
    limit = max(_PROCESSES, os.cpu_count() or 1)
    if str(fabric.devices).isdecimal() and int(fabric.devices) > limit:
        raise ConfigError(
            f"fabric.devices: got {fabric.devices} processes on {os.cpu_count()} cores; use at most {limit}"
        )


def _check_nodes(fabric: FabricConfig, built: Fabric) -> None:
    """Without a launcher, the first node would wait for the others for half an hour."""
    from lightning_fabric.plugins.environments import LightningEnvironment

    environment = getattr(built.strategy, "cluster_environment", None)
    if (
        fabric.nodes > 1
        and isinstance(environment, LightningEnvironment)
        and not {"MASTER_ADDR", "NODE_RANK"} <= os.environ.keys()
    ):
        raise ConfigError(
            f"fabric.nodes: got {fabric.nodes}, but no launcher has started this process; start it with "
            "torchrun or srun on every node, or set MASTER_ADDR and NODE_RANK there"
        )
