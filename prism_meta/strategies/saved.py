"""What autograd saves: LeakyReLU keeps its output for its derivatives in place of its input.

Its derivative asks for the sign of the input, which is that of the output. The next convolution keeps
the output anyway, while nothing else keeps the input where a normalisation made it: of convolution,
normalisation and LeakyReLU a third of the activations need not be stored, and no number changes. Nets
that are written with ``inplace=True`` have it so.

Source: In-Place Activated BatchNorm (Rota Bulò et al., CVPR 2018), which keeps outputs alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode


class OutputsForInputs(TorchFunctionMode):
    """A LeakyReLU called within this context keeps its output from when a convolution has taken it.

    From then on torch itself refuses to differentiate if something changes it in place. One that no
    convolution took is kept when the context ends, unless it was changed. Where saved tensors are in the
    charge of other hooks (``torch.utils.checkpoint``, ``save_on_cpu``), all stays as it is.

    Example:
        >>> import torch
        >>> x = torch.tensor([-1.0, 1.0], requires_grad=True)
        >>> with OutputsForInputs():
        ...     y = torch.nn.functional.leaky_relu(2 * x)  # its graph holds y now, and not 2 x
        >>> y.sum().backward()
        >>> x.grad
        tensor([0.0200, 2.0000])
    """

    def __init__(self) -> None:
        super().__init__()
        self._pending: dict[Node | None, _Pending] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        node: Any = out.grad_fn if isinstance(out, Tensor) else None
        name = "" if node is None else node.name()
        # With a negative slope the signs of input and output differ.
        if name == "LeakyReluBackward0" and node._saved_negative_slope >= 0:
            saved = _keep(node)
            if saved is not None:
                self._pending[node] = _Pending(saved, out.detach())
        elif name == "ConvolutionBackward0" and args:
            taken = self._pending.pop(getattr(args[0], "grad_fn", None), None)
            if taken is not None:
                taken.settle()
        return out

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
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
