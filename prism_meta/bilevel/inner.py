"""Differentiable inner optimizers: the U of E1, phi_{k+1} = U(phi_k, g_k).

Each is a pure pair as in optax: ``init(params) -> state`` and ``update(grads, state, params) ->
(params, state)``. Nothing is changed in place, so autograd can go through every step. One step
equals the optimizer of the same name in ``torch.optim``, and the state has the same form, so that the
two can share it. Complex parameters are treated as pairs of real ones, as torch treats them.

In the recursions below g is the gradient, phi the parameters, t the number of the step from 1, and all
operations are elementwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prism_meta.bilevel.functional.trees import Params, State


class InnerOptimizer(nn.Module, ABC):
    """Base of the differentiable inner optimizers. A new one writes ``init`` and ``update``.

    Hyper-parameters may be tensors, and ``update`` is differentiable with respect to them. Pass one as
    ``nn.Parameter`` to learn it: strategies return its gradient in ``MetaGradient.hyper_gradient``, and
    the outer optimizer has to hold it.

    Strategies differentiate ``update`` with respect to every floating-point tensor of the state. Detach
    those that count steps before you convert them to Python numbers, as ``Adam`` does.
    """

    #: The optimizer of ``torch.optim`` whose state has the same form, if there is one.
    torch_optimizer: ClassVar[type[Optimizer] | None] = None

    @abstractmethod
    def init(self, params: Params) -> State:
        """The state before the first step.

        Args:
            params: the parameters that the inner steps move, by name.

        Returns:
            For each of these names, the tensors of its state.
        """

    @abstractmethod
    def update(self, grads: Params, state: State, params: Params) -> tuple[Params, State]:
        """One step; none of the arguments is changed.

        Args:
            grads: the gradient of each parameter, by name.
            state: what ``init``, or the step before, returned.
            params: the parameters, with the names and shapes of ``grads``.

        Returns:
            The new parameters and the new state.
        """

    def hyper_parameters(self) -> Params:
        """The learned hyper-parameters, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


class SGD(InnerOptimizer):
    """Stochastic gradient descent with momentum and weight decay.

    The recursion, with v_1 = g_1 in the first step, is

        g <- g + weight_decay phi
        v <- momentum v + g
        phi <- phi - lr v                    (nesterov: phi - lr (g + momentum v))

    Args:
        lr: inner rate eta_in.
        momentum: factor of the velocity; 0 switches it off.
        nesterov: Nesterov's momentum; needs ``momentum`` > 0.
        weight_decay: L2 penalty added to the gradient.

    Each number may be a tensor, see ``InnerOptimizer``.

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
    """Adam, whose derivative stays finite where a gradient is exactly zero.

    The recursion is

        g <- g + weight_decay phi
        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        phi <- phi - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Args:
        lr: inner rate eta_in.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the root of the second moment; > 0, as its inverse bounds the derivative.
        weight_decay: L2 penalty added to the gradient.

    Each number may be a tensor, see ``InnerOptimizer``.

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
            step = last["step"].detach() + 1
            count = float(step)  # it is on the CPU
            grad = _as_real(grad)
            mean = self.beta1 * _as_real(last["exp_avg"]) + (1 - self.beta1) * grad
            square = self.beta2 * _as_real(last["exp_avg_sq"]) + (1 - self.beta2) * grad * grad
            root = _sqrt(square) / (1 - self.beta2**count) ** 0.5 + self.eps
            change = (self.lr / (1 - self.beta1**count)) * (mean / root)
            # A 0-d parameter would take on the type of a wider hyper-parameter.
            new_params[name] = decayed - _as_type_of(param, change).to(param.dtype)
            new_state[name] = {
                "step": step,
                "exp_avg": _as_type_of(param, mean),
                "exp_avg_sq": _as_type_of(param, square),
            }
        return new_params, new_state

    def _decay(self, param: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The parameter to start from and the gradient to follow."""
        return param, _with_decay(grad, param, self.weight_decay)


class AdamW(Adam):
    """Adam with decoupled weight decay: the decay does not enter the moments.

    The recursion is

        phi <- phi - lr weight_decay phi
        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        phi <- phi - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

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
    """SGD with a learned rate for every number of every parameter.

    The recursion is

        phi <- phi - rate g

    Args:
        params: what will be adapted: a module, or parameters by name.
        lr: the value that all rates start from.

    The rates are the ``hyper_parameters()``: the outer optimizer has to hold them too.

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
            {_key(n): nn.Parameter(torch.full_like(_as_real(p), lr)) for n, p in named.items()}
        )

    def init(self, params: Params) -> State:
        unknown = [name for name in params if _key(name) not in self.rates]
        if unknown:
            raise ValueError(
                f"MetaSGD: no rate for {', '.join(unknown)}; make it from the model that is adapted"
            )
        return {name: {} for name in params}

    def update(self, grads: Params, state: State, params: Params) -> tuple[Params, State]:
        new_params = {
            n: p - _as_type_of(p, self.rates[_key(n)] * _as_real(grads[n]))
            for n, p in params.items()
        }
        return new_params, state


def _key(name: str) -> str:
    """A module's attribute cannot hold a dot."""
    return name.replace(".", "/")


def _with_decay(grad: Tensor, param: Tensor, weight_decay: float | Tensor) -> Tensor:
    return grad if _is_zero(weight_decay) else grad + weight_decay * param


def _as_real(value: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers; others as they are."""
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def _as_type_of(param: Tensor, value: Tensor) -> Tensor:
    """The inverse of ``_as_real`` for a value that belongs to ``param``."""
    return torch.view_as_complex(value.contiguous()) if param.is_complex() else value


def _sqrt(square: Tensor) -> Tensor:
    """sqrt with derivative 0 instead of infinity at 0, where the first moment is 0 as well."""
    if not square.requires_grad:
        return square.sqrt()
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def _is_zero(value: float | Tensor) -> bool:
    """Whether a term is switched off: by a plain 0, never by a tensor, which may be learned."""
    return not isinstance(value, Tensor) and value == 0


def _check_not_negative(**values: float | Tensor) -> None:
    for name, value in values.items():
        if not isinstance(value, Tensor) and not value >= 0:
            raise ValueError(f"{name}: got {value}, expected a number >= 0")
