"""Differentiable inner optimizers: the U of E1, phi_{k+1} = U(phi_k, g_k).

A pure pair after optax: ``init(params) -> state`` and ``update(grads, state, params) ->
(params, state)``. Nothing is changed in place, so autograd can go through every step. One step
equals the optimizer of the same name in ``torch.optim``, and the state has that optimizer's own form,
so that the two can share it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Params = dict[str, Tensor]
#: Per parameter what ``torch.optim`` keeps for it, e.g. ``{"weight": {"momentum_buffer": ...}}``.
State = dict[str, dict[str, Tensor]]


class InnerOptimizer(nn.Module, ABC):
    """Base of the differentiable inner optimizers. A new one writes ``init`` and ``update``.

    Hyper-parameters may be tensors: ``update`` is differentiable with respect to them. Those given as
    ``nn.Parameter`` are learned: strategies return their gradients in ``MetaGradient.hyper_gradient``.
    """

    #: The optimizer of ``torch.optim`` whose state has the same form, if there is one.
    torch_optimizer: ClassVar[type[Optimizer] | None] = None

    @abstractmethod
    def init(self, params: Params) -> State:
        """The state before the first step."""

    @abstractmethod
    def update(self, grads: Params, state: State, params: Params) -> tuple[Params, State]:
        """One step: new parameters and new state; none of the arguments is changed."""

    def hyper_parameters(self) -> Params:
        """The hyper-parameters that get a gradient, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


class SGD(InnerOptimizer):
    """Stochastic gradient descent, phi - lr * g, with momentum and weight decay.

    Args:
        lr: inner rate eta_in.
        momentum: 0 for none.
        nesterov: look-ahead momentum; needs ``momentum`` > 0.
        weight_decay: L2 penalty added to the gradient.

    Each number may be a tensor; see ``InnerOptimizer``.

    Raises:
        ValueError: a number is out of range.

    Source: ``torch.optim.SGD``, which it equals step by step.

    Example:
        >>> sgd = SGD(lr=0.5)
        >>> params = {"w": torch.tensor([1.0])}
        >>> sgd.update({"w": torch.tensor([2.0])}, sgd.init(params), params)[0]
        {'w': tensor([0.])}
    """

    torch_optimizer = torch.optim.SGD

    def __init__(
        self,
        lr: float | Tensor,
        momentum: float | Tensor = 0.0,
        nesterov: bool = False,
        weight_decay: float | Tensor = 0.0,
    ) -> None:
        super().__init__()
        _check_not_negative(lr=lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and _is_zero(momentum):
            raise ValueError(
                "nesterov: needs momentum > 0; give SGD(lr, momentum=0.9, nesterov=True)"
            )
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.nesterov = nesterov

    def init(self, params: Params) -> State:
        return {name: {} for name in params}

    def update(self, grads: Params, state: State, params: Params) -> tuple[Params, State]:
        new_params, new_state = {}, {}
        for name, param in params.items():
            step = _with_decay(grads[name], param, self.weight_decay)
            new_state[name] = dict(state[name])
            if not _is_zero(self.momentum):
                # As in torch.optim.SGD, the first velocity is the gradient itself.
                last = state[name].get("momentum_buffer")
                velocity = step if last is None else self.momentum * last + step
                new_state[name]["momentum_buffer"] = velocity
                step = step + self.momentum * velocity if self.nesterov else velocity
            new_params[name] = param - self.lr * step
        return new_params, new_state


class Adam(InnerOptimizer):
    """Adam, with a gradient that stays finite where a gradient is exactly zero.

    Args:
        lr: inner rate eta_in.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the root of the second moment; a number > 0, for its inverse bounds the gradient.
        weight_decay: L2 penalty added to the gradient.

    Each number may be a tensor; see ``InnerOptimizer``.

    Raises:
        ValueError: a number is out of range.

    Source: Kingma and Ba, ICLR 2015; ``torch.optim.Adam``, which it equals step by step.

    Example:
        >>> adam = Adam(lr=0.1)
        >>> params = {"w": torch.tensor([1.0])}
        >>> adam.update({"w": torch.tensor([2.0])}, adam.init(params), params)[0]
        {'w': tensor([0.9000])}
    """

    torch_optimizer: ClassVar[type[Optimizer] | None] = torch.optim.Adam

    def __init__(
        self,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 0.0,
    ) -> None:
        super().__init__()
        _check_not_negative(lr=lr, weight_decay=weight_decay)
        self.beta1, self.beta2 = betas
        for name, value in (("betas[0]", self.beta1), ("betas[1]", self.beta2)):
            if not isinstance(value, Tensor) and not 0 <= value < 1:
                raise ValueError(f"{name}: got {value}, expected a number in [0, 1)")
        if not isinstance(eps, Tensor) and not eps > 0:
            raise ValueError(f"eps: got {eps}, expected a number > 0")
        self.lr, self.eps, self.weight_decay = lr, eps, weight_decay

    def init(self, params: Params) -> State:
        return {
            name: {
                "step": torch.tensor(0.0),  # on the CPU, as torch.optim has it
                "exp_avg": torch.zeros_like(param),
                "exp_avg_sq": torch.zeros_like(param),
            }
            for name, param in params.items()
        }

    def update(self, grads: Params, state: State, params: Params) -> tuple[Params, State]:
        new_params, new_state = {}, {}
        for name, param in params.items():
            decayed, grad = self._decay(param, grads[name])
            last = state[name] or self.init({name: param})[name]
            step = last["step"] + 1
            count = float(step)  # it is on the CPU
            mean = self.beta1 * last["exp_avg"] + (1 - self.beta1) * grad
            square = self.beta2 * last["exp_avg_sq"] + (1 - self.beta2) * grad * grad
            root = _sqrt(square) / (1 - self.beta2**count) ** 0.5 + self.eps
            change = (self.lr / (1 - self.beta1**count)) * (mean / root)
            # A 0-d parameter would take on the type of a hyper-parameter of a wider one.
            new_params[name] = decayed - change.to(param.dtype)
            new_state[name] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
        return new_params, new_state

    def _decay(self, param: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The parameter to start from and the gradient to follow."""
        return param, _with_decay(grad, param, self.weight_decay)


class AdamW(Adam):
    """Adam with decoupled weight decay: phi shrinks by lr * weight_decay, whatever the moments.

    Args:
        lr: inner rate eta_in.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the root of the second moment, > 0.
        weight_decay: relative to lr.

    Source: Loshchilov and Hutter, ICLR 2019; ``torch.optim.AdamW``, which it equals step by step.

    Example:
        >>> adamw = AdamW(lr=0.1, weight_decay=1.0)
        >>> params = {"w": torch.tensor([1.0])}
        >>> adamw.update({"w": torch.tensor([0.0])}, adamw.init(params), params)[0]
        {'w': tensor([0.9000])}
    """

    torch_optimizer = torch.optim.AdamW

    def __init__(
        self,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 1e-2,
    ) -> None:
        super().__init__(lr, betas, eps, weight_decay)

    def _decay(self, param: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        return param * (1 - self.lr * self.weight_decay), grad


class MetaSGD(InnerOptimizer):
    """SGD with a learned rate for every single parameter: phi - rate * g, elementwise.

    Args:
        params: what will be adapted, a module or parameters by name; shapes the rates.
        lr: the rate that all start from.

    The rates are in ``hyper_parameters()``; give ``optimizer`` of ``MetaLearner`` these parameters too.

    Raises:
        ValueError: ``lr`` is negative, or a parameter has no rate here.

    Source: Meta-SGD (Li et al., 2017).

    Example:
        >>> model = nn.Linear(2, 1)
        >>> inner = MetaSGD(model, lr=0.1)
        >>> {name: rate.shape for name, rate in inner.hyper_parameters().items()}
        {'rates.bias': torch.Size([1]), 'rates.weight': torch.Size([1, 2])}
    """

    def __init__(self, params: nn.Module | Mapping[str, Tensor], lr: float = 0.01) -> None:
        super().__init__()
        _check_not_negative(lr=lr)
        named = dict(params.named_parameters()) if isinstance(params, nn.Module) else params
        self.rates = nn.ParameterDict(
            {_key(n): nn.Parameter(torch.full_like(p, lr)) for n, p in named.items()}
        )

    def init(self, params: Params) -> State:
        unknown = [name for name in params if _key(name) not in self.rates]
        if unknown:
            raise ValueError(
                f"MetaSGD: no rate for {', '.join(unknown)}; make it from the model that is adapted"
            )
        return {name: {} for name in params}

    def update(self, grads: Params, state: State, params: Params) -> tuple[Params, State]:
        new_params = {n: p - self.rates[_key(n)] * grads[n] for n, p in params.items()}
        return new_params, state


def _key(name: str) -> str:
    """A module's attribute cannot hold a dot."""
    return name.replace(".", "/")


def _with_decay(grad: Tensor, param: Tensor, weight_decay: float | Tensor) -> Tensor:
    return grad if _is_zero(weight_decay) else grad + weight_decay * param


def _sqrt(square: Tensor) -> Tensor:
    """sqrt, with derivative 0 at 0 instead of infinity; there the first moment is 0 as well."""
    if not square.requires_grad:
        return square.sqrt()
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def _is_zero(value: float | Tensor) -> bool:
    """A plain 0 switches a term off; a tensor never does, for it may be learned."""
    return not isinstance(value, Tensor) and value == 0


def _check_not_negative(**values: float | Tensor) -> None:
    for name, value in values.items():
        if not isinstance(value, Tensor) and not value >= 0:
            raise ValueError(f"{name}: got {value}, expected a number >= 0")
