"""The command line: the commands, what they do, and the demo."""

from prism_meta.cli.commands import app, main

__all__ = ["app", "main"]
