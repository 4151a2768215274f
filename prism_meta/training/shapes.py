"""Torch's meta device, whose tensors have a shape but no values: whole steps run in no time and memory."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any_only, tree_leaves, tree_map_only


def on_meta(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers have no values; a model may keep what it computes."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()
    }
    memo |= {id(buffer): buffer.detach().to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


class Shapes(TorchDispatchMode):
    """Operators that mix meta tensors with others compute only shapes, as if all were on one device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        if tree_any_only(Tensor, lambda tensor: tensor.is_meta, given):
            given = tree_map_only(
                Tensor, lambda tensor: tensor if tensor.is_meta else _empty(tensor), given
            )
        return func(*given[0], **given[1])


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


class LiveBytes(Shapes):
    """Follows the bytes of all meta tensors that are made within the context and still alive.

    ``peak`` is the largest sum so far. Tensors that share a storage count once.

    Example:
        >>> with LiveBytes() as live:
        ...     x = torch.zeros(10, device="meta")
        ...     y = (x * 2 + 1).sum()  # x, x * 2 and the sum of both and 1 are alive together
        >>> live.now, live.peak
        (44, 120)
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        key = storage._cdata  # one number per storage, whatever tensors look at it
        if key not in self._alive:
            self._alive.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size
