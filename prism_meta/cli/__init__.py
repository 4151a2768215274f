"""The commands: what a user types, what each does, and the demo."""

from prism_meta.cli.commands import app, main

__all__ = ["app", "main"]
