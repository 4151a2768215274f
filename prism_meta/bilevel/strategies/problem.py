"""A model and an objective as a function of parameters: where the policies are kept.

The model is never changed; every evaluation is a ``torch.func.functional_call`` (``Stage``).

- *Frozen* parameters (``requires_grad=False``) are neither adapted nor given a gradient.
- *Unused* parameters get a zero gradient, and the inner step passes them by as ``torch.optim`` does
  those without a gradient: neither momentum nor weight decay moves them. Those that no batch of the
  episode reached are named, so that the outer step passes them by too.
- *Tied* parameters are one parameter under their first name.
- *Buffers* (BatchNorm statistics) are isolated: an episode works on copies. They are statistics, and
  no gradient goes through them from one evaluation to the next.
- *Checkpointed* parts (``torch.utils.checkpoint``) run again while they are differentiated: where the
  graph is of one evaluation, with its parameters, and with copies of the buffers that it started from,
  which are not updated twice; else they are refused, see ``differentiate``.
- *Autocast* holds for the model and the objective; derivatives are computed in the types that the
  forward pass chose, as torch advises.
"""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only

from prism_meta.bilevel.inner import Params, State
from prism_meta.bilevel.strategies.base import (
    LearnedObjective,
    MetaGradient,
    MetaStrategy,
    Objective,
)
from prism_meta.bilevel.strategies.differentiate import Stage, T, explained, misplaced
from prism_meta.bilevel.strategies.lean import Lean


@dataclass(frozen=True)
class Point:
    """Where the model is evaluated: parameters, and buffers to start from (its own where None)."""

    params: Params
    buffers: Params | None = None


#: Of a graph with no evaluation of the model in it, e.g. that of an update.
NOWHERE = Point({}, {})


@dataclass(frozen=True)
class Value:
    """The objective at a point: loss, terms, and the buffers that the evaluation left."""

    loss: Tensor
    terms: Mapping[str, Tensor]
    buffers: Params
    at: Point


class Problem:
    """L(params, batch) for one model and one objective.

    Args:
        model: any module with a trainable parameter.
        objective: see ``MetaStrategy.meta_gradient``.
        scale: likewise.

    Raises:
        ValueError: the model has no trainable parameter.
    """

    def __init__(self, model: nn.Module, objective: Objective, scale: Tensor | float = 1.0) -> None:
        self.model, self.objective, self.scale = model, objective, scale
        self.outer, self.learned = objective, Params()
        if isinstance(objective, LearnedObjective):
            self.outer = objective.meta_objective
            # A name with a space is not that of a parameter of the model.
            self.learned = {f"objective {n}": p for n, p in objective.hyper_parameters().items()}
        self._stage = Stage(model)
        self._type: torch.dtype | None = None
        self._frozen = Params()
        self.trainable: Params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.trainable:
            raise ValueError(
                f"model: {type(model).__name__} has no trainable parameter; "
                "set requires_grad=True on those to learn"
            )
        self.device = next(iter(self.trainable.values())).device

    def refuse_learned(self, strategy: str) -> None:
        """For strategies that give the objective's learned weights no gradient."""
        if self.learned:
            names = ", ".join(name.partition(" ")[2] for name in self.learned)
            raise ValueError(
                f"objective: {strategy} gives its learned weights ({names}) no gradient; use FirstOrder "
                "or SecondOrder, or an objective with fixed weights"
            )

    def in_type(self, dtype: torch.dtype) -> Problem:
        """The same with parameters, buffers and what the model is given in ``dtype``, or as they are if
        that is wider; this problem itself if its trainable parameters all are."""
        if all(wider(p, dtype) is p for p in self.trainable.values()):
            return self
        other = copy.copy(self)
        other._type = dtype
        named = {n: wider(p.detach(), dtype) for n, p in self.model.named_parameters()}
        other.trainable = {n: named.pop(n) for n in self.trainable}
        other._frozen = named
        return other

    def leaves(self) -> Params:
        """phi as leaves of a graph of our own, so that ``.grad`` of the model is never touched."""
        return detached(self.trainable, requires_grad=True)

    def buffers(self) -> Params:
        """Copies of the model's own buffers."""
        own = {name: b.detach().clone() for name, b in self.model.named_buffers()}
        return own if self._type is None else {n: wider(b, self._type) for n, b in own.items()}

    def evaluate_meta(self, params: Params, batch: Any) -> Value:
        """L_meta at ``params``, from the model's own buffers."""
        return self._evaluate(self.outer, params, batch, None)

    def evaluate(self, params: Params, batch: Any, buffers: Params | None = None) -> Value:
        """L_train at ``params``; ``buffers`` (the model's own unless given) are not changed."""
        return self._evaluate(self.objective, params, batch, buffers)

    def _evaluate(
        self, objective: Objective, params: Params, batch: Any, buffers: Params | None
    ) -> Value:
        if torch.is_autocast_enabled(self.device.type):
            torch.clear_autocast_cache()  # it would keep every step's cast weights alive
        at = Point(params, buffers)
        state = self._state(at)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if (dtype := self._type) is not None:
                args, kwargs = tree_map_only(Tensor, lambda t: wider(t, dtype), (args, kwargs))
            return self._stage.run(state, lambda: self.model(*args, **kwargs))

        with Lean():
            value = objective(forward, batch)
        loss, terms = (value, {}) if isinstance(value, Tensor) else (value.loss, value.terms)
        if loss.numel() != 1:
            raise ValueError(
                f"objective: got a loss of shape {tuple(loss.shape)}, expected a scalar"
            )
        # A buffer is changed in place (BatchNorm) or replaced in ``state`` (a plain assignment).
        after = {n: state[n].detach() for n, _ in self.model.named_buffers()}
        return Value(loss.reshape(()), terms, after, at)

    def _state(self, at: Point) -> Params:
        """The tensors of ``at``, buffers as copies that may be changed."""
        start = at.buffers
        buffers = self.buffers() if start is None else {n: b.clone() for n, b in start.items()}
        return {**self._frozen, **at.params, **buffers}

    def gradient(self, loss: Tensor, params: Params, *, at: Point | None = None) -> Params:
        """d loss / d params; 0 for what the loss does not depend on. ``at`` as in ``pull_back``."""
        return filled(self.reached_gradient(loss, params, at=at), params)

    def reached_gradient(
        self, loss: Tensor, params: Params, *, at: Point | None, create_graph: bool = False
    ) -> Params:
        """The same without an entry for what the loss does not depend on."""
        return self.pull_back(
            [loss], [torch.ones_like(loss)], params, at=at, create_graph=create_graph
        )

    def mixed_derivative(
        self, params: Params, fixed: Params, direction: Params, batch: Any, buffers: Params
    ) -> Params:
        """E12: d <grad L_train, direction> / d the objective's learned weights, in forward mode.

        d L_train / d weights is a function of the parameters, and this its directional derivative: one
        pass with tangents gives it for all weights, and no graph of the model is made.
        """
        constants = detached({**fixed, **params})
        with forward_ad.dual_level():
            with warnings.catch_warnings():
                # The first dual loads a part of torch that uses torch.jit.script, which it deprecates.
                warnings.simplefilter("ignore", FutureWarning)
                duals = {n: forward_ad.make_dual(constants[n], v) for n, v in direction.items()}
            value = self.evaluate({**constants, **duals}, batch, buffers)
            slopes = self.reached_gradient(value.loss, self.learned, at=value.at)
            tangents = {n: forward_ad.unpack_dual(slope).tangent for n, slope in slopes.items()}
        return filled({n: t for n, t in tangents.items() if t is not None}, self.learned)

    def pull_back(
        self,
        outputs: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        inputs: Params,
        *,
        at: Point | None,
        create_graph: bool = False,
        retain_graph: bool | None = None,
    ) -> Params:
        """The vector-Jacobian product: sum over outputs of cotangent^T d output / d inputs.

        Args:
            outputs: functions of the inputs.
            cotangents: one per output, shaped like it.
            inputs: by name.
            at: of the evaluation that the graph is of; None if it is of several at different points.
            create_graph: whether the result has a graph.
            retain_graph: whether this one is kept; as ``create_graph`` unless given.

        Returns:
            One entry per input that an output depends on.

        Raises:
            SecondDerivativeError: an operation has no second derivative.
            CheckpointError: the model has a checkpoint, and ``at`` is None; or one that is reentrant.
        """
        followed = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
        if not followed or not inputs:
            return {}
        scaled = not isinstance(self.scale, float) or self.scale != 1.0

        def differentiate() -> Sequence[Tensor | None]:
            return torch.autograd.grad(
                [output for output, _ in followed],
                list(inputs.values()),
                [self.scale * c if scaled else c for _, c in followed],
                create_graph=create_graph,
                retain_graph=retain_graph,
                allow_unused=True,
            )

        with torch.autocast(self.device.type, enabled=False), explained():
            grads = self.placed(at, differentiate)
        named = {n: g for n, g in zip(inputs, grads, strict=True) if g is not None}
        return {n: g / self.scale for n, g in named.items()} if scaled else named

    def placed(self, at: Point | None, function: Callable[[], T]) -> T:
        """``function()`` with what a checkpointed part that runs again is to find in the model."""
        if at is NOWHERE:
            return function()
        names = self._stage.names.values()
        tensors = misplaced(names) if at is None else self._state(at)
        return self._stage.run(tensors, function)

    def random_state(self) -> tuple[Tensor, Tensor | None]:
        """The state of the random numbers that the model draws from, on the CPU and its device."""
        device = None
        if self.device.type != "cpu":
            device = torch.get_device_module(self.device).get_rng_state(self.device)
        return torch.get_rng_state(), device

    @contextmanager
    def replaying(self, state: tuple[Tensor, Tensor | None]) -> Iterator[None]:
        """Draw again what was drawn after ``state``, and leave no trace of it."""
        cpu, device = state
        on_device = [] if device is None else [self.device]
        with torch.random.fork_rng(on_device, device_type=self.device.type):
            torch.set_rng_state(cpu)
            if device is not None:
                torch.get_device_module(self.device).set_rng_state(device, self.device)
            yield

    def result(
        self,
        *,
        gradient: Params,
        adapted: Params,
        train_loss: Tensor,
        meta: Value,
        hyper_gradient: Params | None = None,
        reached: Iterable[str] | None = None,
        **more: Any,
    ) -> MetaGradient:
        """Everything detached, in the order of the model's parameters.

        ``reached`` has the names of the parameters that some gradient was taken of, all unless given.
        The gradient may lack those that are not among them.
        """
        reached = self.trainable if reached is None else set(reached)
        hyper = {n.replace(" ", "."): g for n, g in (hyper_gradient or {}).items()}
        every = {**self.trainable, **adapted}
        return MetaGradient(
            gradient=detached(filled(gradient, self.trainable)),
            unused=frozenset(n for n in self.trainable if n not in reached),
            # Not a view of the model's memory, which the outer step will change.
            adapted={n: every[n].detach().clone() for n in self.trainable},
            train_loss=train_loss.detach(),
            meta_loss=meta.loss.detach(),
            terms={name: term.detach() for name, term in meta.terms.items()},
            hyper_gradient=detached(hyper),
            **{"buffers": meta.buffers, **more},
        )

    def narrowed(self, result: MetaGradient) -> MetaGradient:
        """``result`` of ``in_type`` in the types of this problem; a loss has that of the widest tensor."""

        def as_own(values: Params, own: Mapping[str, Tensor]) -> Params:
            return {n: v.to(own[n].dtype) for n, v in values.items()}

        params, buffers = self.trainable, dict(self.model.named_buffers())
        state = {
            name: {
                key: value.to(params[name].dtype) if value.shape == params[name].shape else value
                for key, value in values.items()
            }
            for name, values in result.state.items()
        }
        return replace(
            result,
            gradient=as_own(result.gradient, params),
            adapted=as_own(result.adapted, params),
            buffers=as_own(result.buffers, buffers),
            inner_buffers=as_own(result.inner_buffers, buffers),
            state=state,
        )


class ProblemStrategy(MetaStrategy):
    """Base of the strategies that evaluate the model as a ``Problem``: they write ``solve`` alone."""

    #: Whether the objective's learned weights get a gradient (E12).
    learns_objective: ClassVar[bool] = False

    def meta_gradient(
        self,
        model: nn.Module,
        objective: Objective,
        train: Any,
        meta: Any,
        *,
        state: State | None = None,
        scale: Tensor | float = 1.0,
    ) -> MetaGradient:
        problem = Problem(model, objective, scale)
        if not self.learns_objective:
            problem.refuse_learned(type(self).__name__)
        return self.solve(problem, train, meta, state)

    @abstractmethod
    def solve(self, problem: Problem, train: Any, meta: Any, state: State | None) -> MetaGradient:
        """The meta-gradient of one episode; ``train``, ``meta`` and ``state`` as in ``meta_gradient``."""


def detached(params: Mapping[str, Tensor], *, requires_grad: bool = False) -> Params:
    """The same values as constants, or as new leaves."""
    return {name: p.detach().requires_grad_(requires_grad) for name, p in params.items()}


def wider(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating-point tensor in ``dtype`` unless its own is wider; others as they are."""
    if not value.is_floating_point():
        return value
    return value.to(torch.promote_types(value.dtype, dtype))


def filled(values: Params, like: Mapping[str, Tensor]) -> Params:
    """An entry for each of ``like``: that of ``values``, or 0."""
    return {n: values[n] if n in values else torch.zeros_like(p) for n, p in like.items()}


def dot(a: Params, b: Params) -> Tensor:
    """<a, b> over all entries of ``a``, in float64; 0 where there is none."""
    zero = torch.zeros((), dtype=torch.float64)
    return sum(((x.double() * b[n].double()).sum() for n, x in a.items()), start=zero)
