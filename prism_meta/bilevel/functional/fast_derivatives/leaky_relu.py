"""LeakyReLU saves its output for its derivatives instead of its input.

The derivative depends on the sign of the input, which is also that of the output. The next convolution
saves the output anyway, while nothing else saves the input if a normalisation made it. In a chain of
convolution, normalisation and LeakyReLU this saves a third of the activations, and no number changes.
Nets written with ``inplace=True`` have the same saving.

Source: In-Place Activated BatchNorm (Rota Bulò et al., CVPR 2018), which keeps only outputs.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node


class SavedOutputs:
    """Replaces what LeakyReLUs saved by their outputs, as soon as a convolution has saved these too.

    From then on torch itself refuses to differentiate if such an output is changed in place. Outputs
    that no convolution consumed are saved at the end (``finish``), unless they were changed. If other
    hooks manage saved tensors (``torch.utils.checkpoint``, ``save_on_cpu``), nothing is replaced.
    """

    def __init__(self) -> None:
        self._pending: dict[Node, _Pending] = {}

    def add(self, output: Tensor) -> None:
        """Call this with what a LeakyReLU returns."""
        node: Any = output.grad_fn
        # In-place calls have another node. With a negative slope input and output differ in sign.
        if node is None or node.name() != "LeakyReluBackward0" or node._saved_negative_slope < 0:
            return
        saved = _share_saved_input(node)
        if saved is not None:
            self._pending[node] = _Pending(saved, output.detach())

    def consumed_by_convolution(self, tensor: Tensor) -> None:
        """Call this with the input of a convolution."""
        pending = self._pending.pop(tensor.grad_fn, None) if tensor.grad_fn is not None else None
        if pending is not None:
            pending.replace()

    def finish(self) -> None:
        """Call this after the evaluation."""
        for pending in self._pending.values():
            pending.replace()
        self._pending.clear()


class _Saved:
    """The tensor that a node saved, or the one that replaced it."""

    def __init__(self, tensor: Tensor) -> None:
        self.put(tensor)

    def put(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, tensor._version

    def get(self) -> Tensor:
        if self._tensor._version != self._version:  # torch's own check and message
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace "
                f"operation: the input or output of a LeakyReLU, of shape {tuple(self._tensor.shape)}"
            )
        return self._tensor


class _Pending:
    """An output that will replace what was saved."""

    def __init__(self, saved: _Saved, output: Tensor) -> None:
        self._saved, self._output, self._version = saved, output, output._version

    def replace(self) -> None:
        if self._output._version == self._version:
            self._saved.put(self._output)


def _share_saved_input(node: Any) -> _Saved | None:
    """Let ``node`` and the node of its second derivative share one saved tensor."""
    saved: _Saved | None = None

    def pack(tensor: Tensor) -> _Saved:
        nonlocal saved
        saved = _Saved(tensor)
        return saved

    try:
        node._raw_saved_self.register_hooks(pack, _Saved.get)
    except RuntimeError:  # there are hooks already
        return None
    assert saved is not None  # ``pack`` was called
    # A weak reference: what the node frees after its derivative must not stay alive here.
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
