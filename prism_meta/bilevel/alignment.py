"""How far the meta-gradient points where a single level would: the cosine of the two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prism_meta.bilevel.functional.model import FunctionalModel
from prism_meta.bilevel.functional.protocols import Objective
from prism_meta.bilevel.functional.trees import Params, filled
from prism_meta.bilevel.strategies.base import gradients_on


def single_level_gradient(
    model: nn.Module, objective: Objective, meta: Any, *, scale: Tensor | float = 1.0
) -> Params:
    """grad L_meta at phi: what the meta batch says of the parameters without an inner step.

    Nothing is changed by it: buffers are copies, and random numbers are drawn from a copy of the state.
    With dropout it sees other masks than the strategy's evaluation of L_meta did.

    Args:
        model: any module, at phi.
        objective: see ``MetaStrategy.meta_gradient``; of a ``LearnedObjective`` its ``meta_objective``.
        meta: D_meta.
        scale: see ``MetaStrategy.meta_gradient``.

    Returns:
        An entry per trainable parameter, shaped like it; 0 for those that the loss does not depend on.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> mse = lambda forward, batch: (forward(batch[0]) - batch[1]).square().mean()
        >>> gradient = single_level_gradient(model, mse, (torch.ones(1, 1), torch.zeros(1, 1)))
        >>> bool(torch.allclose(gradient["weight"], 2 * model.weight))
        True
    """
    functional = FunctionalModel(model, objective, scale=scale)
    with gradients_on(), functional.random_state().replayed():
        phi = functional.leaves()
        gradient = functional.evaluate_meta(phi, meta).gradient(phi)
    return filled(gradient, functional.trainable)


def cosine(a: Params, b: Params) -> Tensor:
    """<a, b> / (||a|| ||b||) over all entries, in [-1, 1] up to rounding; NaN if a norm is 0.

    Args:
        a: tensors by name, at least one.
        b: tensors of the same names and shapes. Complex numbers count as pairs of real ones.

    Example:
        >>> cosine({"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([3.0, 4.0])})
        tensor(0.6000)
    """
    pairs = [(_real(value), _real(b[name])) for name, value in a.items()]
    # Not in float64, which some devices lack.
    ab, aa, bb = (torch.stack(sums).sum() for sums in zip(*map(_products, pairs), strict=True))
    return ab / (aa.sqrt() * bb.sqrt())


def _products(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    x, y = pair
    return (x * y).sum(), x.square().sum(), y.square().sum()


def _real(value: Tensor) -> Tensor:
    value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    return value if value.dtype == torch.float64 else value.float()
