"""Kernels with second derivatives, chosen where these are needed.

The fast kernels of attention and cuDNN's recurrent layers have only a first derivative. An evaluation
that will be differentiated twice uses attention's math backend and torch's own recurrent layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import _VF
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_RECURRENT = {_VF.lstm, _VF.gru, _VF.rnn_tanh, _VF.rnn_relu}
#: Parts of the names of graph nodes of kernels that are replaced, and what replaces them.
REPLACED = {
    "ScaledDotProduct": "attention runs its math backend, whose memory grows with the square of the tokens",
    "CudnnRnn": "recurrent layers run without cuDNN",
}


class _RecurrentWithoutCudnn(TorchFunctionMode):
    """Switches cuDNN off for recurrent layers, and only for them."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func not in _RECURRENT:
            return func(*args, **(kwargs or {}))
        with torch.backends.cudnn.flags(enabled=False):
            return func(*args, **(kwargs or {}))


def autocast_type(device: torch.device) -> str:
    """The device type whose autocast applies on ``device``: its own, or "cpu" if it has none.

    The meta device, on which memory is estimated, has none.
    """
    return device.type if torch.amp.is_autocast_available(device.type) else "cpu"


def has_cudnn() -> bool:
    """Whether anything can run on cuDNN. Torch's builds have it without a GPU, too."""
    return torch.cuda.is_available() and torch.backends.cudnn.is_available()


@contextmanager
def differentiable(twice: bool) -> Iterator[None]:
    """Within the context kernels have second derivatives if ``twice``, else torch chooses freely."""
    if not twice:
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        if not has_cudnn():
            yield
            return
        with _RecurrentWithoutCudnn():
            yield
