"""What cannot be differentiated, as errors that say what to do instead."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from prism_meta.errors import PrismError

#: What to do about an operation without a second derivative, by a part of its name.
REMEDIES = {
    "scaled_dot_product": (
        "call it through torch.nn.functional.scaled_dot_product_attention without choosing a backend"
    ),
    "cudnn_rnn": "run it within torch.backends.cudnn.flags(enabled=False)",
    "torch.compile": "pass the module that torch.compile was given",
    "once_differentiable": "write its backward pass with differentiable operations, without that mark",
}
_NO_SECOND_DERIVATIVE_NEEDED = "use FiniteDifference or FirstOrder, which need none"
_MISSING = re.compile(r"derivative for '?(?:aten::)?(\w+?)(?:_backward)?'? is not implemented")
_COMPILED = re.compile("does not currently support double backward|non-empty donated buffers")
_REENTRANT = "When use_reentrant=True"


class SecondDerivativeError(RuntimeError):
    """An operation of the model or the objective has no second derivative; the message has the fix."""


class HiddenParameterError(ValueError):
    """The loss reaches a parameter other than by its registered name, or reaches none.

    Args:
        where: names of the parameters, or ``objective``.
        what: what is wrong.
        advice: what to do about it.
    """

    def __init__(self, where: str, what: str, advice: str) -> None:
        super().__init__(f"{where}: {what}; {advice}")
        self.where, self.what, self.advice = where, what, advice


class ReplayError(RuntimeError):
    """An inner step that was recomputed is not the step that was taken."""


class NonFiniteError(PrismError, FloatingPointError):
    """A loss or a gradient is not finite; the parameters were left as they are."""


class CheckpointError(ValueError):
    """A checkpointed part of the model (``torch.utils.checkpoint``) cannot be differentiated this way.

    Args:
        module: its name in the model.
        what: what is wrong.
        advice: what to do about it.
    """

    def __init__(self, module: str, what: str, advice: str) -> None:
        super().__init__(f"model: {module} {what}; {advice}")
        self.module, self.what, self.advice = module, what, advice


@contextmanager
def translated() -> Iterator[None]:
    """Turn torch's messages about missing derivatives into errors that name the fix.

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
            message = "the output of torch.compile has no second derivative"
            raise SecondDerivativeError(f"{message}; {advice(message)}") from error
        # Only a missing derivative of a derivative; without even a first one torch's message stands.
        if not _MISSING.search(message) or "_backward" not in message:
            raise
        raise SecondDerivativeError(
            f"{operation(message)}; {advice(message)}; preflight(model, objective, batch) names the "
            "module"
        ) from error


def reentrant() -> CheckpointError:
    """The error for ``use_reentrant=True``; torch does not tell which module it belongs to."""
    return CheckpointError(
        "a part of it",
        "is checkpointed with use_reentrant=True, which torch differentiates only in backward()",
        "call torch.utils.checkpoint with use_reentrant=False",
    )


def operation(failure: str) -> str:
    """The operation that torch's message ``failure`` says has no second derivative."""
    found = _MISSING.search(failure)
    if found:
        return f"{found[1].lstrip('_')} has no second derivative"
    return failure.splitlines()[0]


def advice(failure: str) -> str:
    """What to do about ``failure``."""
    remedy = next((r for part, r in REMEDIES.items() if part in failure), None)
    return (
        f"{remedy}, or {_NO_SECOND_DERIVATIVE_NEEDED}" if remedy else _NO_SECOND_DERIVATIVE_NEEDED
    )
