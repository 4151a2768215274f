"""Which modules of a model block a second derivative, found by trying each on its own inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prism_meta.bilevel.functional import kernels
from prism_meta.bilevel.functional.checks import graph_nodes
from prism_meta.bilevel.functional.model import Evaluation, FunctionalModel
from prism_meta.bilevel.functional.recompute import RandomState, Substitution
from prism_meta.bilevel.functional.trees import Params

#: torch marks a derivative that must not be differentiated with a node that raises; autograd.grad passes
#: such a node by if it has to, without an error.
_CUT = "torch::autograd::Error"


def failure_of(value: Evaluation, gradient: Params) -> str | None:
    """Torch's message if the gradient of an evaluation cannot be differentiated again."""
    if _is_cut(gradient.values()):
        return _SILENTLY_CUT
    ones = {n: torch.ones_like(g) for n, g in gradient.items()}
    try:
        value.vjp(gradient, ones, value.params)
    except RuntimeError as failure:
        return str(failure.__cause__ or failure)
    return None


_SILENTLY_CUT = (
    "a function marked once_differentiable cuts the second derivative off without an error"
)


def blockers(
    model: FunctionalModel, batch: Any, failure: str, random: RandomState
) -> Iterator[tuple[str, str]]:
    """The smallest modules without a second derivative, each with torch's message.

    Args:
        model: with an objective whose gradient cannot be differentiated again.
        batch: for the objective.
        failure: torch's message for the whole. It is that of the objective if no module fails.
        random: the states of the generators to start from.

    Returns:
        Pairs of ``name (type)`` and message.
    """
    calls: dict[str, tuple[nn.Module, Any, Any]] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls[name] = (module, _constants(args), _constants(kwargs))

        return hook

    handles = [
        # Before the module runs, as it may change its input in place.
        module.register_forward_pre_hook(record(name), with_kwargs=True)
        for name, module in model.model.named_modules()
    ]
    with random.replayed():
        try:
            model.evaluate(model.leaves(), batch)
        finally:
            for handle in handles:
                handle.remove()
        failing = {name: e for name, call in calls.items() if (e := _failure_of_module(*call))}
    smallest = {
        name: e
        for name, e in failing.items()
        if not any(other != name and _inside(other, name) for other in failing)
    }
    for name, message in smallest.items():
        yield f"{name or 'model'} ({type(calls[name][0]).__name__})", message
    if not smallest:
        yield "objective", failure


def _inside(other: str, name: str) -> bool:
    return name == "" or other.startswith(f"{name}.")


def _failure_of_module(module: nn.Module, args: Any, kwargs: Any) -> str | None:
    """What goes wrong in a second derivative of ``module`` at these inputs, if anything does."""
    params: Params = {n: p.detach().requires_grad_() for n, p in module.named_parameters()}
    state = {**params, **{n: b.detach().clone() for n, b in module.named_buffers()}}
    args, kwargs = _leaves(args), _leaves(kwargs)
    inputs = [*params.values(), *(t for t in _tensors((args, kwargs)) if t.requires_grad)]

    def failure() -> str | None:
        # Copies of the leaves, which a module that works in place may change.
        given = module(*_map(args, torch.clone), **_map(kwargs, torch.clone))
        outputs = [o for o in _tensors(given) if o.requires_grad]
        if not outputs or not inputs:
            return None
        # Squares: the second derivative of a linear module is 0 and would never be computed.
        loss = torch.stack([o.float().square().mean() for o in outputs]).sum()
        grads = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
        found = [g for g in grads if g is not None and g.requires_grad]
        if _is_cut(found):
            return _SILENTLY_CUT
        ones = [torch.ones_like(g) for g in found]
        try:
            if found:
                torch.autograd.grad(found, inputs, ones, allow_unused=True)
        except RuntimeError as error:
            return str(error)
        return None

    with kernels.differentiable(True):
        return Substitution(module).run(state, failure)


def _is_cut(tensors: Any) -> bool:
    return any(node.name() == _CUT for t in tensors for node in graph_nodes(t))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in nested tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from _tensors(getattr(value, name))


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(part, change) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_map(part, change) for part in value)
    return value


def _constants(value: Any) -> Any:
    return _map(value, lambda t: t.detach().clone())


def _leaves(value: Any) -> Any:
    return _map(value, lambda t: t.requires_grad_() if t.is_floating_point() else t)
