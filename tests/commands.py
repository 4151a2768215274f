"""Helpers that run the commands as a user does, with settings for small cases."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from prism_meta.cli.commands import app

SMALL = (
    "data.spacing=[1,1,1]", "data.patch=[16,16]", "data.batch_size=2", "model.width=2",
    "model.depth=2", "training.steps=4", "training.ema=0",
)  # fmt: skip


def run(*arguments: object) -> tuple[int, str]:
    """Exit code and output (both streams); the terminal is wide, so that it does not wrap lines."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def run_json(*arguments: object) -> tuple[int, Any, str]:
    """Exit code, the object on standard output (None if that is empty), and standard error."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, json.loads(result.stdout or "null"), result.stderr


def settings(*extra: str) -> list[str]:
    return [part for value in (*SMALL, *extra) for part in ("--set", value)]


def errors(output: str) -> list[str]:
    return [line.removeprefix("error: ") for line in output.splitlines() if "error: " in line]
