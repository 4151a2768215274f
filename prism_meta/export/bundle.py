"""A run as a MONAI Bundle: configurations, weights and a README that ``python -m monai.bundle`` uses.

The bundle needs prism-meta, whose network, preprocessing and clean-up its configuration names.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from prism_meta.errors import ConfigError, one_line
from prism_meta.export.bundled import BundleNet
from prism_meta.files import write_whole
from prism_meta.training.build import build_label_set
from prism_meta.training.cleanup.file import read_cleanup
from prism_meta.training.folder.facts import versions
from prism_meta.training.folder.weights import Kind
from prism_meta.training.run import Run

#: Names of the files, which MONAI's specification gives.
METADATA, INFERENCE = "configs/metadata.json", "configs/inference.json"
MODEL, README = "models/model.pt", "docs/README.md"
#: The newest schema of bundles that are no generators.
SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
    "meta_schema_20240725.json"
)
_VERSION = "1.0.0"
#: What prediction reads of the section ``data``. The other keys are about training, or are paths.
_DATA = ("modalities", "label", "layout", "files", "labels", "regions", "spacing", "align", "patch")


def write_bundle(run: Run, out: Path, /, *, weights: Kind | None = None) -> None:
    """Write a MONAI Bundle. It names no case, and no path of this computer.

    ``python -m monai.bundle run`` then predicts the label volumes that ``prism-meta predict`` predicts.

    Args:
        run: a run whose training has ended.
        out: folder of the files.
        weights: see ``Run.existing_weights``.

    Raises:
        ConfigError: a name in the configuration has another meaning in a configuration of MONAI.
        PrismError: see ``Run.load_model`` and ``read_cleanup``.
        OutputError: a file cannot be written.
    """
    content = io.BytesIO()
    net = BundleNet(run.load_model(weights=weights))
    torch.save({name: value.contiguous() for name, value in net.state_dict().items()}, content)
    files: dict[str, str | bytes] = {
        METADATA: _json(_metadata(run)),
        INFERENCE: _json(_inference(run)),
        README: "\n".join(_readme(run, weights or run.kinds[0])) + "\n",
        MODEL: content.getvalue(),
    }
    for name, whole in files.items():
        write_whole(out / name, whole)


def _metadata(run: Run) -> dict[str, Any]:
    """``metadata.json``, by MONAI's schema."""
    data, found, labels = run.config.data, versions(), build_label_set(run.config.data)
    modalities = {str(number): name for number, name in enumerate(data.modalities)}
    classes = {str(number): name for number, name in enumerate(labels.names)}
    tensor = {"spatial_shape": list(data.patch), "dtype": "float32", "is_patch_data": True}
    image = {"type": "image", "format": "magnitude", "num_channels": len(modalities), **tensor}
    pred = {"type": "logits", "format": "segmentation", "num_channels": len(classes), **tensor}
    mask = {"type": "mask", "format": "availability", "num_channels": len(modalities)}
    return {
        "schema": SCHEMA,
        "version": _VERSION,
        "changelog": {_VERSION: f"exported by prism-meta {found['prism-meta']}"},
        "monai_version": found["monai"],
        "pytorch_version": found["torch"],
        "numpy_version": found["numpy"],
        "required_packages_version": {name: found[name] for name in ("prism-meta", "nibabel")},
        "task": "segmentation with missing modalities",
        "description": (
            f"Segments {', '.join(labels.values)} in {', '.join(data.modalities)}, of which any may be "
            "missing."
        ),
        "authors": "not stated",
        "copyright": "not stated",
        "data_type": "nibabel",
        "image_classes": f"channels {', '.join(data.modalities)}, z-scored; a missing one is 0",
        "label_classes": ", ".join(f"{v} {n}" for n, v in {"background": 0, **labels.values}.items()),
        "pred_classes": f"{len(classes)} channels of logits: {', '.join(labels.names)}",
        "intended_use": "Research only. Not a medical device: not for diagnosis or treatment.",
        "network_data_format": {
            "inputs": {
                "image": {**image, "value_range": [], "channel_def": modalities},
                "mask": {
                    **mask, "spatial_shape": [], "dtype": "bool", "value_range": [0, 1],
                    "channel_def": modalities,
                },
            },
            "outputs": {"pred": {**pred, "value_range": [], "channel_def": classes}},
        },
    }  # fmt: skip


def _inference(run: Run) -> dict[str, Any]:
    """``inference.json``. Whoever runs it may replace each key on the command line."""
    config = run.config.model_dump(
        mode="json",
        exclude_none=True,
        include={"data": set(_DATA), "model": True, "evaluation": {"overlap"}},
    )
    _check_names(run, config)
    rules = read_cleanup(run.folder, run.config).rules
    return {
        "imports": ["$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/cases'",
        "output_dir": "$@bundle_root + '/labels'",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "weights": f"$@bundle_root + '/{MODEL}'",
        "configuration": {"_target_": "prism_meta.Config", **config},
        "network_def": {
            "_target_": "prism_meta.export.bundled.BundleNet",
            "model": {
                "_target_": "prism_meta.export.bundled.build_model",
                "config": "@configuration",
            },
        },
        "network": "$@network_def.to(@device)",
        "cleanup": {
            "_target_": "prism_meta.Cleanup",
            "rules": {
                name: {"_target_": "prism_meta.RegionRule", **asdict(rule)}
                for name, rule in rules.items()
            },
        },
        "predictor": {
            "_target_": "prism_meta.export.bundled.build_predictor",
            "config": "@configuration",
            "model": "$@network.model",
            "cleanup": "@cleanup",
        },
        "evaluator": {
            "_target_": "prism_meta.export.bundled.LabelVolumes",
            "predictor": "@predictor",
            "config": "@configuration",
            "dataset_dir": "@dataset_dir",
            "output_dir": "@output_dir",
        },
        "initialize": [
            "$@network.load_state_dict(torch.load(@weights, map_location=@device, weights_only=True))"
        ],
        "run": ["$@evaluator.run()"],
    }


def _check_names(run: Run, config: Mapping[str, Any]) -> None:
    """MONAI would evaluate ``$...``, resolve ``@...``, read the file ``%...`` and split keys.

    Raises:
        ConfigError: there is such a name.
    """
    for text, is_key in _strings(config):
        special = text.startswith(("$", "@", "%")) or "@::" in text or "@#" in text
        if special or (is_key and (text.startswith("_") or "::" in text or "#" in text)):
            raise ConfigError(
                f"{run.folder}: the name {one_line(text)!r} has another meaning in a configuration of "
                "MONAI; train with a name of letters and digits, or use another format"
            )


def _strings(value: Any) -> Iterator[tuple[str, bool]]:
    """All strings in a value, and whether they are keys."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield name, True
            yield from _strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)
    elif isinstance(value, str):
        yield value, False


def _readme(run: Run, weights: Kind) -> Iterator[str]:
    data, labels = run.config.data, build_label_set(run.config.data)
    yield f"# {one_line(run.folder.resolve().name)}"
    yield ""
    yield (
        f"A segmentation network for {', '.join(data.modalities)}, trained with prism-meta so that any of "
        "them may be missing."
    )
    yield ""
    yield "**Not a medical device.** For research only: do not use it for diagnosis or treatment."
    yield from ["", "## How to run it", "", "In the folder of the bundle:", "", "```sh"]
    yield 'pip install prism-meta "monai[fire]"'
    yield (
        f"python -m monai.bundle run --config_file {INFERENCE} --dataset_dir CASES --output_dir LABELS"
    )
    yield from ["```", ""]
    yield (
        "CASES is a folder of cases as `prism-meta predict` reads it, e.g. a folder per case with a NIfTI "
        "file per modality. LABELS gets a label volume per case on the grid of its files, and "
        "`predictions.csv` with the volumes of the regions."
    )
    if run.config.model.is_named and not run.config.model.network.startswith("monai:"):
        yield ""
        yield (
            f"The network is code of its own ({run.config.model.network}), which has to be installed beside "
            "it."
        )
    yield from ["", "## Inputs and labels", ""]
    yield f"- Modalities: {', '.join(data.modalities)}; each case has at least one of them"
    yield f"- Grid: voxels of {' x '.join(f'{size:g}' for size in data.spacing)} mm"
    yield f"- Labels: 0 background, {', '.join(f'{v} {name}' for name, v in labels.values.items())}"
    yield from (f"- Region {name}: {', '.join(c)}" for name, c in labels.regions.items())
    yield f"- Weights: {weights}, of {run.config.training.steps} steps of {run.config.meta.strategy}"


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
