"""Running a part of a computation again: with the same parameters, buffers and random numbers.

``torch.utils.checkpoint`` runs a module again during the backward pass, where the model's own
parameters would be in place. ``Substitution`` puts the parameters of the evaluation there, and
``placeholders`` refuse if no single value would be right. ``RandomState`` lets an inner step be
replayed with its dropout, and ``ReplayCheck`` makes sure that the replay was the same step.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from prism_meta.bilevel.functional.errors import CheckpointError, ReplayError
from prism_meta.bilevel.functional.kernels import autocast_type

T = TypeVar("T")


class Substitution(nn.Module):
    """Runs a function with the parameters and buffers of ``model`` temporarily replaced.

    Args:
        model: any module; it is not changed.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> Substitution(model).run({"weight": torch.ones(1, 1)}, lambda: model(torch.ones(1, 1)).item())
        1.0
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        #: Every name of every tensor here, and the first name in ``model`` of the same tensor.
        self.names: dict[str, str] = {}
        first: dict[int, str] = {}
        # ``named_modules`` lists a module once, also if it has two names (as in MONAI's DynUNet).
        # Under both names it would be replaced twice, and the replacement would be restored.
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
        """Call ``function`` with ``tensors`` in place; they have the model's own (first) names.

        If the function assigns a new tensor to a buffer, ``tensors`` holds it afterwards.
        """
        placed = {name: tensors[own] for name, own in self.names.items() if own in tensors}
        try:
            # ``names`` knows the tied tensors; tie_weights would search for them in every call.
            result: T = functional_call(self, placed, (function,), tie_weights=False)
            return result
        finally:
            tensors.update(
                {own: placed[name] for name, own in self.names.items() if name in placed}
            )


class _Placeholder(Tensor):
    """Stands for a parameter that has no single right value, and raises if it is used."""

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


def placeholders(names: Iterable[str]) -> dict[str, Tensor]:
    """Stand-ins for these parameters and buffers that raise if something computes with them."""
    result: dict[str, Tensor] = {}
    for name in names:
        placeholder = torch.empty(0).as_subclass(_Placeholder)
        placeholder.name_in_model = name
        result[name] = placeholder
    return result


@dataclass(frozen=True)
class RandomState:
    """The states of torch's generators (CPU and the model's device), of numpy's and of Python's."""

    device: torch.device
    cpu: Tensor
    on_device: Tensor | None
    numpy: Any
    python: Any

    @classmethod
    def capture(cls, device: torch.device) -> RandomState:
        """The present states."""
        on_device = None
        if device.type not in ("cpu", "meta"):
            on_device = torch.get_device_module(device).get_rng_state(device)
        return cls(
            device, torch.get_rng_state(), on_device, np.random.get_state(), random.getstate()
        )

    def restore(self) -> None:
        """Go back to these states."""
        torch.set_rng_state(self.cpu)
        if self.on_device is not None:
            torch.get_device_module(self.device).set_rng_state(self.on_device, self.device)
        np.random.set_state(self.numpy)
        random.setstate(self.python)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Within the context the numbers drawn after ``capture`` are drawn again."""
        present = RandomState.capture(self.device)
        self.restore()
        try:
            yield
        finally:
            present.restore()


class ReplayCheck:
    """Compares the losses of replayed inner steps with those of the steps that were taken.

    The losses are compared when all steps are done, which synchronises the device once.
    """

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor, float]] = []

    def add(self, taken: Tensor, replayed: Tensor, tolerance: float | None = None) -> None:
        """Note one step; ``tolerance`` is relative and defaults to the rounding of the loss's type."""
        if tolerance is None:
            dtype = taken.dtype
            device = autocast_type(taken.device)
            if torch.is_autocast_enabled(device):
                dtype = torch.get_autocast_dtype(device)
            tolerance = torch.finfo(dtype).eps ** 0.75
        self._pairs.append((taken.detach(), replayed.detach(), tolerance))

    def finish(self) -> None:
        """Raise if a step was not replayed as it was taken.

        Raises:
            ReplayError: the loss differs by more than rounding.
        """
        if not self._pairs or self._pairs[0][0].is_meta:
            return
        same = [torch.isclose(b, a, rtol=r, atol=r, equal_nan=True) for a, b, r in self._pairs]
        if torch.stack(same).all():
            return
        k = next(k for k, equal in reversed(list(enumerate(same))) if not equal)
        taken, replayed, _ = self._pairs[k]
        raise ReplayError(
            f"model: an inner step was recomputed with another result (loss {float(replayed):.6g} instead "
            f"of {float(taken):.6g}): forward depends on something that changed in between, e.g. a tensor "
            "attribute that it updates or random numbers from a generator of its own; register such a "
            "tensor as a buffer, or use SecondOrder(graph='stored')"
        )
