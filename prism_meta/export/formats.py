"""The formats of ``prism-meta export``, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_meta.errors import ConfigError
from prism_meta.export.bundle import write_bundle
from prism_meta.export.folders import whole_folder
from prism_meta.export.hub import NO_LICENCE, write_hub
from prism_meta.export.programs import write_onnx, write_program
from prism_meta.training.folder.weights import Kind
from prism_meta.training.run import Run


@dataclass(frozen=True)
class Format:
    """One format.

    Args:
        write: ``write(run, out, weights=kind)`` writes the files of a run into an existing folder, with
            weights of this kind; None stands for those that ``predict`` uses. The formats have no file in
            common, apart from ``preprocessing.json``, which is the same in all, so that one folder can hold
            several.
        title: what it is, for help.
        has_card: whether the format has a model card. ``write`` then takes the ``licence`` that it names.
    """

    write: Callable[..., None]
    title: str
    has_card: bool = False


FORMATS: Mapping[str, Format] = {
    "onnx": Format(write_onnx, "model.onnx for ONNX Runtime, with predict.py, which uses it"),
    "program": Format(write_program, "model.pt2 for torch.export.load"),
    "hub": Format(write_hub, "a folder to upload to the Hugging Face hub", has_card=True),
    "bundle": Format(write_bundle, "a MONAI Bundle for python -m monai.bundle"),
}


def export_run(
    run: Run,
    out: Path | str,
    *,
    formats: Sequence[str] = ("onnx",),
    weights: Kind | None = None,
    licence: str = NO_LICENCE,
) -> None:
    """Write a run in one or several formats. The folder appears whole or not at all.

    Args:
        run: a run whose training has ended.
        out: folder, new or empty.
        formats: names from ``FORMATS``.
        weights: see ``Run.existing_weights``.
        licence: the licence of the weights, which the model card names.

    Raises:
        ConfigError: there is no format of a name.
        OutputError: the folder holds files, or cannot be written.
        PrismError: the weights cannot be read, a package is missing, or the network cannot be exported.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise ConfigError(
            f"format: got {', '.join(unknown) or 'none'}, expected some of {', '.join(FORMATS)}; use them"
        )
    with whole_folder(out) as folder:
        for name in dict.fromkeys(formats):
            form = FORMATS[name]
            options: dict[str, Any] = {"licence": licence} if form.has_card else {}
            form.write(run, folder, weights=weights, **options)
