"""The outer update E2, with any torch optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from prism_meta.strategies import MetaGradient, MetaStrategy, Objective


class MetaLearner:
    """Trains ``model`` in two levels: phi <- phi_0 + alpha (phi~ - phi_0) - eta_out * G (E2).

    The optimizer makes its step at phi_0 from G alone; the pull towards phi~ is added after it. With
    ``torch.optim.SGD(lr=eta_out)`` that is E2 exactly, and no optimizer's moments ever see the inner
    step.

    Args:
        model: any module; it is trained in place.
        objective: ``objective(forward, batch)``, see ``MetaStrategy``.
        strategy: how the meta-gradient is computed.
        optimizer: the outer optimizer, over parameters of ``model``; others stay as they are.
        alpha: weight of phi~ - phi_0, in [0, 1].

    Raises:
        ValueError: ``alpha`` is out of range, or the optimizer holds none of the model's parameters.

    Source: Meta-Drop of PRISM; alpha = 0 and first order is FOMAML (Finn et al., 2017), and with one
    SGD step the alpha term is -alpha eta_in grad L_train, so that E2 is first-order MLDG (Li et al.,
    AAAI 2018).

    Example:
        >>> import torch
        >>> from prism_meta.inner import SGD
        >>> from prism_meta.strategies import FirstOrder
        >>> model = torch.nn.Linear(2, 1)
        >>> mse = lambda forward, batch: (forward(batch[0]) - batch[1]).square().mean()
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> learner = MetaLearner(model, mse, FirstOrder(SGD(0.1)), optimizer)
        >>> batch = (torch.ones(4, 2), torch.zeros(4, 1))
        >>> bool(learner.step(batch, batch).meta_loss >= 0)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        strategy: MetaStrategy,
        optimizer: Optimizer,
        alpha: float = 0.5,
    ) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: got {alpha}, expected a number in [0, 1]")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._learned = {n for n, p in model.named_parameters() if id(p) in held}
        if not self._learned:
            raise ValueError(
                "optimizer: holds no parameter of the model; make it from model.parameters() "
                "after the model is on its device"
            )
        self.model, self.objective, self.strategy = model, objective, strategy
        self.optimizer, self.alpha = optimizer, alpha

    def step(self, train: Any, meta: Any) -> MetaGradient:
        """One outer step from one episode: ``meta_gradient``, then ``apply``."""
        result = self.meta_gradient(train, meta)
        self.apply(result)
        return result

    def meta_gradient(self, train: Any, meta: Any) -> MetaGradient:
        """The first half of a step: nothing is changed."""
        return self.strategy.meta_gradient(self.model, self.objective, train, meta)

    @torch.no_grad()
    def apply(self, result: MetaGradient) -> None:
        """The second half: E2. What lies between (averaging over processes, clipping) is the caller's."""
        params = {
            name: param
            for name, param in self.model.named_parameters()
            if name in self._learned and name in result.gradient
        }
        # The pull is taken at phi_0, before the optimizer moves it.
        pulls = {n: self.alpha * (result.adapted[n] - p) for n, p in params.items()}
        for name, param in params.items():
            param.grad = result.gradient[name]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for name, param in params.items():
            param.add_(pulls[name])
        for name, buffer in self.model.named_buffers():
            if name in result.buffers:
                buffer.copy_(result.buffers[name])
