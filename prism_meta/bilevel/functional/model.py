"""A model and an objective as a function of parameters, whose evaluations differentiate themselves.

The model is never changed: every evaluation is a ``torch.func.functional_call``. These policies hold:

- *Frozen* parameters (``requires_grad=False``) are neither adapted nor given a gradient.
- *Unused* parameters get a zero gradient. The inner step leaves them as they are, like ``torch.optim``
  leaves parameters without a gradient: neither momentum nor weight decay moves them.
- *Tied* parameters are one parameter under their first name.
- *Buffers* (BatchNorm statistics) are isolated: an episode works on copies. No gradient flows through
  them from one evaluation to the next.
- *Checkpointed* parts (``torch.utils.checkpoint``) run again during the backward pass. They find the
  parameters of their evaluation, and copies of the buffers that it started from. In a graph of several
  evaluations they are refused.
- *Autocast* applies to the model and the objective. Derivatives are computed in the types that the
  forward pass chose, as torch advises.
- *Attention and recurrent layers* run kernels that have second derivatives where these are needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from prism_meta.bilevel.functional import kernels, trees
from prism_meta.bilevel.functional.checks import check_model, refuse_hidden_parameters
from prism_meta.bilevel.functional.errors import translated
from prism_meta.bilevel.functional.fast_derivatives import fast_derivatives, least_arguments
from prism_meta.bilevel.functional.protocols import LearnedObjective, Objective
from prism_meta.bilevel.functional.recompute import RandomState, Substitution, placeholders
from prism_meta.bilevel.functional.trees import Params, Tree


@dataclass(frozen=True)
class CurrentForward:
    """The ``forward`` that an objective is given: the model at the parameters of one evaluation.

    Args:
        parameters: the current value of every parameter of the model, by name; for penalties.
    """

    parameters: Mapping[str, Tensor]
    _call: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


class FunctionalModel:
    """L_train and L_meta as functions of the parameters.

    Args:
        model: any module with a trainable parameter.
        objective: see ``MetaStrategy.meta_gradient``.
        scale: losses are multiplied by it before they are differentiated, gradients divided after.

    Raises:
        ValueError: the model has no trainable parameter, or cannot be called functionally.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, *, scale: Tensor | float = 1.0
    ) -> None:
        modules, named = list(model.modules()), dict(model.named_parameters())
        check_model(model, modules, named)
        self.model, self.objective, self.scale = model, objective, scale
        self.meta_objective = objective
        #: The objective's learned weights (E12), on which only L_train depends.
        self.weights = Params()
        if isinstance(objective, LearnedObjective):
            self.meta_objective = objective.meta_objective
            self.weights = dict(objective.hyper_parameters())
        self.trainable: Params = {n: p for n, p in named.items() if p.requires_grad}
        self.frozen: Params = {n: p for n, p in named.items() if not p.requires_grad}
        self.own_buffers: Params = dict(model.named_buffers())
        self.device = next(iter(self.trainable.values())).device
        self.compiled = any(map(_is_compiled, modules))
        self.least = least_arguments(modules)
        self.substitution = Substitution(model)
        self._searched = False

    def leaves(self) -> Params:
        """phi as new leaves, so that ``.grad`` of the model is never touched."""
        return trees.leaves(self.trainable)

    def buffers(self) -> Params:
        """Copies of the model's own buffers."""
        return {name: b.detach().clone() for name, b in self.own_buffers.items()}

    def random_state(self) -> RandomState:
        """The states of the generators that the model may draw from."""
        return RandomState.capture(self.device)

    def evaluate(
        self, params: Params, batch: Any, buffers: Params | None = None, *, twice: bool = False
    ) -> Evaluation:
        """L_train at ``params``.

        Args:
            params: a value for every trainable parameter.
            batch: passed to the objective.
            buffers: to start from; they are not changed. Defaults to the model's own.
            twice: whether second derivatives will be asked for.

        Raises:
            HiddenParameterError: the loss depends on the model's own parameters instead of ``params``.
        """
        return self._evaluate(self.objective, params, batch, buffers, twice)

    def evaluate_meta(self, params: Params, batch: Any) -> Evaluation:
        """L_meta at ``params``, from the model's own buffers."""
        return self._evaluate(self.meta_objective, params, batch, None, False)

    def _evaluate(
        self,
        objective: Objective,
        params: Params,
        batch: Any,
        buffers: Params | None,
        twice: bool,
    ) -> Evaluation:
        if torch.is_autocast_enabled(kernels.autocast_type(self.device)):
            torch.clear_autocast_cache()  # it would keep the cast weights of every step alive
        state = self.state(params, buffers)

        def call(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = self.cast(args), self.cast(kwargs)
            fast = nullcontext() if self.compiled else fast_derivatives((args, kwargs), self.least)
            with fast, _quiet() if self.compiled else nullcontext():
                return self.substitution.run(state, lambda: self.model(*args, **kwargs))

        forward = CurrentForward({**self.frozen, **params}, call)
        with kernels.differentiable(twice):
            value = objective(forward, batch)
        loss, terms = (value, {}) if isinstance(value, Tensor) else (value.loss, value.terms)
        if loss.numel() != 1:
            raise ValueError(
                f"objective: got a loss of shape {tuple(loss.shape)}, expected a scalar"
            )
        if not self._searched and loss.requires_grad and all(p.is_leaf for p in params.values()):
            self._searched = True  # once per episode
            refuse_hidden_parameters(self.model, loss)
        # A buffer is changed in place (BatchNorm), or replaced in ``state`` by an assignment.
        after = {n: state[n].detach() for n in self.own_buffers}
        return Evaluation(self, loss.reshape(()), terms, after, params, buffers, twice)

    def state(self, params: Params, buffers: Params | None) -> Params:
        """All tensors of the model at ``params``, with copies of ``buffers`` that may be changed."""
        copies = self.buffers() if buffers is None else {n: b.clone() for n, b in buffers.items()}
        return {**self.frozen, **params, **copies}

    def cast(self, arguments: Any) -> Any:
        """The arguments of a call, in the type that the model is evaluated in."""
        return arguments


@dataclass(frozen=True)
class Evaluation:
    """The objective at one point, which differentiates itself.

    Args:
        model: what was evaluated.
        loss: scalar.
        terms: its components, as the objective names them.
        buffers: the model's buffers afterwards.
        params: the parameters that it was evaluated at.
        start: the buffers that it started from; None for the model's own.
        twice: whether its kernels have second derivatives.
    """

    model: FunctionalModel
    loss: Tensor
    terms: Mapping[str, Tensor]
    buffers: Params
    params: Params
    start: Params | None
    twice: bool

    def gradient(self, wrt: Params, *, create_graph: bool = False) -> Params:
        """d loss / d wrt, without entries for tensors that the loss does not depend on.

        Raises:
            SecondDerivativeError: an operation has no second derivative.
            CheckpointError: see ``vjp``.
        """
        one = torch.ones_like(self.loss)
        return trees.present(self.vjp(self.loss, one, wrt, create_graph=create_graph))

    def vjp(
        self,
        outputs: Any,
        vectors: Any,
        wrt: Tree,
        *,
        create_graph: bool = False,
        retain_graph: bool | None = None,
    ) -> Tree:
        """``trees.vjp`` of functions of this evaluation, such as its gradient.

        Raises:
            SecondDerivativeError: an operation has no second derivative.
            CheckpointError: a checkpointed part of the model would have to run again for a graph of
                several evaluations, or a checkpoint is reentrant.
        """
        scale = self.model.scale
        scaled = isinstance(scale, Tensor) or scale != 1.0
        if scaled:
            vectors = tree_map(lambda v: None if v is None else scale * v, vectors)
        device = kernels.autocast_type(self.model.device)
        with (
            torch.autocast(device, enabled=False),
            translated(),
            kernels.differentiable(self.twice),
        ):
            slopes = self.in_place(
                wrt,
                lambda: trees.vjp(
                    outputs, vectors, wrt, create_graph=create_graph, retain_graph=retain_graph
                ),
            )
        if scaled:
            slopes = tree_map(lambda s: None if s is None else s / scale, slopes)
        return slopes

    def in_place(self, wrt: Any, function: Callable[[], Tree]) -> Tree:
        """Call ``function`` with what a checkpointed part that runs again should find in the model.

        Args:
            wrt: what the function differentiates with respect to.
            function: differentiates something of this evaluation.
        """
        own = {id(t) for t in (*self.params.values(), *self.model.weights.values())}
        if all(id(t) in own for t in tree_leaves(wrt)):
            tensors = self.model.state(self.params, self.start)
        else:  # the graph goes on to other evaluations, at other parameters
            tensors = placeholders(self.model.substitution.names.values())
        return self.model.substitution.run(tensors, function)


def _is_compiled(module: nn.Module) -> bool:
    # Not by isinstance, which would import torch's compiler.
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.compile looks at ``.grad`` of parameters that are no leaves, of which torch then warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not")
        yield
