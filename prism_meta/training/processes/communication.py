"""Means over processes, in as few messages as possible.

Each message waits for every process, so one message per tensor costs more than its bytes do.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from prism_meta.bilevel.functional.trees import State
from prism_meta.bilevel.strategies import MetaGradient

if TYPE_CHECKING:  # it takes two seconds to import
    from lightning_fabric import Fabric

_T = TypeVar("_T")


def mean_meta_gradient(result: MetaGradient, fabric: Fabric) -> MetaGradient:
    """The mean over all processes, which keeps their models equal.

    Args:
        result: of this process, without the parts that its outer step does not read.
        fabric: devices and processes, launched.
    """
    # A parameter is unused only if no process used it; otherwise only some processes would step.
    names = list(result.gradient)
    unused = torch.tensor([float(n in result.unused) for n in names])
    averaged: dict[str, Any] = {
        "train_loss": result.train_loss,
        "meta_loss": result.meta_loss,
        "gradient": result.gradient,
        "adapted": result.adapted,
        "hyper_gradient": result.hyper_gradient,
        "weight_gradient": result.weight_gradient,
        "buffers": result.buffers,
        "inner_buffers": result.inner_buffers,
    }
    averaged, unused = mean_over_processes((averaged, unused), fabric)
    if result.state:
        averaged["state"] = mean_state(result.state, fabric)
    everywhere = unused > 1 - 0.5 / fabric.world_size  # a mean of ones may be rounded
    unused_names = (n for n, u in zip(names, everywhere.tolist(), strict=True) if u)
    return replace(result, unused=frozenset(unused_names), **averaged)


def mean_over_processes(values: _T, fabric: Fabric) -> _T:
    """The mean of each floating-point or complex tensor over all processes; others stay as they are.

    All tensors of one type are sent in one buffer, which takes as much memory as they do.

    Args:
        values: nested dictionaries and sequences of tensors, of the same shapes in all processes.
        fabric: devices and processes, launched.

    Example:
        >>> from lightning_fabric import Fabric
        >>> mean_over_processes({"gradient": torch.ones(2)}, Fabric(accelerator="cpu", devices=1))
        {'gradient': tensor([1., 1.])}
    """
    leaves, structure = tree_flatten(values)
    by_type: dict[torch.dtype, list[int]] = {}
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and _is_averaged(leaf):
            by_type.setdefault(leaf.dtype, []).append(place)
    for places in by_type.values():
        sent = [leaves[place] for place in places]
        buffer: Any = torch.cat([tensor.detach().to(fabric.device).flatten() for tensor in sent])
        buffer = fabric.all_reduce(buffer, reduce_op="mean")
        parts = buffer.split([tensor.numel() for tensor in sent])
        for place, tensor, part in zip(places, sent, parts, strict=True):
            leaves[place] = part.view(tensor.shape).to(tensor.device)
    averaged: _T = tree_unflatten(leaves, structure)
    return averaged


def mean_state(state: State, fabric: Fabric) -> State:
    """The mean of an optimizer's state: of each tensor over the processes that have it.

    A process lacks the tensors of a parameter that its episodes have never used, e.g. the momentum of
    the encoder of a modality that none of them showed.

    Args:
        state: of the inner optimizer, by the names of the parameters.
        fabric: devices and processes, launched.
    """
    own = {
        (name, key): (tuple(value.shape), value.dtype, value.device.type == "cpu")
        for name, values in state.items()
        for key, value in values.items()
    }
    told: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(told, own)
    everywhere = {place: form for forms in told for place, form in forms.items()}
    mine: dict[tuple[str, str], Tensor] = {}
    for (name, key), (shape, dtype, on_cpu) in sorted(everywhere.items(), key=lambda item: item[0]):
        empty = torch.zeros(shape, dtype=dtype, device="cpu" if on_cpu else fabric.device)
        mine[name, key] = state.get(name, {}).get(key, empty)
    having = torch.tensor([float(place in own) for place in mine])
    values, share = mean_over_processes((list(mine.values()), having), fabric)
    averaged: State = {name: {} for name in state}
    for (name, key), value, part in zip(mine, values, share.tolist(), strict=True):
        averaged.setdefault(name, {})[key] = value / part if _is_averaged(value) else value
    return averaged


def _is_averaged(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()
