"""One state for the inner and the outer optimizer: ``MetaLearner(inner_state="shared")``."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.optim import Optimizer

from prism_meta.bilevel.functional.trees import State
from prism_meta.bilevel.inner import InnerOptimizer


def shared_state(model: nn.Module, optimizer: Optimizer) -> State:
    """The outer optimizer's state, by the names of the parameters."""
    return {
        name: {
            key: value for key, value in optimizer.state.get(param, {}).items() if value is not None
        }
        for name, param in model.named_parameters()
    }


def share(state: State, params: Mapping[str, nn.Parameter], optimizer: Optimizer) -> None:
    """Let the outer optimizer continue from the inner one's state."""
    for name in state.keys() & params.keys():
        kept = {key: value.clone() for key, value in state[name].items()}
        optimizer.state[params[name]].update(kept)


def check_shared(inner: InnerOptimizer | None, outer: Optimizer) -> None:
    """Refuse two optimizers that cannot share a state.

    Raises:
        ValueError: they are of different kinds, or the outer one has an option that the inner one lacks.
    """
    kind = None if inner is None else inner.torch_optimizer
    if kind is None or type(outer) is not kind:
        expected = (
            "SGD, Adam or AdamW inside" if kind is None else f"torch.optim.{kind.__name__} outside"
        )
        raise ValueError(
            f"inner_state: 'shared' needs the same kind of optimizer for both steps; got "
            f"{type(inner).__name__} inside and torch.optim.{type(outer).__name__} outside, expected "
            f"{expected}"
        )
    unsupported = [
        name
        for name in ("amsgrad", "maximize", "dampening")
        if any(group.get(name) for group in outer.param_groups)
    ]
    if unsupported:
        raise ValueError(
            f"inner_state: 'shared' does not support {', '.join(unsupported)} of the outer optimizer"
        )
