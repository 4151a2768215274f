"""Meta-gradient strategies: how L_meta at the adapted parameters becomes a gradient at phi.

A strategy sees a module, an objective and two batches of any kind; it knows nothing of medicine.
The objective is called as ``objective(forward, batch)``, where ``forward`` has the module's own
signature, so that the same objective runs at phi, at phi~ and inside a derivative.

Models are never changed: every evaluation is a ``torch.func.functional_call``. Policies:

- *frozen* parameters (``requires_grad=False``) are neither adapted nor given a gradient;
- *unused* parameters get a zero gradient and are not moved by the inner step;
- *tied* parameters are one parameter under their first name;
- *buffers* (BatchNorm statistics) start each evaluation from the model's own; those after the meta
  batch are returned in ``MetaGradient.buffers``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from prism_meta.inner import InnerOptimizer, Params

Forward = Callable[..., Any]


@runtime_checkable
class ObjectiveValue(Protocol):
    """What an objective may return instead of a scalar tensor."""

    @property
    def loss(self) -> Tensor:
        """The scalar to minimise."""

    @property
    def terms(self) -> Mapping[str, Tensor]:
        """Its components, for logs."""


Objective = Callable[[Forward, Any], "Tensor | ObjectiveValue"]


@dataclass(frozen=True)
class MetaGradient:
    """What a strategy returns; every tensor is detached.

    Args:
        gradient: G of E2, one entry per trainable parameter, shaped like it.
        adapted: phi~, likewise.
        train_loss: L_train at phi, before the first inner step; scalar.
        meta_loss: L_meta at phi~; scalar.
        terms: the components of the meta loss, as the objective names them.
        buffers: the model's buffers after the meta batch.
    """

    gradient: Params
    adapted: Params
    train_loss: Tensor
    meta_loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    buffers: Params = field(default_factory=dict)


class MetaStrategy(ABC):
    """Base of the strategies: one class, one method, no state between calls."""

    @abstractmethod
    def meta_gradient(
        self, model: nn.Module, objective: Objective, train: Any, meta: Any
    ) -> MetaGradient:
        """The meta-gradient of one episode.

        Args:
            model: any module; its parameters and buffers are read, never written.
            objective: ``objective(forward, batch)`` gives a scalar, or has ``.loss`` and ``.terms``.
            train: D_train, passed to the objective as it is.
            meta: D_meta, likewise.

        Raises:
            ValueError: the model has no trainable parameter, or the loss is not a scalar.
        """


class SingleLevel(MetaStrategy):
    """One level: the gradient of L_train at phi, which is also phi~; the meta batch is only looked at.

    Use it as the baseline. ``meta_loss`` is evaluated without a gradient, so that curves of all
    strategies can be laid side by side. For the control that sees as many cases as a meta-learner
    does, give it a train batch of twice the size.
    """

    def meta_gradient(
        self, model: nn.Module, objective: Objective, train: Any, meta: Any
    ) -> MetaGradient:
        problem = _Problem(model, objective)
        phi = problem.leaves()
        train_value = problem.evaluate(phi, train)
        gradient = _gradient(train_value.loss, phi)
        with torch.no_grad():
            meta_value = problem.evaluate(phi, meta)
        # The model learnt from the train batch, so that is the one whose buffers are kept.
        adapted = {name: p.clone() for name, p in phi.items()}  # phi shares the model's memory
        return _result(gradient, adapted, train_value.loss, meta_value, train_value.buffers)


class _Adapting(MetaStrategy):
    """Shared by the strategies that take inner steps.

    Args:
        inner: the differentiable optimizer U of E1.
        steps: K, the number of inner steps, at least 1.
    """

    def __init__(self, inner: InnerOptimizer, steps: int = 1) -> None:
        if steps < 1:
            raise ValueError(f"steps: got {steps}, expected at least 1 inner step")
        self.inner = inner
        self.steps = steps

    def _adapt(
        self, problem: _Problem, phi: Params, train: Any, *, differentiable: bool
    ) -> tuple[Params, Tensor]:
        """E1: phi~ and L_train(phi); with the graph of every step where ``differentiable``."""
        params, state = phi, self.inner.init(phi)
        first_loss: Tensor | None = None
        for _ in range(self.steps):
            loss = problem.evaluate(params, train).loss
            first_loss = loss if first_loss is None else first_loss
            grads = _gradient(loss, params, create_graph=differentiable)
            with torch.set_grad_enabled(differentiable):
                params, state = self.inner.update(grads, state, params)
            if not differentiable:
                params = _detached(params, requires_grad=True)
        assert first_loss is not None  # steps >= 1
        return params, first_loss


class FirstOrder(_Adapting):
    """E3: the gradient of L_meta at phi~, with phi~ taken as a constant.

    Use it first: two units per step at K = 1, and no second derivative is needed. It ignores how
    phi~ depends on phi, an error of order eta_in.

    Args:
        inner: the inner optimizer, e.g. ``SGD(0.05)``.
        steps: K, the number of inner steps.

    Source: FOMAML, Finn et al., ICML 2017; Nichol et al., 2018.

    Example:
        >>> from prism_meta.inner import SGD
        >>> model = nn.Linear(1, 1, bias=False)
        >>> mse = lambda forward, batch: (forward(batch[0]) - batch[1]).square().mean()
        >>> batch = (torch.ones(1, 1), torch.zeros(1, 1))
        >>> result = FirstOrder(SGD(0.25)).meta_gradient(model, mse, batch, batch)
        >>> bool(torch.allclose(result.gradient["weight"], model.weight))  # 2 * (w / 2)
        True
    """

    def meta_gradient(
        self, model: nn.Module, objective: Objective, train: Any, meta: Any
    ) -> MetaGradient:
        problem = _Problem(model, objective)
        adapted, train_loss = self._adapt(problem, problem.leaves(), train, differentiable=False)
        meta_value = problem.evaluate(adapted, meta)
        gradient = _gradient(meta_value.loss, adapted)
        return _result(gradient, adapted, train_loss, meta_value, meta_value.buffers)


class SecondOrder(_Adapting):
    """E4: the exact gradient of L_meta(phi~(phi)), through the stored graph of the inner steps.

    For one SGD step G = (I - eta_in H_train(phi)) grad L_meta(phi~). Needs operations with a second
    derivative, and memory for the graphs of all K steps.

    Args:
        inner: the inner optimizer, e.g. ``SGD(0.05)``.
        steps: K, the number of inner steps.

    Source: MAML, Finn et al., ICML 2017.

    Example:
        >>> from prism_meta.inner import SGD
        >>> model = nn.Linear(1, 1, bias=False)
        >>> mse = lambda forward, batch: (forward(batch[0]) - batch[1]).square().mean()
        >>> batch = (torch.ones(1, 1), torch.zeros(1, 1))
        >>> result = SecondOrder(SGD(0.25)).meta_gradient(model, mse, batch, batch)
        >>> bool(torch.allclose(result.gradient["weight"], model.weight / 2))  # d/dw (w / 2)^2
        True
    """

    def meta_gradient(
        self, model: nn.Module, objective: Objective, train: Any, meta: Any
    ) -> MetaGradient:
        problem = _Problem(model, objective)
        phi = problem.leaves()
        adapted, train_loss = self._adapt(problem, phi, train, differentiable=True)
        meta_value = problem.evaluate(adapted, meta)
        gradient = _gradient(meta_value.loss, phi)
        return _result(gradient, adapted, train_loss, meta_value, meta_value.buffers)


#: Every strategy, as the common test suite and the config list them.
ALL_STRATEGIES: tuple[type[MetaStrategy], ...] = (SingleLevel, FirstOrder, SecondOrder)


@dataclass(frozen=True)
class _Value:
    loss: Tensor
    terms: Mapping[str, Tensor]
    buffers: Params


class _Problem:
    """A model and an objective as a function of parameters."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        self.model, self.objective = model, objective
        self.trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.trainable:
            raise ValueError(
                f"model: {type(model).__name__} has no trainable parameter; "
                "set requires_grad=True on those to learn"
            )

    def leaves(self) -> Params:
        """phi as leaves of a graph of our own, so that ``.grad`` of the model is never touched."""
        return _detached(self.trainable, requires_grad=True)

    def evaluate(self, params: Params, batch: Any) -> _Value:
        """The objective at ``params``, from a copy of the model's buffers."""
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        state = {**params, **buffers}

        def forward(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.model, state, args, kwargs)

        value = self.objective(forward, batch)
        loss, terms = (value, {}) if isinstance(value, Tensor) else (value.loss, value.terms)
        if loss.numel() != 1:
            raise ValueError(
                f"objective: got a loss of shape {tuple(loss.shape)}, expected a scalar"
            )
        # A buffer is changed in place (BatchNorm) or replaced in ``state`` (a plain assignment).
        return _Value(loss.reshape(()), terms, {name: state[name] for name in buffers})


def _gradient(loss: Tensor, params: Params, *, create_graph: bool = False) -> Params:
    grads = torch.autograd.grad(
        loss, list(params.values()), create_graph=create_graph, materialize_grads=True
    )
    return dict(zip(params, grads, strict=True))


def _detached(params: Mapping[str, Tensor], *, requires_grad: bool = False) -> Params:
    return {name: p.detach().requires_grad_(requires_grad) for name, p in params.items()}


def _result(
    gradient: Params, adapted: Params, train_loss: Tensor, meta_value: _Value, buffers: Params
) -> MetaGradient:
    return MetaGradient(
        gradient=_detached(gradient),
        adapted=_detached(adapted),
        train_loss=train_loss.detach(),
        meta_loss=meta_value.loss.detach(),
        terms={name: term.detach() for name, term in meta_value.terms.items()},
        buffers=_detached(buffers),
    )
