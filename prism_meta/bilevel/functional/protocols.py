"""What the engine asks of an objective, and what it gives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


class Forward(Protocol):
    """The model as an objective calls it, at the parameters of one evaluation."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The current value of every parameter of the model by its name, e.g. for a penalty."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own signature."""


@runtime_checkable
class ObjectiveValue(Protocol):
    """What an objective may return instead of a scalar tensor."""

    @property
    def loss(self) -> Tensor:
        """The scalar to minimise."""

    @property
    def terms(self) -> Mapping[str, Tensor]:
        """Its components, for logs."""


#: ``objective(forward, batch)``, where ``forward`` is a ``Forward`` and the batch is of any kind.
Objective = Callable[[Any, Any], "Tensor | ObjectiveValue"]


@runtime_checkable
class LearnedObjective(Protocol):
    """An objective with weights that are learned through the inner steps (E12)."""

    def hyper_parameters(self) -> Mapping[str, Tensor]:
        """The free parameters by name, leaves of a graph; L_train depends on them."""

    @property
    def meta_objective(self) -> Objective:
        """The objective of L_meta, which does not depend on them."""

    def __call__(self, forward: Any, batch: Any) -> Tensor | ObjectiveValue:
        """The objective of L_train."""
