"""learn2learn's learners as a strategy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prism_meta.bilevel.functional import kernels
from prism_meta.bilevel.functional.model import FunctionalModel
from prism_meta.bilevel.functional.trees import Params, State, detached, filled, present
from prism_meta.bilevel.strategies.base import (
    Adaptation,
    FunctionalStrategy,
    MetaGradient,
    StepBatches,
    pack,
    refuse_weights,
)
from prism_meta.integrations.learn2learn.upstream import (
    grad_of_clones,
    learn2learn,
    listed,
    trainable,
)


class Learn2LearnStrategy(FunctionalStrategy):
    """A learner of learn2learn as a strategy, with its inner step and its order.

    The learner may have parameters beside its module: the rates of MetaSGD, the transform of GBML, a
    learning rate passed as ``nn.Parameter``. Their gradient is in ``MetaGradient.hyper_gradient``, and
    ``MetaLearner`` trains those that the outer optimizer holds; an optimizer over
    ``learner.parameters()`` holds all. Of the learner only ``clone`` and ``adapt`` are used. The model
    computes the losses, so buffers, frozen, unused and tied parameters are treated as in every strategy.

    The graphs of all inner steps are kept, so memory grows with K. It cannot unscale the inner
    gradients: with a ``GradScaler`` use ``SecondOrder`` or ``FirstOrder``. learn2learn's
    ``KroneckerTransform`` and ``MetaCurvatureTransform`` do not support 3-D convolutions and
    ``RegionAwareFusion``. A ``TransformDictionary`` transforms only the other layers.

    Args:
        learner: ``l2l.algorithms.MAML``, ``MetaSGD`` or ``GBML``, around the model that will be trained.
        steps: K, the number of inner steps.

    Raises:
        MissingPackageError: learn2learn is not installed.
        ValueError: ``steps`` is less than 1 or ``learner`` is none of the three; later, the model is not
            the learner's, or a ``state`` or a ``scale`` is passed.

    Source: learn2learn, Arnold et al., 2020; Meta-SGD, Li et al., 2017; Meta-Curvature, Park and Oliva,
    NeurIPS 2019; Kronecker-factored transforms, Arnold et al., 2019.

    Example:
        ```python
        import learn2learn as l2l
        import torch
        import prism_meta as pm
        from prism_meta.integrations.learn2learn import Learn2LearnStrategy

        model = torch.nn.Linear(2, 1)
        mse = lambda forward, batch: (forward(batch[0]) - batch[1]).square().mean()
        batch = (torch.ones(4, 2), torch.zeros(4, 1))

        gbml = l2l.algorithms.GBML(model, l2l.optim.MetaCurvatureTransform, lr=0.1)
        optimizer = torch.optim.Adam(gbml.parameters(), lr=1e-3)  # the model's and the transform's
        trainer = pm.MetaLearner(model, mse, Learn2LearnStrategy(gbml), optimizer, alpha=0.0)
        result = trainer.step(batch, batch)
        assert "compute_update.transforms_modules.0.mc_in" in result.hyper_gradient
        ```
    """

    def __init__(self, learner: nn.Module, steps: int = 1) -> None:
        algorithms = learn2learn().algorithms
        if not isinstance(learner, (algorithms.MAML, algorithms.MetaSGD, algorithms.GBML)):
            raise ValueError(
                f"learner: got {type(learner).__name__}, expected MAML, MetaSGD or GBML of "
                "learn2learn.algorithms"
            )
        if steps < 1:
            raise ValueError(f"steps: got {steps}, expected at least 1 inner step")
        self.learner, self.steps = learner, steps
        #: Where ``MetaLearner`` looks for what is learned beside the model.
        self.inner = LearnerParameters(learner)

    def solve(
        self, model: FunctionalModel, train: StepBatches, meta: Any, state: State | None
    ) -> MetaGradient:
        self._check(model, state)
        refuse_weights(self, model)
        clone = self._clone(model.trainable)
        params, buffers, losses = trainable(clone.module), model.buffers(), []
        for k in range(self.steps):
            value = model.evaluate(params, train.of_step(k), buffers, twice=True)
            losses.append(value.loss.detach())
            buffers = value.buffers
            with kernels.differentiable(True):
                _adapt(clone, value.loss)
            params = trainable(clone.module)
        value = model.evaluate_meta(params, meta)
        hyper = self.inner.hyper_parameters()
        one = torch.ones_like(value.loss)
        gradient, by_hyper = value.vjp(value.loss, one, (model.trainable, hyper))
        inner = Adaptation({}, params, buffers, losses[0], model.trainable)
        return pack(model, inner, value, present(gradient), hyper_gradient=filled(by_hyper, hyper))

    def _check(self, model: FunctionalModel, state: State | None) -> None:
        if model.model is not self.learner.module:
            raise ValueError(
                f"model: got another {type(model.model).__name__} than the learner's; make the learner "
                "from the model that is trained"
            )
        if any((state or {}).values()):
            raise ValueError("state: learn2learn's learners keep none; expected None")
        if isinstance(model.scale, Tensor) or model.scale != 1.0:
            raise ValueError(
                f"scale: got {float(model.scale):g}, expected 1: learn2learn cannot unscale its inner "
                "gradients; use FirstOrder or SecondOrder with a GradScaler"
            )

    def _clone(self, chosen: Mapping[str, Tensor]) -> Any:
        learner: Any = self.learner
        if not isinstance(learner, learn2learn().algorithms.MetaSGD):
            return learner.clone(allow_unused=True, allow_nograd=True)
        # MetaSGD does not support frozen parameters, and moves a tied one only under its first name. So
        # it gets a flat module of the parameters that it should move, and their rates.
        clone = learner.clone()
        names = [name for name, _ in clone.module.named_parameters()]
        rates = dict(zip(names, clone.lrs, strict=True))
        params, clone.module = dict(clone.module.named_parameters()), nn.Module()
        clone.module._parameters = {n: params[n] for n in chosen}
        clone.lrs = [rates[n] for n in chosen]
        return clone


class LearnerParameters:
    """The parameters of a learn2learn learner beside its module, with an inner optimizer's interface.

    Args:
        learner: as for ``Learn2LearnStrategy``.
    """

    #: There is no state to share with an outer optimizer.
    torch_optimizer = None

    def __init__(self, learner: nn.Module) -> None:
        self._learner = learner

    def hyper_parameters(self) -> Params:
        """The learned ones, by the learner's names for them."""
        return {n: p for n, p in self._named().items() if p.requires_grad}

    def state_dict(self) -> Params:
        """The values, by name."""
        return detached(self._named())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the values of ``state``.

        Raises:
            ValueError: the names are not this learner's.
        """
        own = self._named()
        if state.keys() != own.keys():
            raise ValueError(f"state: got {listed(state)}, expected {listed(own)}")
        with torch.no_grad():
            for name, param in own.items():
                param.copy_(state[name])

    def _named(self) -> Params:
        named = self._learner.named_parameters()
        return {n: p for n, p in named if not n.startswith("module.")}


def _adapt(clone: Any, loss: Tensor) -> None:
    """One inner step, unless the loss depends on no parameter."""
    if not loss.requires_grad:
        return
    if not hasattr(clone, "allow_unused"):
        # MetaSGD refuses parameters that the loss does not depend on. Their empty slices make it depend
        # on all of them.
        loss = loss + sum(p.flatten()[:0].sum().to(loss) for p in clone.module.parameters())
    with grad_of_clones(), torch.autocast(loss.device.type, enabled=False):
        clone.adapt(loss)
