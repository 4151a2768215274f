"""A run as a folder for the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from prism_meta.training.run import Run
from prism_meta.training.weights import Kind


def write_hub(run: Run, out: Path, /, *, weights: Kind | None = None) -> None:
    """Write the files that ``Run.open`` needs, and a model card."""
    raise NotImplementedError
