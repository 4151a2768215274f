"""Our inner optimizers in loops written for learn2learn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prism_meta.bilevel.functional.trees import State, detached
from prism_meta.bilevel.inner import InnerOptimizer
from prism_meta.integrations import MissingPackageError
from prism_meta.integrations.learn2learn.upstream import (
    grad_of_clones,
    learn2learn,
    listed,
    trainable,
)

if TYPE_CHECKING:
    BaseLearner = nn.Module
else:
    try:
        BaseLearner = learn2learn().algorithms.base_learner.BaseLearner
    except MissingPackageError:
        BaseLearner = nn.Module  # the class can be read; making an instance raises


class PrismLearner(BaseLearner):
    """``l2l.algorithms.MAML`` with any of our inner optimizers: U of E1 instead of phi - lr * g.

    It replaces MAML in a loop written for learn2learn. ``clone`` returns a learner at phi, and ``adapt``
    moves that by one inner step. ``backward`` of a loss at phi~ adds the meta-gradient to ``.grad`` of
    the model's parameters and of the learned hyper-parameters of ``inner``; ``parameters()`` has all of
    them. The numbers equal those of ``SecondOrder`` and ``FirstOrder``.

    A clone has its own module objects around the tensors of phi~. A method, a submodule or ``eval()`` of
    a clone therefore works at phi~ and does not change the model.

    Args:
        model: any module.
        inner: the inner optimizer, e.g. ``SGD(0.05)``; its state starts anew in each clone.
        first_order: compute E3 instead of E4, which takes d phi_{k+1} / d phi_k as the identity.
        allow_unused: whether the loss may be independent of some parameters, e.g. those of a modality
            that the batch does not show; their gradient is 0. Defaults to ``allow_nograd``.
        allow_nograd: whether the model may have frozen parameters, which do not move.
        isolate_buffers: whether a clone collects BatchNorm statistics in copies. If False, as in
            learn2learn, it collects them in the model's own buffers.

    Raises:
        MissingPackageError: learn2learn is not installed.

    Source: MAML, Finn et al., ICML 2017; the interface is that of learn2learn, Arnold et al., 2020.

    Example:
        ```python
        import torch
        import prism_meta as pm
        from prism_meta.integrations.learn2learn import PrismLearner

        net = pm.wrap(torch.nn.Conv2d(2, 3, 1), modalities=("t1", "t2"))
        objective = pm.PrismObjective()
        image, target = torch.randn(4, 2, 8, 8), torch.zeros(4, 8, 8).long()
        train = pm.Batch(image, torch.tensor([[True, False]] * 4), target)
        meta = pm.Batch(image, torch.tensor([[True, True]] * 4), target)

        maml = PrismLearner(net, pm.Adam(0.01))
        optimizer = torch.optim.Adam(maml.parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            learner = maml.clone()
            learner.adapt(objective(learner, train).loss)
            objective(learner, meta).loss.backward()
            optimizer.step()
        ```
    """

    module: nn.Module

    def __init__(
        self,
        model: nn.Module,
        inner: InnerOptimizer,
        *,
        first_order: bool = False,
        allow_unused: bool | None = None,
        allow_nograd: bool = False,
        isolate_buffers: bool = False,
    ) -> None:
        learn2learn()
        super().__init__(model)
        self.inner = inner
        self.first_order, self.allow_nograd = first_order, allow_nograd
        self.allow_unused = allow_nograd if allow_unused is None else allow_unused
        self.isolate_buffers = isolate_buffers
        self.state: State | None = None  # of the inner optimizer; only a clone has one

    def clone(
        self,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> PrismLearner:
        """A learner at the current parameters, to which gradients flow back from it.

        Args:
            first_order: for the clone. Defaults to this learner's, as do the other two.
            allow_unused: for the clone.
            allow_nograd: for the clone.
        """
        with grad_of_clones():
            module = learn2learn().clone_module(self.module)
        clone = PrismLearner(
            module,
            self.inner,
            first_order=_given(first_order, self.first_order),
            allow_unused=_given(allow_unused, self.allow_unused),
            allow_nograd=_given(allow_nograd, self.allow_nograd),
            isolate_buffers=self.isolate_buffers,
        )
        if self.isolate_buffers:
            _copy_buffers(clone.module)
        # The clone of a clone continues with the first clone's state.
        clone.state = self.inner.init(trainable(clone.module)) if self.state is None else self.state
        return clone

    def adapt(
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> None:
        """One inner step on ``loss``: the parameters of this clone are replaced.

        Args:
            loss: L_train at the current parameters; scalar.
            first_order: for this step. Defaults to this learner's, as do the other two.
            allow_unused: for this step.
            allow_nograd: for this step.

        Raises:
            ValueError: this is not a clone, or there are frozen or unused parameters that are not
                allowed.
        """
        if self.state is None:
            raise ValueError(
                "adapt: got the learner itself, whose parameters the outer optimizer holds; "
                "expected a clone: learner = maml.clone()"
            )
        first = _given(first_order, self.first_order)
        chosen = trainable(self.module)
        frozen = [n for n, _ in self.module.named_parameters() if n not in chosen]
        if frozen and not _given(allow_nograd, self.allow_nograd):
            raise ValueError(f"allow_nograd: is False, but frozen are {listed(frozen)}; give True")
        with torch.autocast(loss.device.type, enabled=False):
            grads = torch.autograd.grad(
                loss, list(chosen.values()), create_graph=not first, allow_unused=True
            )
        unused = [n for n, g in zip(chosen, grads, strict=True) if g is None]
        if unused and not _given(allow_unused, self.allow_unused):
            raise ValueError(
                f"allow_unused: is False, but the loss does not depend on {listed(unused)}; give True, "
                "or compute the loss with this clone"
            )
        # In first order the step starts from constants, which leaves d phi_{k+1} / d phi_k = 1.
        start = detached(chosen) if first else chosen
        used = {n: g for n, g in zip(start, grads, strict=True) if g is not None}
        moved, state = self.inner.update(
            used, {n: self.state[n] for n in used}, {n: start[n] for n in used}
        )
        self.state = {**self.state, **state}
        steps = {n: moved.get(n, p) - p for n, p in start.items()}
        updates = [steps.get(n) for n, _ in self.module.named_parameters()]
        with grad_of_clones():
            learn2learn().update_module(self.module, updates=updates)


def _copy_buffers(module: nn.Module) -> None:
    """Replace each of a clone's buffers by one copy, under all of its names."""
    copies: dict[int, Tensor] = {}
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False, remove_duplicate=False):
            copy = copies.setdefault(id(buffer), buffer.detach().clone())
            setattr(part, name, copy)


def _given(value: bool | None, default: bool) -> bool:
    return default if value is None else value
