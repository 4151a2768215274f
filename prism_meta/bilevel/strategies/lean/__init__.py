"""Second derivatives for which torch takes more time or memory than it takes, the same to rounding.

``normalization``: torch computes the derivative's derivative in some sixty operations, several of which
copy whole images; here it follows from five sums. ``leaky_relu``: torch keeps the input, which nothing
else needs; here the output is kept.

Nothing is patched: ``Lean`` is a context in which a model's calls of these operations are seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812, torch's own convention
from torch.overrides import TorchFunctionMode

from prism_meta.bilevel.strategies.lean import normalization
from prism_meta.bilevel.strategies.lean.leaky_relu import Outputs

_CONVOLUTIONS = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d
}  # fmt: skip


class Lean(TorchFunctionMode):
    """Operations called within this context have the derivatives of this package.

    All is torch's own where it runs again while it is differentiated (``torch.utils.checkpoint``), and
    where it is compiled.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 4, 8, 8, requires_grad=True)
        >>> with Lean():
        ...     y = F.group_norm(x, 2)
        >>> torch.allclose(y, F.group_norm(x, 2), atol=1e-6)
        True
        >>> y.grad_fn.name(), F.group_norm(x, 2).grad_fn.name()
        ('_GroupNormBackward', 'NativeGroupNormBackward0')
    """

    def __init__(self) -> None:
        super().__init__()
        self._outputs = Outputs()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # would take the derivative of a derivative for 0
            return func(*args, **kwargs)
        own = normalization.OWN.get(func)
        out = None if own is None else own(*args, **kwargs)
        if out is None:
            out = func(*args, **kwargs)
        if func is F.leaky_relu:
            self._outputs.keep(out)
        elif func in _CONVOLUTIONS and args:
            self._outputs.taken(args[0])
        return out

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._outputs.settle()
