"""Derivatives that equal torch's to rounding and take less time or memory.

``normalization``: torch composes the second derivative of group and instance normalisation of some
sixty operations, several of which copy whole images; here it follows from five sums. ``leaky_relu``:
torch keeps the input for the derivatives, which nothing else needs; here the output is kept.

Nothing is patched: within ``fast_derivatives`` a model's calls of these operations are intercepted.
The package relies on private parts of torch, so it checks itself once in a process, and leaves all
derivatives to torch if a result differs.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, torch's own convention
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from prism_meta.bilevel.functional.fast_derivatives import normalization
from prism_meta.bilevel.functional.fast_derivatives.leaky_relu import SavedOutputs

#: Inputs with fewer values keep torch's own derivatives, which are faster for them. Measured on a CPU;
#: LeakyReLU saves memory only, and not much for small inputs.
SMALLEST: Mapping[Callable[..., Any], int] = {
    F.instance_norm: 2**13,
    F.group_norm: 2**17,
    F.leaky_relu: 2**17,
}
_CONVOLUTIONS = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d
}  # fmt: skip
#: All other operations pass through, with as little work as possible: a net makes hundreds of such calls.
_INTERCEPTED = {*normalization.REPLACEMENTS, F.leaky_relu, *_CONVOLUTIONS}
_enabled: ContextVar[bool] = ContextVar("fast_derivatives", default=True)


def least_arguments(modules: Iterable[nn.Module]) -> int:
    """The number of values from which a model with these modules gains, in the largest of its arguments.

    Interception takes time in every operation. Features of a net have more values than its image, so that
    group normalisation gains from half of its own threshold on; instance normalisation gains everywhere.
    """
    if any(isinstance(module, _InstanceNorm) for module in modules):
        return SMALLEST[F.instance_norm]
    return SMALLEST[F.group_norm] // 2


def fast_derivatives(arguments: Any, least: int = 0) -> AbstractContextManager[Any]:
    """The context in which a model is called; the one entry point.

    Args:
        arguments: of the call, a tree.
        least: see ``least_arguments``. Defaults to none.
    """
    size = max((t.numel() for t in tree_leaves(arguments) if isinstance(t, Tensor)), default=0)
    if size < least or not _enabled.get() or not _agrees_with_torch():
        return nullcontext()
    return Interception(SMALLEST)


@contextmanager
def use_fast_derivatives(enabled: bool) -> Iterator[None]:
    """Switch these derivatives on or off within the context. They are on by default.

    Args:
        enabled: whether to use them.

    Yields:
        None.

    Example:
        >>> with use_fast_derivatives(False):
        ...     isinstance(fast_derivatives(torch.zeros(10**6)), nullcontext)
        True
    """
    token = _enabled.set(enabled)
    try:
        yield
    finally:
        _enabled.reset(token)


class Interception(TorchFunctionMode):
    """Operations called within this context have the derivatives of this package.

    Torch's own derivatives remain in parts that run again during the backward pass
    (``torch.utils.checkpoint``) and in compiled ones.

    Args:
        smallest: operation -> the least number of values of its input. Defaults to any number.

    Example:
        >>> x = torch.randn(2, 4, 8, 8, requires_grad=True)
        >>> with Interception():
        ...     y = F.group_norm(x, 2)
        >>> torch.allclose(y, F.group_norm(x, 2), atol=1e-6)
        True
        >>> y.grad_fn.name(), F.group_norm(x, 2).grad_fn.name()
        ('_GroupNormBackward', 'NativeGroupNormBackward0')
    """

    def __init__(self, smallest: Mapping[Callable[..., Any], int] | None = None) -> None:
        super().__init__()
        self._smallest = smallest or {}
        self._outputs = SavedOutputs()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # A compiled part would take the derivative of a derivative for 0.
        if func not in _INTERCEPTED or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        smallest = self._smallest.get(func)
        if smallest is not None and (not args or args[0].numel() < smallest):
            return func(*args, **kwargs)
        replacement = normalization.REPLACEMENTS.get(func)
        out = None if replacement is None else replacement(*args, **kwargs)
        if out is None:
            out = func(*args, **kwargs)
        if func is F.leaky_relu:
            self._outputs.add(out)
        elif func in _CONVOLUTIONS and args:
            self._outputs.consumed_by_convolution(args[0])
        return out

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._outputs.finish()


@functools.cache
def _agrees_with_torch() -> bool:
    """Whether the derivatives here are torch's; a warning says so once if they are not."""
    try:
        with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
            torch.manual_seed(0)
            x = torch.randn(2, 4, 6, dtype=torch.float64)
            kernel = torch.randn(3, 4, 1, dtype=torch.float64)
            with torch.enable_grad(), torch.inference_mode(False):
                plain = _derivatives(x, kernel, nullcontext())
                fast = _derivatives(x, kernel, Interception())
        agrees = all(torch.allclose(f, p, rtol=1e-9) for f, p in zip(fast, plain, strict=True))
        reason = "their values differ"
    except Exception as error:
        agrees, reason = False, f"{type(error).__name__}: {error}"
    if not agrees:
        warnings.warn(
            f"fast derivatives are switched off: they do not fit torch {torch.__version__} ({reason}); "
            "results are not affected, training is slower",
            stacklevel=2,
        )
    return agrees


def _derivatives(x: Tensor, kernel: Tensor, context: AbstractContextManager[Any]) -> list[Tensor]:
    """Value, first and second derivatives of a small net with every operation of this package."""
    x, kernel = (t.clone().requires_grad_() for t in (x, kernel))
    with context:
        hidden = F.leaky_relu(F.group_norm(x, 2) + F.instance_norm(x), 0.1)
        loss = F.conv1d(hidden, kernel).square().sum()
    first = torch.autograd.grad(loss, (x, kernel), create_graph=True)
    second = torch.autograd.grad([g.square().sum() for g in first], (x, kernel))
    return [loss, *first, *second]
