"""Trees of tensors (nested dicts and tuples), in which None stands for a derivative of zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

#: Tensors by the names of the model's parameters, buffers or hyper-parameters.
Params = dict[str, Tensor]
#: For each parameter what ``torch.optim`` keeps for it, e.g. ``{"weight": {"momentum_buffer": ...}}``.
State = dict[str, dict[str, Tensor]]
Tree = TypeVar("Tree")


def detached(tree: Tree) -> Tree:
    """The same values, as constants."""
    result: Tree = tree_map(Tensor.detach, tree)
    return result


def leaves(tree: Tree) -> Tree:
    """The same values as new leaves of a graph; integers stay constants."""

    def leaf(value: Tensor) -> Tensor:
        return value.detach().requires_grad_(value.is_floating_point() or value.is_complex())

    result: Tree = tree_map(leaf, tree)
    return result


def filled(values: Mapping[str, Tensor | None], like: Mapping[str, Tensor]) -> Params:
    """An entry for each of ``like``: the value of ``values`` if there is one, else zeros."""
    found = {n: v for n, v in values.items() if v is not None}
    return {n: found[n] if n in found else torch.zeros_like(p) for n, p in like.items()}


def present(values: Mapping[str, Tensor | None]) -> Params:
    """The entries that are not None."""
    return {n: v for n, v in values.items() if v is not None}


def add(a: Tree, b: Tree) -> Tree:
    """a + b, leaf by leaf."""

    def plus(x: Tensor | None, y: Tensor | None) -> Tensor | None:
        return y if x is None else x if y is None else x + y

    result: Tree = tree_map(plus, a, b)
    return result


def zeros(tree: Tree) -> Tree:
    """The zero of the tree's shape: None for every leaf."""
    result: Tree = tree_map(lambda _: None, tree)
    return result


def dot(a: Params, b: Params) -> Tensor:
    """<a, b> over all entries of ``a``, in float64; complex numbers count as pairs of real ones."""

    def real(value: Tensor) -> Tensor:
        return (torch.view_as_real(value.resolve_conj()) if value.is_complex() else value).double()

    zero = torch.zeros((), dtype=torch.float64)
    return sum(((real(x) * real(b[n])).sum() for n, x in a.items()), start=zero)


def norm(values: Params) -> Tensor:
    """||values|| over all entries, in float64; 0 if there are none."""
    return dot(values, values).sqrt()


def vjp(
    outputs: Any,
    cotangents: Any,
    wrt: Tree,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> Tree:
    """The vector-Jacobian product: the sum over outputs of cotangent^T d output / d wrt.

    Args:
        outputs: tree of tensors.
        cotangents: tree of the same structure; None leaves an output out.
        wrt: tree of leaves of the graph.
        create_graph: whether the result has a graph itself.
        retain_graph: whether the graph is kept. Defaults to ``create_graph``.

    Returns:
        Tree like ``wrt``; None if no output depends on an entry.

    Example:
        >>> x = {"a": torch.tensor(3.0, requires_grad=True), "b": torch.zeros(1, requires_grad=True)}
        >>> vjp(x["a"] ** 2, torch.tensor(1.0), x)
        {'a': tensor(6.), 'b': None}
    """
    pairs = zip(tree_leaves(outputs), tree_leaves(cotangents), strict=True)
    followed = [(o, c) for o, c in pairs if c is not None and o.requires_grad]
    inputs, structure = tree_flatten(wrt)
    chosen = [i for i, value in enumerate(inputs) if value.requires_grad]
    slopes: list[Tensor | None] = [None] * len(inputs)
    if followed and chosen:
        found = torch.autograd.grad(
            [output for output, _ in followed],
            [inputs[i] for i in chosen],
            [cotangent for _, cotangent in followed],
            create_graph=create_graph,
            retain_graph=retain_graph,
            allow_unused=True,
        )
        for i, slope in zip(chosen, found, strict=True):
            slopes[i] = slope
    result: Tree = tree_unflatten(slopes, structure)
    return result
