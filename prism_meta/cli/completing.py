"""What the shell offers when the user presses Tab: run folders, and keys of the configuration."""

from __future__ import annotations

from pathlib import Path


def complete_run(incomplete: str) -> list[str]:
    """Run folders in the folder that is typed so far, whose names begin with the rest.

    If there is none, the shell offers files and folders, so that the way to a run can be typed, too.
    """
    typed, slash, _ = incomplete.rpartition("/")
    try:
        found = sorted(Path(typed + slash or ".").expanduser().iterdir())
        names = [f"{typed}{slash}{path.name}" for path in found if (path / "run.json").is_file()]
    except (OSError, RuntimeError):  # no such folder, or nobody's home
        return []
    return [name for name in names if name.startswith(incomplete)]


def complete_key(incomplete: str) -> list[str]:
    """Keys of the configuration, each with ``=``."""
    from prism_meta.training.config import Config
    from prism_meta.training.config.messages import fields_by_key

    return [f"{key}=" for key, _ in fields_by_key(Config) if key.startswith(incomplete)]
