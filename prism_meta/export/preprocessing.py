"""``preprocessing.json``: all that ``predict`` does beside the network, for other software to do the same.

docs/export.md describes each key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from glob import escape
from typing import Any

import torch

from prism_meta.data.axes import _ALIKE
from prism_meta.data.labels import LabelSet
from prism_meta.data.layouts.names import other_names
from prism_meta.data.layouts.search import SUFFIXES
from prism_meta.data.preprocessing import TRACE
from prism_meta.data.restore import _ON_GRID
from prism_meta.evaluation.cleanup import Cleanup, _least, outer_first, replacement
from prism_meta.modalities import composed, file_tokens
from prism_meta.training.build import build_label_set, build_preprocessing
from prism_meta.training.cleanup.file import read_cleanup
from prism_meta.training.config.data import DataConfig
from prism_meta.training.folder.facts import versions
from prism_meta.training.folder.weights import Kind
from prism_meta.training.run import Run

#: Name of the file.
PREPROCESSING = "preprocessing.json"
#: The version of its schema: it changes if a key changes its meaning.
SCHEMA = 1
#: Gaussian weights of MONAI's sliding window: sigma as a share of the patch, and the lowest weight.
_SIGMA, _LOWEST = 0.125, 1e-3
#: Voxel sizes that differ by less, in mm, are kept; and so is a grid whose affine changes by less.
_SAME = 1e-3


def preprocessing(
    run: Run, weights: Kind | None = None, *, multiple: int | None = None
) -> dict[str, Any]:
    """The content of ``preprocessing.json`` as JSON values.

    Args:
        run: its configuration and clean-up.
        weights: kind of the weights of the exported network. Defaults to those that ``predict`` uses.
        multiple: the spatial sizes of the image are multiples of this number, at least twice; None if they
            are those of the patch.

    Raises:
        PrismError: the file of the clean-up is damaged.
    """
    data = run.config.data
    labels = build_label_set(data)
    prepared = build_preprocessing(data)
    return {
        "schema": SCHEMA,
        "prism_meta": versions()["prism-meta"],
        "weights": weights or run.kinds[0],
        "network": {
            "inputs": {
                "image": "float32 (B, M, *S)",
                "mask": "bool (B, M), at least one True each",
            },
            "output": "float32 logits (B, K, *S)",
            "multiple": multiple,
        },
        "modalities": list(data.modalities),
        "files": [{"pattern": p, "modality": name} for p, name in _patterns(data)],
        "normalization": {
            "method": "z-score",
            "voxels": "not 0, of each modality by itself",
            "percentiles": list(prepared.percentiles),
        },
        "orientation": {
            "axes": "right, anterior, superior; the axis of the slices last",
            "slices": "along the largest voxels, or the last of several axes that are alike",
            "alike": _ALIKE,
        },
        "spacing": {
            "mm": list(prepared.spacing),
            "tolerance": _SAME,
            "interpolation": "linear, border values beyond",
            "zero_below": TRACE,
        },
        "crop": "box of the voxels that are not 0 in a modality that is shown",
        "window": {
            "patch": list(data.patch),
            "overlap": run.config.evaluation.overlap,
            "blending": "Gaussian weights of the logits",
            "sigma": _SIGMA,
            "lowest_weight": _LOWEST,
            "padding": "zeros on both sides, the smaller half first",
        },
        "restoring": {
            "interpolation": "linear, of the probabilities; background outside of the crop",
            "snap": _ON_GRID,
        },
        "labels": {"background": 0, **labels.values},
        "dtype": str(labels.decode(torch.zeros(0)).dtype),
        "regions": {name: list(classes) for name, classes in labels.regions.items()},
        "clean_up": list(_rules(read_cleanup(run.folder, run.config), labels)),
    }


def preprocessing_json(
    run: Run, weights: Kind | None = None, *, multiple: int | None = None
) -> str:
    """The content of ``preprocessing.json`` as text; see ``preprocessing``."""
    found = preprocessing(run, weights, multiple=multiple)
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def _patterns(data: DataConfig) -> Iterator[tuple[str, str]]:
    """Patterns of file names in lower case without their suffix, and their modalities, the best first.

    ``FileNames`` takes patterns of the configuration first, then names of the modality, then names that other
    data sets have for it; and of these the longest. Patterns with a folder are left out.
    """
    ranked: list[tuple[int, int, list[str], str]] = []
    for name in data.modalities:
        for token in map(_folded, data.files.get(name, ())):
            suffix = next((s for s in SUFFIXES if token.endswith(s)), "")
            ranked.append((3, len(token), [token.removesuffix(suffix)], name))
        for rank, tokens in ((2, file_tokens(name)), (1, other_names(name))):
            for token in tokens:
                plain = [escape(token), f"*_{escape(token)}", f"*-{escape(token)}"]
                ranked.append((rank, len(token), [token] if "*" in token else plain, name))
    for _, _, patterns, name in sorted(ranked, key=lambda found: found[:2], reverse=True):
        yield from ((pattern, name) for pattern in patterns if "/" not in pattern)


def _folded(text: str) -> str:
    return composed(text).lower()


def _rules(cleanup: Cleanup, labels: LabelSet) -> Iterator[dict[str, Any]]:
    """The rules of the clean-up in the order in which they apply; classes are indices."""
    for region in outer_first(labels):
        rule = cleanup.rules.get(region)
        if rule is not None and rule.is_on:
            yield {
                "region": region,
                "classes": [labels.names.index(name) for name in labels.regions[region]],
                "becomes": replacement(labels, region),
                "largest": rule.largest,
                "component_mm3": _least(rule.component_ml),
                "total_mm3": _least(rule.total_ml),
            }
