"""E12 in forward mode: one pass gives the derivatives for all of the objective's learned weights."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor
from torch.autograd import forward_ad

from prism_meta.bilevel.functional.model import FunctionalModel
from prism_meta.bilevel.functional.trees import Params, detached, filled


def mixed_derivative(
    model: FunctionalModel, params: Params, direction: Params, batch: Any, buffers: Params
) -> tuple[Params, Tensor]:
    """The derivative of <grad L_train, direction> with respect to the objective's learned weights.

    d L_train / d weights is a function of the parameters, and this is its directional derivative. No
    graph of the model is made.

    Returns:
        The derivative, and L_train at ``params``.
    """
    constants = detached(params)
    with forward_ad.dual_level():
        with warnings.catch_warnings():
            # The first dual loads a part of torch that uses torch.jit.script, which it deprecates.
            warnings.simplefilter("ignore", FutureWarning)
            duals = {n: forward_ad.make_dual(constants[n], v) for n, v in direction.items()}
        value = model.evaluate({**constants, **duals}, batch, buffers, twice=True)
        slopes = value.gradient(model.weights)
        tangents = {n: forward_ad.unpack_dual(slope).tangent for n, slope in slopes.items()}
        loss = forward_ad.unpack_dual(value.loss).primal.detach()
    return filled(tangents, model.weights), loss
