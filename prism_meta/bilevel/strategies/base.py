"""What a strategy is given and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from prism_meta.bilevel.inner import Params, State

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


@runtime_checkable
class LearnedObjective(Protocol):
    """An objective with weights that are learned through the inner steps (E12)."""

    def hyper_parameters(self) -> Mapping[str, Tensor]:
        """The free parameters by name, leaves of a graph; L_train depends on them."""

    @property
    def meta_objective(self) -> Objective:
        """The objective of L_meta, which does not."""


@dataclass(frozen=True)
class MetaGradient:
    """What a strategy returns; every tensor is detached.

    Args:
        gradient: G of E2, one entry per trainable parameter, shaped like it.
        adapted: phi~, likewise; parameters that are not adapted have their value of phi.
        train_loss: L_train at phi, before the first inner step; scalar.
        meta_loss: L_meta at phi~; scalar.
        terms: the components of the meta loss, as the objective names them.
        buffers: the model's buffers after the meta batch alone.
        inner_buffers: the model's buffers after the inner steps.
        hyper_gradient: d L_meta / d of the inner optimizer's learned hyper-parameters, and of the
            objective's learned weights under ``objective.<name>``.
        state: of the inner optimizer after the last inner step.
        diagnostics: how well the strategy solved its own problem, e.g. a residual.
        unused: names of the parameters that no batch of the episode reached, e.g. the encoder of a
            modality that none of them shows. Their gradient is 0, and ``MetaLearner`` passes them by.
    """

    gradient: Params
    adapted: Params
    train_loss: Tensor
    meta_loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    buffers: Params = field(default_factory=dict)
    inner_buffers: Params = field(default_factory=dict)
    hyper_gradient: Params = field(default_factory=dict)
    state: State = field(default_factory=dict)
    diagnostics: dict[str, Tensor] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()

    @staticmethod
    def mean(results: Sequence[MetaGradient]) -> MetaGradient:
        """The mean over several episodes that started at the same phi.

        Integer buffers are the first episode's; an optimizer's state of a parameter is the mean over
        the episodes that used it; unused is what all of them leave unused.

        Raises:
            ValueError: there is no episode.
        """
        if not results:
            raise ValueError("episodes: got none, expected at least one")
        if len(results) == 1:
            return results[0]

        def over(values: Sequence[Any]) -> Any:
            first = values[0]
            if isinstance(first, Tensor):
                if not first.is_floating_point():
                    return first
                return torch.stack(tuple(values)).mean(0)
            if isinstance(first, frozenset):
                return first.intersection(*values[1:])
            keys = {key: None for value in values for key in value}
            return {key: over([value[key] for value in values if key in value]) for key in keys}

        names = MetaGradient.__dataclass_fields__
        return MetaGradient(**{n: over([getattr(r, n) for r in results]) for n in names})


@dataclass(frozen=True)
class GraphSizes:
    """Bytes that a strategy's memory is estimated from.

    Args:
        forward: what autograd keeps of one evaluation of L.
        backward: what it keeps beside that of the gradient, where that has a graph of its own.
        params: one copy of the trainable parameters.
        float64: how much larger all of these are in float64.
    """

    forward: int
    backward: int
    params: int
    float64: float


class MetaStrategy(ABC):
    """Base of the strategies: one class, one method, no state between calls.

    What configurations, tables and tests need to know of a class, the class says itself.
    """

    #: Name in configurations: ``meta.strategy = "first_order"``.
    name: ClassVar[str]
    #: Time at K = 1, in forward and backward passes of the objective.
    units: ClassVar[str]
    #: What ``MetaGradient.gradient`` is, which names the oracle that the test suite compares it with.
    equation: ClassVar[str]
    #: Whether it makes inner steps: the constructor then takes an inner optimizer and their number.
    adapts: ClassVar[bool] = True
    #: Whether L_meta is differentiated through the inner steps, so that learned weights have a gradient.
    has_meta_gradient: ClassVar[bool] = True
    #: Further arguments of the constructor that a configuration may give, by their names.
    options: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def memory(cls, sizes: GraphSizes, steps: int) -> dict[str, int]:
        """Estimated bytes beyond the model at K = ``steps``, for each way to use this class."""
        return {}

    def outer(
        self, params: Sequence[nn.Parameter], total_steps: int
    ) -> tuple[Optimizer, LRScheduler] | None:
        """The outer optimizer and its schedule, where the method prescribes them; alpha is 0 then."""
        return None

    @abstractmethod
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
        """The meta-gradient of one episode.

        Args:
            model: any module; its parameters and buffers are read, never written.
            objective: ``objective(forward, batch)`` gives a scalar, or has ``.loss`` and ``.terms``. A
                ``LearnedObjective`` is that of L_train, and its ``meta_objective`` that of L_meta.
            train: D_train, passed to the objective as it is. A list of batches gives inner step k the
                batch k modulo their number; a list that holds tensors is one batch, as a
                ``DataLoader`` makes it.
            meta: D_meta, passed to the objective as it is.
            state: of the inner optimizer, to start from; fresh unless given.
            scale: losses are multiplied by it before they are differentiated, and gradients divided by
                it after, which keeps half precision from underflow.

        Raises:
            ValueError: the model has no trainable parameter, the loss is not a scalar, or ``train`` is
                an empty list.
        """


def batches_of(train: Any) -> list[Any]:
    """The train batches of the inner steps; see ``MetaStrategy.meta_gradient``."""
    if not isinstance(train, list) or any(isinstance(part, Tensor) for part in train):
        return [train]
    if not train:
        raise ValueError("train: got an empty list, expected at least one batch")
    return train
