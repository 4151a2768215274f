"""What ``doctor`` tells of an installation: the machine, and the packages that prism-meta asks for."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from prism_meta.data.memory import memory_size
from prism_meta.integrations.learn2learn import INSTALL as LEARN2LEARN

#: Extras for those who work on prism-meta itself.
_FOR_DEVELOPERS = ("docs", "test")


@dataclass(frozen=True)
class Package:
    """A package that prism-meta asks for.

    Args:
        name: as in pip.
        needs: the versions that it asks for, e.g. ``>=1.5``; empty for any.
        version: the one that is installed; None if there is none.
        fits: whether it is one of those.
        extra: the extra that it belongs to; empty if prism-meta cannot do without.
    """

    name: str
    needs: str
    version: str | None
    fits: bool
    extra: str = ""

    @property
    def install(self) -> str:
        """The command that installs it."""
        if self.name == "learn2learn":  # does not build out of the box
            return LEARN2LEARN
        wanted = f"prism-meta[{self.extra}]" if self.extra else f"{self.name}{self.needs}"
        return f"pip install '{wanted}'"

    @property
    def fault(self) -> str | None:
        """Why prism-meta cannot work with it, and the fix; None if it can."""
        if self.fits or self.extra:
            return None
        there = "is not installed" if self.version is None else f"is version {self.version}"
        return f"{self.name}: {there}, expected {self.needs}; run {self.install}"


def packages(distribution: str = "prism-meta") -> list[Package]:
    """The packages that a distribution asks for, as its metadata says; those of extras come last.

    A source folder that was not installed has no metadata, and asks for nothing.

    Example:
        >>> ["jinja2" in package.name for package in packages("jinja2") if not package.extra]
        [False]
    """
    try:
        listed = [Requirement(text) for text in metadata.requires(distribution) or ()]
        extras = metadata.metadata(distribution).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return []
    found = []
    for extra in ("", *(name for name in extras if name not in _FOR_DEVELOPERS)):
        for wanted in listed:
            always = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
            if always != (not extra) or (extra and not _belongs(wanted, extra)):
                continue
            found.append(_package(wanted, extra))
    return found


def machine() -> dict[str, Any]:
    """The system, devices, threads, memory and disk; sizes are in bytes."""
    here = Path.cwd()
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "devices": list(_devices()),
        "threads": torch.get_num_threads(),
        "memory": memory_size(),
        "folder": here,
        "free_disk": shutil.disk_usage(here).free,
    }


def _belongs(wanted: Requirement, extra: str) -> bool:
    return wanted.marker is not None and wanted.marker.evaluate({"extra": extra})


def _package(wanted: Requirement, extra: str) -> Package:
    needs = str(wanted.specifier)
    try:
        version = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return Package(wanted.name, needs, None, False, extra)
    fits = wanted.specifier.contains(version, prereleases=True)
    return Package(wanted.name, needs, version, fits, extra)


def _devices() -> Iterator[dict[str, Any]]:
    cores = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    yield {"device": "cpu", "name": cores, "memory": memory_size()}
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        yield {"device": f"cuda:{number}", "name": facts.name, "memory": facts.total_memory}
    if torch.backends.mps.is_available():
        yield {"device": "mps", "name": "Apple GPU", "memory": memory_size()}
