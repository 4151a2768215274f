"""The differentiable optimizers of the library higher as a strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from prism_meta.bilevel.functional import kernels
from prism_meta.bilevel.functional.model import Evaluation, FunctionalModel
from prism_meta.bilevel.functional.trees import Params, State
from prism_meta.bilevel.strategies.base import (
    Adaptation,
    FunctionalStrategy,
    MetaGradient,
    StepBatches,
    pack,
    refuse_weights,
)
from prism_meta.integrations import load

INSTALL = "pip install higher"
#: The entries of a torch optimizer's state that are one number, whatever the parameter's shape.
COUNTERS = ("step", "eta", "mu")


class HigherStrategy(FunctionalStrategy):
    """E4 or E3 through inner steps of any ``torch.optim`` optimizer that higher can differentiate.

    These are SGD, Adam, Adamax, Adagrad, Adadelta, ASGD and those registered with
    ``higher.register_optim``. AdamW is not supported, and higher itself warns about RMSprop and Rprop.
    With SGD the numbers equal those of ``SecondOrder`` and ``FirstOrder``. higher's Adam adds ``eps``
    before it corrects the bias of the second moment. In step k its eps acts like an
    eps / sqrt(1 - beta2^k) in torch's Adam and ours, which is 32 times as much at k = 1 with
    beta2 = 0.999. This matters if a gradient is not far above eps. The graphs of all inner steps are
    kept, so memory grows with K.

    The inner steps are those of ``higher.innerloop_ctx``, taken with ``higher.get_diff_optim``. The other
    half of ``innerloop_ctx``, a patched copy of the model, is not used: the model is called with
    ``torch.func.functional_call``, so buffers, frozen, unused and tied parameters are treated as in every
    strategy. A parameter that the loss does not depend on does not move, not even by weight decay.

    Args:
        make_optimizer: from a list of parameters to the inner optimizer, e.g.
            ``lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)``. It is called in each
            episode with copies of the model's trainable parameters, in order. Parameters that it leaves
            out are learned only by the outer step.
        steps: K, the number of inner steps.
        first_order: compute E3 instead of E4, without the graph of the inner steps.

    Raises:
        MissingPackageError: higher is not installed.
        ValueError: ``steps`` is less than 1; later, higher does not support the optimizer or one of
            its options.

    Source: Grefenstette et al., Generalized inner loop meta-learning, 2019.

    Example:
        ```python
        import torch
        from prism_meta.integrations.higher import HigherStrategy

        model = torch.nn.Linear(1, 1, bias=False)
        mse = lambda forward, batch: (forward(batch[0]) - batch[1]).square().mean()
        batch = (torch.ones(1, 1), torch.zeros(1, 1))
        strategy = HigherStrategy(lambda params: torch.optim.SGD(params, lr=0.25))
        result = strategy.meta_gradient(model, mse, batch, batch)
        assert torch.allclose(result.gradient["weight"], model.weight / 2)  # d/dw (w / 2)^2
        ```
    """

    def __init__(
        self,
        make_optimizer: Callable[[list[Tensor]], Optimizer],
        steps: int = 1,
        *,
        first_order: bool = False,
    ) -> None:
        load("higher", INSTALL)
        if steps < 1:
            raise ValueError(f"steps: got {steps}, expected at least 1 inner step")
        self.make_optimizer, self.steps, self.first_order = make_optimizer, steps, first_order

    def solve(
        self, model: FunctionalModel, train: StepBatches, meta: Any, state: State | None
    ) -> MetaGradient:
        refuse_weights(self, model)
        phi = model.leaves()
        optimizer = self.make_optimizer(list(phi.values()))
        stepper = _differentiable(optimizer, phi, state, second=not self.first_order)
        params, buffers, losses = phi, model.buffers(), []
        for k in range(self.steps):
            value = model.evaluate(params, train.of_step(k), buffers, twice=not self.first_order)
            losses.append(value.loss.detach())
            buffers = value.buffers
            if value.loss.requires_grad:
                params = _step(stepper, value, params)
        value = model.evaluate_meta(params, meta)
        gradient = value.gradient(params if self.first_order else phi)
        state_after = _state(stepper, optimizer, phi)
        inner = Adaptation({}, params, buffers, losses[0], model.trainable, state_after)
        return pack(model, inner, value, gradient)


def _differentiable(optimizer: Optimizer, phi: Params, state: State | None, *, second: bool) -> Any:
    """higher's form of ``optimizer``, which holds leaves of ``phi``, with ``state`` in it."""
    higher, kind = load("higher", INSTALL), type(optimizer).__name__
    for name, values in (state or {}).items():
        optimizer.state[phi[name]] = dict(values)
    for values in optimizer.state.values():
        # As numbers: a power of torch's float32 counter would lose the last digits.
        values.update({key: float(values[key]) for key in COUNTERS if key in values})
    try:
        stepper = higher.get_diff_optim(optimizer, list(phi.values()), track_higher_grads=second)
    except ValueError as error:
        raise ValueError(
            f"make_optimizer: higher cannot take steps of {kind} ({error}); use SGD, Adam, Adamax, "
            "Adagrad, Adadelta or ASGD, or SecondOrder with one of our inner optimizers"
        ) from error
    # higher ignores both, although torch's optimizer would take another step with them.
    for option in ("maximize", "decoupled_weight_decay"):
        if any(group.get(option) for group in optimizer.param_groups):
            raise ValueError(
                f"make_optimizer: higher does not support {option} of {kind}; leave it out"
            )
    return stepper


def _step(stepper: Any, value: Evaluation, params: Params) -> Params:
    """One inner step; the loss is scaled, and its gradient is not."""
    scale = value.model.scale

    def unscaled(grads: list[Tensor | None]) -> list[Tensor | None]:
        return [None if g is None else g / scale for g in grads]

    with (
        torch.autocast(value.model.device.type, enabled=False),
        kernels.differentiable(value.twice),
    ):
        moved = value.in_place(
            params,
            lambda: stepper.step(
                scale * value.loss, params=list(params.values()), grad_callback=unscaled
            ),
        )
    return dict(zip(params, moved, strict=True))


def _state(stepper: Any, optimizer: Optimizer, phi: Params) -> State:
    """The state of higher's optimizer, by the names of the parameters."""
    names = {id(leaf): name for name, leaf in phi.items()}
    state: State = {}
    for group, values in zip(optimizer.param_groups, stepper.state, strict=True):
        for index, leaf in enumerate(group["params"]):
            kept = {key: value for key, value in values[index].items() if value is not None}
            state[names[id(leaf)]] = {
                key: value if isinstance(value, Tensor) else torch.tensor(float(value))
                for key, value in kept.items()
            }
    return state
