"""``preprocessing.json``: everything that ``predict`` does beside the network."""

from __future__ import annotations

import json
from typing import Any

from prism_meta.training.run import Run
from prism_meta.training.weights import Kind

#: Name of the file.
PREPROCESSING = "preprocessing.json"


def preprocessing(run: Run, weights: Kind | None = None, *, multiple: int | None) -> dict[str, Any]:
    return {"weights": weights or run.kinds[0], "multiple": multiple}


def preprocessing_json(run: Run, weights: Kind | None = None, *, multiple: int | None) -> str:
    """The content of ``preprocessing.json``; see ``preprocessing``."""
    return json.dumps(preprocessing(run, weights, multiple=multiple), indent=2) + "\n"
