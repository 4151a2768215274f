"""The weights that a training writes: the last ones, averaged ones, and the best on validation cases.

A file of weights is in the safetensors format. It has the model's parameters and buffers by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from prism_meta.errors import PrismError
from prism_meta.files import writable_folder, write_whole
from prism_meta.training.config import Config

#: The best ones on the validation cases; the moving average; those after the last step.
Kind = Literal["best", "ema", "last"]
#: Folder of the weights within a run folder.
WEIGHTS = "weights"
_FIX = "restore the file or train again"


def weights_file(folder: Path, kind: Kind) -> Path:
    """Where a run keeps its weights.

    Example:
        >>> weights_file(Path("runs/a"), "best").as_posix()
        'runs/a/weights/best.safetensors'
    """
    return folder / WEIGHTS / f"{kind}.safetensors"


def written_kinds(config: Config) -> tuple[Kind, ...]:
    """The kinds of weights that a training writes, the one to use first.

    Example:
        >>> from prism_meta.training.config import load_config
        >>> written_kinds(load_config(overrides=["validation.cases=2"]))
        ('best', 'ema', 'last')
    """
    best: tuple[Kind, ...] = ("best",) if config.validation.is_on else ()
    averaged: tuple[Kind, ...] = ("ema",) if config.training.ema else ()
    return (*best, *averaged, "last")


def save_weights(path: Path, model: nn.Module) -> None:
    """Write the parameters and buffers of ``model``.

    Raises:
        OutputError: the file cannot be written. An existing file is then kept.
    """
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    writable_folder(path.parent)
    # Not save_file: its error for a full disk is no OSError, and its files have a mode of their own.
    write_whole(path, save(state))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a file, by name.

    Raises:
        PrismError: the file is missing, cannot be read, or has values that are not finite.
    """
    try:
        state = load(path.read_bytes())
    except FileNotFoundError as error:
        raise PrismError(
            f"{path}: is missing; restore the file, use the last weights, or train again"
        ) from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise PrismError(f"{path}: cannot be read ({reason}); make the file readable") from error
    except SafetensorError as error:
        raise _does_not_fit(path, error) from error
    wrong = [n for n, w in state.items() if w.is_floating_point() and not w.isfinite().all()]
    if wrong:
        raise PrismError(f"{path}: {wrong[0]} has values that are NaN or infinite; {_FIX}")
    return state


def load_weights(path: Path, model: nn.Module) -> None:
    """Load the weights of a file into ``model``.

    Raises:
        PrismError: see ``read_weights``, or the weights do not fit the model.
    """
    state = read_weights(path)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise _does_not_fit(path, error) from error


def _does_not_fit(path: Path, error: Exception) -> PrismError:
    return PrismError(f"{path}: does not fit config.toml ({str(error).splitlines()[0]}); {_FIX}")
