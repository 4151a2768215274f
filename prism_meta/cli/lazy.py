"""Commands that are imported when they are used, so that the list of them appears at once."""

from __future__ import annotations

from functools import cached_property
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand

from prism_meta.cli.output import shared_options


class LazyCommand(TyperCommand):
    """The command NAME, which is ``run_NAME`` in ``prism_meta.cli.NAME_command``, with ``EXAMPLES`` there.

    The module is imported when the command runs, or when its options are asked for, e.g. by its own help.
    The options of ``output`` are added to its own.

    Args:
        name: of the command.
        summary: what the list of commands says of it, like the first line of its docstring.
    """

    def __init__(self, name: str, summary: str) -> None:
        super().__init__(name, help=summary)

    @cached_property
    def loaded(self) -> Any:
        """The command itself."""
        module = import_module(f"prism_meta.cli.{self.name}_command")
        app = typer.Typer(
            add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False
        )
        app.command(self.name, epilog=module.EXAMPLES)(getattr(module, f"run_{self.name}"))
        command = typer.main.get_command(app)
        command.params.extend(shared_options())
        return command

    def make_context(self, *arguments: Any, **more: Any) -> Any:
        """Read the command line; what runs then is ``loaded``."""
        return self.loaded.make_context(*arguments, **more)

    @property
    def params(self) -> Any:
        """Arguments and options, for those that look through all commands."""
        return self.loaded.params

    @params.setter
    def params(self, value: Any) -> None:
        """Nothing: the base class knows of none."""
