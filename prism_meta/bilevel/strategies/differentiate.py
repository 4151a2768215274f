"""Derivatives of a model as a function of parameters, and clear errors where torch has none.

``torch.utils.checkpoint`` runs a part of the model again while it is differentiated. So a graph of one
evaluation is differentiated with that evaluation's parameters and buffers in place (``Stage``), and
one of several with placeholders that refuse to be used (``misplaced``): a recomputation is right or an
error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

T = TypeVar("T")
#: What to do about an operation without a second derivative, by a part of its name.
REMEDIES = {
    "scaled_dot_product": (
        "run it within torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
    ),
    "cudnn_rnn": "run it within torch.backends.cudnn.flags(enabled=False)",
    "torch.compile": "use the module that was given to it",
    "once_differentiable": "write its backward pass with differentiable operations, without that mark",
}
_WITHOUT_SECOND_DERIVATIVE = "use FiniteDifference or FirstOrder, which need none"
_MISSING = re.compile(r"derivative for '?(?:aten::)?(\w+?)(?:_backward)?'? is not implemented")
_COMPILED = re.compile("does not currently support double backward|non-empty donated buffers")
_REENTRANT = "When use_reentrant=True"


class SecondDerivativeError(RuntimeError):
    """An operation of the model or the objective has no second derivative; the message says what to do."""


class CheckpointError(ValueError):
    """A part of the model that is checkpointed cannot be differentiated in this way.

    Args:
        module: its name in the model.
        what: what is wrong.
        advice: what to do about it.
    """

    def __init__(self, module: str, what: str, advice: str) -> None:
        super().__init__(f"model: {module} {what}; {advice}")
        self.module, self.what, self.advice = module, what, advice


class Stage(nn.Module):
    """Runs functions while the parameters and buffers of ``model`` are others.

    Args:
        model: any module; it is not changed.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> Stage(model).run({"weight": torch.ones(1, 1)}, lambda: model(torch.ones(1, 1)).item())
        1.0
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        #: Every name of every tensor here, and the first name in ``model`` of the same tensor.
        self.names: dict[str, str] = {}
        first: dict[int, str] = {}
        # A module under two names (MONAI's DynUNet) has its tensors replaced and put back once: the
        # second time, what is put back would be the replacement.
        for path, module in self.named_modules():
            for tensors in (module._parameters, module._buffers):
                for attribute, tensor in tensors.items():
                    if tensor is not None:
                        name = f"{path}.{attribute}"
                        own = first.setdefault(id(tensor), name.removeprefix("model."))
                        self.names[name] = own

    def forward(self, function: Callable[[], T]) -> T:
        return function()

    def run(self, tensors: dict[str, Tensor], function: Callable[[], T]) -> T:
        """``function()`` with ``tensors``, by their first names, in place; one is tied if the model's is.

        Where the function replaces a buffer, ``tensors`` has the new one afterwards.
        """
        placed = {name: tensors[own] for name, own in self.names.items() if own in tensors}
        try:
            # Not with tie_weights, which looks for them anew in every call.
            result: T = functional_call(self, placed, (function,), tie_weights=False)
            return result
        finally:
            tensors.update(
                {own: placed[name] for name, own in self.names.items() if name in placed}
            )


class _Misplaced(Tensor):
    """Takes a parameter's place where no value would be right: whoever computes with it is told so."""

    name_in_model: str

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        names = [t.name_in_model for t in tree_leaves((args, kwargs)) if isinstance(t, cls)]
        module = names[0].rpartition(".")[0] or "model"
        raise CheckpointError(
            module,
            "runs again in the backward pass (torch.utils.checkpoint), in a graph of several "
            "evaluations at different parameters",
            "use SecondOrder(graph='recomputed'), or switch checkpointing off",
        )


def misplaced(names: Iterable[str]) -> dict[str, Tensor]:
    """Placeholders for these parameters and buffers, which cannot be computed with."""
    placeholders: dict[str, Tensor] = {}
    for name in names:
        placeholder = torch.empty(0).as_subclass(_Misplaced)
        placeholder.name_in_model = name
        placeholders[name] = placeholder
    return placeholders


@contextmanager
def explained() -> Iterator[None]:
    """Turn what torch says of a derivative that it does not have into what to do about it.

    Raises:
        SecondDerivativeError: an operation has no second derivative.
        CheckpointError: a checkpoint was made with ``use_reentrant=True``.
    """
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        if message.startswith(_REENTRANT):
            raise reentrant() from error
        if _COMPILED.search(message):
            message = "what torch.compile makes has no second derivative"
            raise SecondDerivativeError(f"{message}; {advice(message)}") from error
        # The first derivative's backward has none; an operation without even that is another matter.
        if not _MISSING.search(message) or "_backward" not in message:
            raise
        raise SecondDerivativeError(
            f"{operation(message)}; {advice(message)}; preflight(model, objective, batch) names the "
            "module"
        ) from error


def reentrant() -> CheckpointError:
    """The error of a checkpoint with ``use_reentrant=True``; nothing tells which module's it is."""
    return CheckpointError(
        "a part of it",
        "is checkpointed with use_reentrant=True, which torch differentiates in backward() alone",
        "call torch.utils.checkpoint with use_reentrant=False",
    )


def operation(failure: str) -> str:
    """The operation that ``failure``, torch's message, says has no second derivative."""
    found = _MISSING.search(failure)
    if found:
        return f"{found[1].lstrip('_')} has no second derivative"
    return failure.splitlines()[0]


def advice(failure: str) -> str:
    """What to do about it."""
    remedy = next((r for part, r in REMEDIES.items() if part in failure), None)
    return f"{remedy}, or {_WITHOUT_SECOND_DERIVATIVE}" if remedy else _WITHOUT_SECOND_DERIVATIVE
