"""The command ``prism-meta doctor``: whether an installation works, and what a report of a bug needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from prism_meta import __version__
from prism_meta.cli.checkup import Tested, self_test
from prism_meta.cli.installation import Package, machine, packages
from prism_meta.cli.output import add_result, show
from prism_meta.errors import PrismError, raise_faults

EXAMPLES = "[bold]Examples[/bold]  prism-meta doctor  ·  prism-meta doctor --json > doctor.json"


def run_doctor() -> None:
    """Check the installation: versions, devices and optional packages, and test it in seconds.

    The exit code is 2 if a package is missing or too old, or if a test fails. Add the output to a report of
    a bug.
    """
    here, asked = machine(), packages()
    tested = list(self_test())
    show(
        _machine_table(here),
        _package_table(asked),
        *_left_out(asked),
        "",
        _test_table(tested),
    )
    faults = [package.fault for package in asked]
    faults += [f"{test.name}: {test.fault}" for test in tested if test.fault]
    found = [fault for fault in faults if fault is not None]
    add_result(
        version=__version__,
        machine=here,
        packages=[asdict(package) for package in asked],
        self_test=[asdict(test) for test in tested],
        faults=found,
    )
    raise_faults(PrismError, found)


def _left_out(asked: Sequence[Package]) -> list[str]:
    """A line for each command that installs optional packages."""
    names: dict[str, list[str]] = {}
    for package in asked:
        if package.version is None and package.extra:
            names.setdefault(package.install, []).append(package.name)
    return [f"optional, and not installed: {', '.join(n)}; run {c}" for c, n in names.items()]


def _machine_table(facts: Mapping[str, Any]) -> Table:
    table = _table(f"prism-meta {__version__}", "what", "value")
    rows = {
        "Python": facts["python"],
        "system": facts["system"],
        **{
            each["device"]: f"{each['name']}, {decimal(each['memory'])}"
            for each in facts["devices"]
        },
        "threads": f"{facts['threads']} of torch",
        "free disk": f"{decimal(facts['free_disk'])} in {facts['folder']}",
    }
    for name, value in rows.items():
        table.add_row(name, Text(str(value)))
    return table


def _package_table(asked: Sequence[Package]) -> Table:
    table = _table("Packages", "package", "installed", "asked for", "extra")
    for package in asked:
        style = None if package.fits else "dim" if package.extra else "bold red"
        table.add_row(
            package.name, package.version or "-", package.needs, package.extra, style=style
        )
    return table


def _test_table(tested: Sequence[Tested]) -> Table:
    table = _table("Self-test", "test", "result", "seconds")
    for test in tested:
        result = Text("passed") if test.fault is None else Text("failed", style="bold red")
        table.add_row(test.name, result, f"{test.seconds:.2f}")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table
