"""The same model evaluated in a wider floating-point type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from prism_meta.bilevel.functional.model import FunctionalModel
from prism_meta.bilevel.functional.trees import Params, detached


class WideModel(FunctionalModel):
    """A model with parameters, buffers and inputs in ``dtype``; wider tensors keep their type.

    Args:
        narrow: the model in its own types.
        dtype: a floating-point type; complex tensors get the complex type of that precision.
    """

    def __init__(self, narrow: FunctionalModel, dtype: torch.dtype) -> None:
        super().__init__(narrow.model, narrow.objective, scale=narrow.scale)
        self.narrow, self.dtype = narrow, dtype
        self.trainable, self.frozen = (
            {n: wider(p, dtype) for n, p in detached(params).items()}
            for params in (narrow.trainable, narrow.frozen)
        )

    @property
    def is_wider(self) -> bool:
        """Whether any trainable parameter has another type than its own."""
        return any(p.dtype != self.narrow.trainable[n].dtype for n, p in self.trainable.items())

    def buffers(self) -> Params:
        return {n: wider(b, self.dtype) for n, b in super().buffers().items()}

    def cast(self, arguments: Any) -> Any:
        return tree_map_only(Tensor, lambda t: wider(t, self.dtype), arguments)


def wider(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating-point or complex tensor in ``dtype`` if that is wider; others as they are."""
    if value.is_complex() or value.is_floating_point():
        return value.to(torch.promote_types(value.dtype, dtype))
    return value
