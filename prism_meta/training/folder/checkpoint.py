"""Checkpoints: the state of a training, from which it resumes. The last two are kept.

A checkpoint is a zip archive that torch wrote, with a checksum of every tensor. All of them are verified
before anything is used, so that a flipped bit on the disk cannot become a wrong model.
"""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prism_meta.errors import PrismError
from prism_meta.files import atomic, sync

_log = logging.getLogger(__name__)


def previous(path: Path) -> Path:
    """Where the checkpoint before that in ``path`` is kept.

    Example:
        >>> previous(Path("run/checkpoint.pt")).name
        'checkpoint.previous.pt'
    """
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` to ``path``; the checkpoint that was there becomes the previous one.

    Raises:
        OutputError: it cannot be written. Both checkpoints are then kept.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    with atomic(path) as partial:
        # Not torch.save to the file: its error for a full disk is no OSError.
        partial.write_bytes(buffer.getbuffer())
        sync(partial)  # some disks tell only now that they are full; both checkpoints still stand
        if path.is_file():
            path.replace(previous(path))


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any] | None:
    """Read the newest checkpoint that is not damaged; None if there is none at all.

    Args:
        path: the newest checkpoint.
        device: device of the tensors.

    Raises:
        PrismError: there are checkpoints, but all of them are damaged.
    """
    faults: list[str] = []
    for candidate in (path, previous(path)):
        try:
            state = _read(candidate, device)
        except FileNotFoundError:
            continue
        except Exception as error:  # torch and zipfile raise many kinds for damaged files
            reason = (str(error) or type(error).__name__).splitlines()[0]
            faults.append(f"{candidate}: cannot be read as a checkpoint ({reason})")
            continue
        for fault in faults:
            _log.warning("%s; training continues from %s", fault, candidate.name)
        return state
    if faults:
        advice = "restore the file, or delete it to train from the start"
        raise PrismError([f"{fault}; {advice}" for fault in faults])
    return None


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    content = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(content) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} is wrong")
    content.seek(0)
    state = torch.load(content, map_location=device, weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, expected a dict")
    return state
