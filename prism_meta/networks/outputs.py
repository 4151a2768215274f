"""Reading what a wrapped net returns: logits, coarser maps, and features of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812, torch's own convention

#: Linear interpolation, by the number of spatial dimensions.
_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def logit_maps(output: Any, rows: int, size: torch.Size) -> tuple[Tensor, ...]:
    """The logits of a net's output, then its coarser maps if there are any.

    Args:
        output: what the net returned for ``rows`` images of this ``size``.
        rows: N.
        size: of the image, *S.

    Raises:
        ValueError: the output is something else, or a shape is wrong.
    """
    wanted = f"({', '.join(map(str, (rows, 'K', *size)))})"
    if isinstance(output, Tensor) and output.ndim == len(size) + 3:
        output = output.unbind(1)  # MONAI's DynUNet stacks them
    maps = (output,) if isinstance(output, Tensor) else output
    if (
        not isinstance(maps, (tuple, list))
        or not all(isinstance(m, Tensor) for m in maps)
        or not maps
    ):
        raise ValueError(
            f"net: returned {_kind(output)}, expected logits (N, K, *S) = {wanted}, or a tuple or list of "
            "maps with the output first; wrap a module that returns only these"
        )
    first = maps[0]
    if first.ndim != len(size) + 2 or len(first) != rows or first.shape[2:] != size:
        raise ValueError(
            f"net: returned logits {tuple(first.shape)}, expected (N, K, *S) = {wanted} for its input; "
            "resample them to the input's grid, and return the finest first if there are several"
        )
    for number, coarse in enumerate(maps[1:], start=2):
        if coarse.ndim != first.ndim or coarse.shape[:2] != first.shape[:2]:
            raise ValueError(
                f"net: returned {tuple(coarse.shape)} as map {number} of {len(maps)}, expected logits "
                f"(N, K, *s) with N, K = {first.shape[0]}, {first.shape[1]}; switch off outputs that "
                "are not logits, or wrap a module that leaves them out"
            )
    return tuple(maps)


def resampled(layer: str, seen: Sequence[Any], logits: Tensor) -> Tensor:
    """The features that ``layer`` returned, on the grid of the logits."""
    if len(seen) != 1:
        raise ValueError(
            f"features: {layer} ran {len(seen)} times in one pass of the net; name a layer that runs once"
        )
    (features,) = seen
    if (
        not isinstance(features, Tensor)
        or features.ndim != logits.ndim
        or len(features) != len(logits)
    ):
        shape = tuple(features.shape) if isinstance(features, Tensor) else _kind(features)
        raise ValueError(
            f"features: {layer} returned {shape}, expected (N, C, *s) with N = {len(logits)} and "
            f"{logits.ndim - 2} spatial dimensions; name a layer that returns feature maps"
        )
    size = logits.shape[2:]
    if features.shape[2:] == size:
        return features
    return F.interpolate(features, size=size, mode=_LINEAR[len(size)])


def check_shape(method: str, logits: Tensor, expected: Tensor) -> None:
    if logits.shape != expected.shape:
        raise ValueError(
            f"net: {method} returned {tuple(logits.shape)}, expected (P, K, *S) = {tuple(expected.shape)}"
        )


def _kind(value: Any) -> str:
    """The type of a value, and of its parts."""
    if isinstance(value, (tuple, list)):
        return (
            f"a {type(value).__name__} of {', '.join(type(v).__name__ for v in value) or 'nothing'}"
        )
    return f"a {type(value).__name__}"
