"""The configuration keys that set the arguments of library functions, for error messages."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

#: Argument name in ``Fault.arguments`` -> configuration key; see ``PrismError.with_keys``.
ARGUMENT_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "modalities": "data.modalities",
        "label": "data.label",
        "files": "data.files",
        "layout": "data.layout",
        "patch": "data.patch",
        "spacing": "data.spacing",
        "align": "data.align",
        "labels": "data.labels",
        "table": "data.availability",
        "missing_rates": "data.missing_rates",
        "rates": "data.missing_rates",
        "seed": "seed",
        "holdout": "data.holdout",
        "folds": "data.folds",
        "fold": "data.fold",
        "split": "data.split",
        "train_mask": "masks.train",
        "meta_mask": "masks.meta",
        "support": "episodes.support",
    }
)
