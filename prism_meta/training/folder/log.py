"""The log of a training: a file of JSON lines, one per outer step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prism_meta.bilevel.strategies import MetaGradient
from prism_meta.errors import PrismError, raise_faults
from prism_meta.files import cannot_write, write_whole

#: More messages about one file would not help.
_MAX_FAULTS = 5


@dataclass(frozen=True)
class Taken:
    """An outer step that was taken; its tensors are on the device.

    Args:
        step: counted from 0.
        lr: the outer learning rate.
        result: the losses and their terms.
        norm: of the gradient.
        cosine: of the meta-gradient with the single-level one, NaN if one of them is 0. Defaults to None:
            it was not measured.
    """

    step: int
    lr: float
    result: MetaGradient
    norm: Tensor
    cosine: Tensor | None = None


def line(taken: Taken, *, epoch: int | None) -> dict[str, Any]:
    """What is logged of an outer step; it reads the losses, which waits for the device.

    Args:
        taken: the step.
        epoch: length of an epoch in outer steps, if there are epochs.
    """
    result, logged = taken.result, {}
    if taken.cosine is not None:
        cosine = float(taken.cosine)
        logged["cosine"] = cosine if math.isfinite(cosine) else None
    return {
        "step": taken.step + 1,
        **({} if epoch is None else {"epoch": taken.step // epoch + 1}),
        "train_loss": float(result.train_loss),
        "meta_loss": float(result.meta_loss),
        "terms": {name: term.tolist() for name, term in result.terms.items()},
        "gradient_norm": float(taken.norm),
        "lr": taken.lr,
        **logged,
    }


def refuse_divergence(lines: Sequence[dict[str, Any]], scaler: Any) -> None:
    """Mark the steps that the scaler of half precision skipped.

    Raises:
        PrismError: a loss or a gradient is not finite without a scaler that can deal with it.
    """
    for line in lines:
        finite = torch.tensor([line["train_loss"], line["meta_loss"], line["gradient_norm"]])
        if finite.isfinite().all():
            continue
        line["skipped"] = True
        # A scaler skips a step and halves its scale until gradients fit into half precision.
        if scaler is None or scaler.get_scale() < 1:
            raise PrismError(
                f"training diverged at step {line['step']}: losses {line['train_loss']:g} and "
                f"{line['meta_loss']:g}, gradient norm {line['gradient_norm']:g}; lower the inner or "
                "the outer learning rate (meta.inner_lr, training.lr), and check the images"
            )


def append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Add the lines of some steps.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(path, error) from error


def truncate(path: Path, step: int) -> None:
    """Drop the lines after ``step``, whose steps will be repeated, and lines that are not whole."""
    if not path.exists():
        return
    lines = path.read_bytes().decode("utf-8", "replace").splitlines(keepends=True)
    write_whole(path, "".join(line for line in lines if 0 < _step_of(line) <= step))


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of the log; an empty list if there is no file. A last line that was cut off is left out.

    Raises:
        PrismError: the file cannot be read, or a line is not one of the log.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PrismError(f"{path}: cannot be read ({reason}); {_ADVICE}") from error
    lines, faults = [], []
    whole = text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]
    for number, content in enumerate(whole, start=1):
        line = _parsed(content)
        if line is None:
            faults.append(
                f"{path}, line {number}: expected a JSON object with step, train_loss and meta_loss; "
                f"{_ADVICE}"
            )
        else:
            lines.append(line)
    raise_faults(PrismError, faults[:_MAX_FAULTS])
    return lines


_ADVICE = "restore the file, or delete it to do without the curves"


def mean(values: Sequence[Any]) -> Any:
    """The mean of what several processes logged for one step; only losses differ between them.

    Args:
        values: one per process.

    Example:
        >>> mean([{"step": 1, "meta_loss": 1.0}, {"step": 1, "meta_loss": 2.0}])
        {'step': 1, 'meta_loss': 1.5}
    """
    first = values[0]
    if len(values) == 1:
        return first
    if isinstance(first, dict):
        # Some terms exist only for the masks that a process drew.
        names = dict.fromkeys(name for value in values for name in value)
        return {name: mean([value[name] for value in values if name in value]) for name in names}
    if isinstance(first, list):
        return [mean(of_entry) for of_entry in zip(*values, strict=True)]
    return sum(values) / len(values) if isinstance(first, float) else first


def _parsed(content: str) -> dict[str, Any] | None:
    try:
        line = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        return None
    losses = (line.get("train_loss"), line.get("meta_loss"))
    return line if all(isinstance(loss, Real) for loss in losses) else None


def _step_of(content: str) -> int:
    line = _parsed(content)
    return 0 if line is None else int(line["step"])
