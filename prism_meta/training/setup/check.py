"""Checks that a configuration can be trained, before anything is read or written.

The model is built on torch's meta device, whose tensors have a shape but no values. One patch runs
through it and through the objective, which takes milliseconds, whatever the sizes are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.filesize import decimal
from torch import Tensor, nn

from prism_meta.errors import ConfigError, PrismError
from prism_meta.modalities import Batch
from prism_meta.training.build import build_model, build_objective, build_owner
from prism_meta.training.config import Config
from prism_meta.training.devices import memory_of
from prism_meta.training.shapes import Shapes, on_meta

#: Copies of the parameters: the weights, their gradient, and the two moments of AdamW.
_COPIES = 4


def check_configuration(config: Config, *, model: nn.Module | None = None) -> None:
    """Run one patch through the model and bound the memory that training needs.

    Call it before anything is read or written. It draws no random numbers and changes no model.

    Args:
        config: sizes of the patch, the batch and the model.
        model: a model of your own, which replaces the configured one. A model that cannot run on the meta
            device, e.g. because it reads the values of a tensor, is not checked.

    Raises:
        ConfigError: the patch does not fit the model, or training needs more memory than there is.

    Example:
        >>> from prism_meta.training.config import load_config
        >>> check_configuration(load_config())
        >>> check_configuration(load_config(overrides=["data.patch=[8, 8]"]))
        Traceback (most recent call last):
        ...
        prism_meta.errors.ConfigError: data.patch, model.depth: image: (8, 8) voxels leave one voxel at \
the coarsest of 4 scales; use more than 8, or a smaller depth
    """
    saved: dict[int, Any] = {}
    try:
        with torch.random.fork_rng(devices=[]), Shapes(), _saved_by_autograd(saved):
            parameters = _run(config, model)
    except PrismError:
        raise  # the network could not be built
    except (NotImplementedError, ValueError, RuntimeError, OverflowError) as error:
        foreign = model is not None or config.model.is_named
        if foreign and (isinstance(error, NotImplementedError) or "meta" in str(error)):
            _run_with_values(config, model)  # it reads values, or has an operator without a shape
            return
        raise _refused(config, error, foreign=foreign) from error
    _check_memory(config, parameters, sum(storage.nbytes() for storage in saved.values()))


def _run_with_values(config: Config, model: nn.Module | None) -> None:
    """Run a patch of zeros through a network that is named by its module."""
    if model is not None:
        return  # its owner has run it
    mask = torch.ones(1, len(config.data.modalities), dtype=torch.bool)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            build_model(config).eval()(torch.zeros(*mask.shape, *config.data.patch), mask)
    except PrismError:
        raise
    except (NotImplementedError, ValueError, RuntimeError) as error:
        raise _refused(config, error, foreign=True) from error


def _refused(config: Config, error: Exception, *, foreign: bool) -> ConfigError:
    message = (str(error).splitlines() or [type(error).__name__])[0]
    fix = "" if "; " in message else "; use another patch or a smaller depth"
    if foreign and config.model.is_named:
        fix = f"; {config.model.network} cannot take this patch, use another, or other model.arguments"
    keys = "data.patch" if foreign else "data.patch, model.depth"
    return ConfigError(f"{keys}: {message}{fix}")


def _run(config: Config, model: nn.Module | None) -> int:
    """Run one patch, and return the bytes of the parameters."""
    data = config.data
    modalities = len(data.modalities)
    image = torch.empty(1, modalities, *data.patch, device="meta")
    # The mask has values, because models choose with it what they compute.
    mask = torch.ones(1, modalities, dtype=torch.bool)
    if model is None:
        with torch.device("meta"):
            built = build_model(config)
            target = torch.empty(1, *data.patch, dtype=torch.long)
        build_owner(config.meta, built)  # raises if its patterns do not fit
        objective = build_objective(config.objective, [0.0] * modalities)
        # The objective looks only at the device of its image, and autocast knows no meta device.
        batch = Batch(torch.zeros(()).expand(image.shape), mask, target)
        objective(lambda _, mask, **options: built(image, mask, **options), batch)
        return _size(built)
    on_meta(model)(image, mask)
    return _size(model)


def _size(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _check_memory(config: Config, parameters: int, activations: int) -> None:
    """Compare a lower bound of the memory that training needs with the memory that there is."""
    available = memory_of(config.fabric.accelerator)
    data, masks = config.data, config.masks
    if (masks.train, masks.meta) != ("full", "full"):
        activations //= len(data.modalities)  # an episode may show one modality of each sample
    if config.fabric.precision != "32-true":
        activations //= 2
    weights = (_COPIES + config.meta.kind.adapts) * parameters
    batch = data.batch_size * activations
    if available is None or weights + batch <= available:
        return
    raise ConfigError(
        f"data.batch_size, data.patch, model.width, model.depth: training needs at least "
        f"{decimal(weights)} for the parameters, their gradient and the optimizer and {decimal(batch)} "
        f"for a batch of {data.batch_size} patches of {' x '.join(map(str, data.patch))}, but there are "
        f"{decimal(available)} of memory; make some of the four smaller"
    )


@contextmanager
def _saved_by_autograd(saved: dict[int, Any]) -> Iterator[None]:
    """Collect in ``saved`` the storages that autograd saves within the context, except parameters."""

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_meta and not (tensor.is_leaf and tensor.requires_grad):
            saved[storage._cdata] = storage  # kept, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
