"""What a strategy is given, what it returns, and what it says about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from prism_meta.bilevel.functional.model import Evaluation, FunctionalModel
from prism_meta.bilevel.functional.protocols import Objective
from prism_meta.bilevel.functional.trees import Params, State, detached, filled
from prism_meta.step_batches import StepBatches as StepBatches


@dataclass(frozen=True)
class MetaGradient:
    """What a strategy returns; every tensor is detached.

    Args:
        gradient: G of E2, one entry per trainable parameter, shaped like it.
        adapted: phi~, one entry per trainable parameter; those that are not adapted have phi's value.
        train_loss: L_train at phi, before the first inner step; scalar.
        meta_loss: L_meta at phi~; scalar.
        terms: the components of the meta loss, as the objective names them.
        buffers: the model's buffers after the meta batch, starting from the model's own.
        inner_buffers: the model's buffers after the inner steps.
        hyper_gradient: d L_meta / d of the inner optimizer's learned hyper-parameters.
        weight_gradient: d L_meta / d of the objective's learned weights (E12).
        state: of the inner optimizer after the last inner step.
        diagnostics: how well the strategy solved its own problem, e.g. a residual.
        unused: names of the parameters that no batch of the episode used, e.g. the encoder of a
            modality that none of them shows. Their gradient is 0, and ``MetaLearner`` skips them.
        case_ids: names of the samples in the batches, for messages; ``MetaLearner`` fills them in.
    """

    gradient: Params
    adapted: Params
    train_loss: Tensor
    meta_loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    buffers: Params = field(default_factory=dict)
    inner_buffers: Params = field(default_factory=dict)
    hyper_gradient: Params = field(default_factory=dict)
    weight_gradient: Params = field(default_factory=dict)
    state: State = field(default_factory=dict)
    diagnostics: dict[str, Tensor] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()
    case_ids: tuple[str, ...] = ()

    @staticmethod
    def mean(results: Sequence[MetaGradient]) -> MetaGradient:
        """The mean over several episodes that started at the same phi.

        Integer buffers are the first episode's. An optimizer's state of a parameter is the mean over
        the episodes that used it. A parameter is unused if no episode used it.

        Args:
            results: the result of each episode.

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
                averaged = first.is_floating_point() or first.is_complex()
                return torch.stack(tuple(values)).mean(0) if averaged else first
            if isinstance(first, frozenset):
                return first.intersection(*values[1:])
            if isinstance(first, tuple):
                return sum(values, ())
            keys = {key: None for value in values for key in value}
            return {key: over([value[key] for value in values if key in value]) for key in keys}

        names = MetaGradient.__dataclass_fields__
        return MetaGradient(**{n: over([getattr(r, n) for r in results]) for n in names})


@dataclass(frozen=True)
class Adaptation:
    """The result of the inner steps.

    Args:
        fixed: the parameters that are not adapted.
        params: phi~, of those that are.
        buffers: the model's buffers after the last step.
        train_loss: L_train at phi.
        used: names of the parameters that a train batch used.
        state: of the inner optimizer after the last step.
    """

    fixed: Params
    params: Params
    buffers: Params
    train_loss: Tensor
    used: Collection[str]
    state: State = field(default_factory=dict)

    @property
    def everything(self) -> Params:
        """A value for every trainable parameter."""
        return {**self.fixed, **self.params}


@dataclass(frozen=True)
class GraphSizes:
    """Bytes that a strategy's memory is estimated from.

    Args:
        forward: what autograd saves for one evaluation of L.
        backward: what it saves in addition for a gradient that has a graph of its own.
        params: one copy of the trainable parameters.
        float64: how much larger all of these are in float64.
    """

    forward: int
    backward: int
    params: int
    float64: float


class MetaStrategy(ABC):
    """Base of the strategies: one method, no state between calls.

    The class itself says what configurations, tables and tests need to know about it.
    """

    #: Name in configurations: ``meta.strategy = "first_order"``.
    name: ClassVar[str]
    #: Time at K = 1, in forward and backward passes of the objective.
    units: ClassVar[str]
    #: What ``MetaGradient.gradient`` is; the common test suite has an oracle for each.
    equation: ClassVar[str]
    #: Whether it takes inner steps: its constructor then takes an inner optimizer and their number.
    adapts: ClassVar[bool] = True
    #: Whether the objective's learned weights get a gradient, that of L_meta through the inner steps.
    has_meta_gradient: ClassVar[bool] = True
    #: Whether L_meta is differentiated at all, and not only measured.
    learns_from_meta: ClassVar[bool] = True
    #: Further keyword arguments of the constructor that a configuration may set.
    options: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def memory(cls, sizes: GraphSizes, steps: int) -> dict[str, int]:
        """Estimated bytes beyond the model at K = ``steps``, for each way to use this class.

        Args:
            sizes: bytes of the parameters and of the graph of one evaluation.
            steps: K, the number of inner steps.
        """
        return {}

    @property
    def evaluations(self) -> int:
        """Gradients of the objective per episode.

        A product with second derivatives counts as two, and an evaluation without a gradient as none.
        """
        return 1

    def outer_optimizer(
        self, params: Sequence[nn.Parameter], total_steps: int
    ) -> tuple[Optimizer, LRScheduler] | None:
        """The outer optimizer and its schedule if the method prescribes them; alpha is 0 then.

        Args:
            params: the model's parameters.
            total_steps: number of outer steps of the training.
        """
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
            objective: ``objective(forward, batch)`` returns a scalar, or has ``.loss`` and ``.terms``.
                A ``LearnedObjective`` is that of L_train, and its ``meta_objective`` that of L_meta.
            train: D_train, passed to the objective as it is; ``StepBatches`` for one batch per step.
            meta: D_meta, passed to the objective as it is.
            state: of the inner optimizer, to start from. Defaults to a fresh one.
            scale: losses are multiplied by it before they are differentiated and gradients divided by
                it afterwards, which keeps half precision from underflow.

        Raises:
            ValueError: the model cannot be trained, or the loss is not a scalar.
            RuntimeError: it is called in ``torch.inference_mode()``.
        """


class FunctionalStrategy(MetaStrategy):
    """Base of the strategies that evaluate a ``FunctionalModel``; a new one writes only ``solve``."""

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
        with gradients_on():
            functional = FunctionalModel(model, objective, scale=scale)
            if not self.has_meta_gradient:
                refuse_weights(self, functional)
            return self.solve(functional, StepBatches.of(train), meta, state)

    @abstractmethod
    def solve(
        self, model: FunctionalModel, train: StepBatches, meta: Any, state: State | None
    ) -> MetaGradient:
        """The meta-gradient of one episode.

        Args:
            model: the model and the objective as functions of the parameters.
            train: the batches of the inner steps, ``train.of_step(k)``.
            meta: D_meta, for ``model.evaluate_meta``.
            state: the inner optimizer's state to start from; None for a fresh one.

        Returns:
            Best made by ``pack``.
        """


def pack(
    model: FunctionalModel,
    inner: Adaptation,
    meta: Evaluation,
    gradient: Params,
    *,
    used: Collection[str] = (),
    **more: Any,
) -> MetaGradient:
    """A result with everything detached, in the order of the model's parameters.

    Args:
        model: that was evaluated.
        inner: phi~ and what led to it.
        meta: the evaluation of L_meta.
        gradient: G; entries that are missing are 0, and their parameters unused.
        used: names of further parameters that a loss of the episode depends on.
        more: further fields of ``MetaGradient``.
    """
    phi, used = model.trainable, {*gradient, *inner.used, *used}
    return MetaGradient(
        gradient=detached(filled(gradient, phi)),
        # Copies, as the outer step will change the model's memory.
        adapted={n: p.detach().clone() for n, p in {**phi, **inner.params}.items()},
        train_loss=inner.train_loss.detach(),
        meta_loss=meta.loss.detach(),
        terms={name: term.detach() for name, term in meta.terms.items()},
        unused=frozenset(n for n in phi if n not in used),
        **{
            "buffers": meta.buffers,
            "inner_buffers": inner.buffers,
            "state": detached(inner.state),
            **detached(more),
        },
    )


def refuse_weights(strategy: MetaStrategy, model: FunctionalModel) -> None:
    """Raise if the objective has learned weights, to which ``strategy`` gives no gradient."""
    if model.weights:
        raise ValueError(
            f"objective: {type(strategy).__name__} gives its learned weights "
            f"({', '.join(model.weights)}) no gradient; use FirstOrder or SecondOrder, or an objective "
            "with fixed weights"
        )


@contextmanager
def gradients_on() -> Iterator[None]:
    """Record gradients within the context, also if the caller switched them off.

    Raises:
        RuntimeError: the caller is in ``torch.inference_mode()``.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "meta_gradient: called in torch.inference_mode(), whose tensors can have no gradient; call "
            "it outside (torch.no_grad() does no harm)"
        )
    with torch.enable_grad():
        yield
