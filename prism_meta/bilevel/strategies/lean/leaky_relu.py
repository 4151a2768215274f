"""What autograd saves: LeakyReLU keeps its output for its derivatives in place of its input.

Its derivative asks for the sign of the input, which is that of the output. The next convolution keeps
the output anyway, while nothing else keeps the input where a normalisation made it: of convolution,
normalisation and LeakyReLU a third of the activations need not be stored, and no number changes. Nets
that are written with ``inplace=True`` have it so.

Source: In-Place Activated BatchNorm (Rota Bulò et al., CVPR 2018), which keeps outputs alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node


class Outputs:
    """The outputs of LeakyReLUs that take the place of what these keep, from when a convolution has them.

    From then on torch itself refuses to differentiate if something changes such an output in place. One
    that no convolution took is kept in the end (``settle``) unless it was changed. Where saved tensors are
    in the charge of other hooks (``torch.utils.checkpoint``, ``save_on_cpu``), all stays as it is.
    """

    def __init__(self) -> None:
        self._pending: dict[Node, _Pending] = {}

    def keep(self, output: Tensor) -> None:
        """To be called with what a LeakyReLU returns."""
        node: Any = output.grad_fn
        # Not in place, which has another node. With a negative slope the signs of input and output differ.
        if node is None or node.name() != "LeakyReluBackward0" or node._saved_negative_slope < 0:
            return
        saved = _keep(node)
        if saved is not None:
            self._pending[node] = _Pending(saved, output.detach())

    def taken(self, tensor: Tensor) -> None:
        """To be called with what a convolution took."""
        pending = self._pending.pop(tensor.grad_fn, None) if tensor.grad_fn is not None else None
        if pending is not None:
            pending.settle()

    def settle(self) -> None:
        """To be called when the evaluation is over."""
        for pending in self._pending.values():
            pending.settle()
        self._pending.clear()


class _Saved:
    """What a node has in place of a tensor that it saved."""

    def __init__(self, tensor: Tensor) -> None:
        self.put(tensor)

    def put(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, tensor._version

    def get(self) -> Tensor:
        if self._tensor._version != self._version:  # as torch says of what it saved itself
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace "
                f"operation: the input or output of a LeakyReLU, of shape {tuple(self._tensor.shape)}"
            )
        return self._tensor


class _Pending:
    """An output that is to take the place of what is saved."""

    def __init__(self, saved: _Saved, output: Tensor) -> None:
        self._saved, self._output, self._version = saved, output, output._version

    def settle(self) -> None:
        if self._output._version == self._version:
            self._saved.put(self._output)


def _keep(node: Any) -> _Saved | None:
    """Have ``node``, and the node of its second derivative, share what is kept of their input."""
    saved: _Saved | None = None

    def pack(tensor: Tensor) -> _Saved:
        nonlocal saved
        saved = _Saved(tensor)
        return saved

    try:
        node._raw_saved_self.register_hooks(pack, _Saved.get)
    except RuntimeError:  # torch says so where there are hooks already
        return None
    assert saved is not None  # ``pack`` was called
    # Not a reference of its own: what the node gives free after its derivative is to be free.
    shared = weakref.ref(saved)

    def follow(inputs: Sequence[Tensor | None], outputs: Sequence[Tensor | None]) -> None:
        second: Any = None if inputs[0] is None else inputs[0].grad_fn
        kept = shared()
        if kept is None or second is None or second.name() != "LeakyReluBackwardBackward0":
            return
        with suppress(RuntimeError):
            second._raw_saved_self.register_hooks(lambda _: kept, _Saved.get)

    node.register_hook(follow)
    return saved
