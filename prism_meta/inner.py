"""Differentiable inner optimizers: the U of E1, phi_{k+1} = U(phi_k, g_k).

A pure pair after optax: ``init(params) -> state`` and ``update(grads, state, params) ->
(params, state)``. Nothing is changed in place, so autograd can go through every step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

Params = dict[str, Tensor]


class InnerOptimizer(ABC):
    """Base of the differentiable inner optimizers. A new one writes the two methods below."""

    @abstractmethod
    def init(self, params: Params) -> Any:
        """The state before the first step."""

    @abstractmethod
    def update(self, grads: Params, state: Any, params: Params) -> tuple[Params, Any]:
        """One step: new parameters and new state; neither argument is changed."""


class SGD(InnerOptimizer):
    """Stochastic gradient descent, phi - lr * g, with torch.optim.SGD's momentum and weight decay.

    Args:
        lr: inner rate eta_in; a tensor gets a gradient.
        momentum: 0 for none.
        nesterov: look-ahead momentum; needs ``momentum`` > 0.
        weight_decay: L2 penalty added to the gradient.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> import torch
        >>> sgd = SGD(lr=0.5)
        >>> params = {"w": torch.tensor([1.0])}
        >>> sgd.update({"w": torch.tensor([2.0])}, sgd.init(params), params)[0]
        {'w': tensor([0.])}
    """

    def __init__(
        self,
        lr: float | Tensor,
        *,
        momentum: float | Tensor = 0.0,
        nesterov: bool = False,
        weight_decay: float | Tensor = 0.0,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if not isinstance(value, Tensor) and value < 0:
                raise ValueError(f"{name}: got {value}, expected a number >= 0")
        if nesterov and _is_zero(momentum):
            raise ValueError(
                "nesterov: needs momentum > 0; give SGD(lr, momentum=0.9, nesterov=True)"
            )
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.nesterov = nesterov

    def init(self, params: Params) -> Params:
        return {}

    def update(self, grads: Params, state: Params, params: Params) -> tuple[Params, Params]:
        new_params, new_state = {}, {}
        for name, param in params.items():
            step = grads[name]
            if not _is_zero(self.weight_decay):
                step = step + self.weight_decay * param
            if not _is_zero(self.momentum):
                # As in torch.optim.SGD, the first velocity is the gradient itself.
                velocity = self.momentum * state[name] + step if name in state else step
                new_state[name] = velocity
                step = step + self.momentum * velocity if self.nesterov else velocity
            new_params[name] = param - self.lr * step
        return new_params, new_state


def _is_zero(value: float | Tensor) -> bool:
    """A plain 0 switches a term off; a tensor never does, for it may be learned."""
    return not isinstance(value, Tensor) and value == 0
