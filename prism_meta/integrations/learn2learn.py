"""learn2learn, both ways: our inner optimizers in its loops, its learners as a strategy of ours.

learn2learn 0.2.0 is imported with this module, which takes seconds. Without it this module can still be
imported, and what is in it raises an error with the command that installs it, ``INSTALL``. The examples
are run by ``tests/test_learn2learn.py``.
"""

from __future__ import annotations

import functools
import io
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prism_meta.inner import InnerOptimizer, Params, State
from prism_meta.integrations import MissingPackageError, load
from prism_meta.strategies.base import MetaGradient, MetaStrategy, Objective, batches_of
from prism_meta.strategies.problem import Problem, detached

#: learn2learn 0.2.0 has no wheels, and its C files do not compile on Python 3.11 and newer: this builds
#: it from its .pyx files.
INSTALL = (
    "pip install cython setuptools wheel && pip install --no-build-isolation "
    '--config-settings="--global-option=build_ext" learn2learn==0.2.0'
)


@functools.cache
def _learn2learn() -> Any:
    """The package. Its import prints gym's notice about gym, and that alone is left out."""
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            return load("learn2learn", INSTALL)
    finally:
        rest = printed.getvalue()
        for notice in _gym_notices():
            rest = rest.replace(notice, "")
        if rest.strip():
            sys.stderr.write(rest)


def _gym_notices() -> list[str]:
    try:
        return list(load("gym_notices.notices", INSTALL).notices.values())
    except MissingPackageError:
        return []


if TYPE_CHECKING:
    BaseLearner = nn.Module
else:
    try:
        BaseLearner = _learn2learn().algorithms.base_learner.BaseLearner
    except MissingPackageError:
        BaseLearner = nn.Module  # the class can be read; making an instance raises


class PrismLearner(BaseLearner):
    """``l2l.algorithms.MAML`` with any inner optimizer of ours: U of E1 in place of phi - lr * g.

    It takes MAML's place in a loop that is written for learn2learn: ``clone`` gives a learner at phi,
    ``adapt`` moves that by one inner step, and ``backward`` of a loss at phi~ adds the meta-gradient to
    ``.grad`` of the model's parameters and of the learned hyper-parameters of ``inner``, all of them in
    ``parameters()``. The numbers are those of ``SecondOrder`` and ``FirstOrder``.

    A clone has module objects of its own around the tensors of phi~. So whatever is called on it, a
    method, a submodule or ``eval()``, sees phi~ and leaves the model as it is.

    Args:
        model: any module.
        inner: the inner optimizer, e.g. ``SGD(0.05)``; its state starts anew in each clone.
        first_order: E3 in place of E4: d phi_{k+1} / d phi_k is taken for the identity.
        allow_unused: whether a parameter may be without influence on the loss, as a modality's may be
            where none of the batch shows it; its gradient is 0. As ``allow_nograd`` unless given.
        allow_nograd: whether the model may have frozen parameters; they are not moved.
        isolate_buffers: False, as in learn2learn: BatchNorm statistics that a clone gathers are the
            model's. True: a clone gathers them in copies.

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
        _learn2learn()
        super().__init__(model)
        self.inner = inner
        self.first_order, self.allow_nograd = first_order, allow_nograd
        self.allow_unused = allow_nograd if allow_unused is None else allow_unused
        self.isolate_buffers = isolate_buffers
        self.state: State | None = None  # of the inner optimizer; a clone's alone

    def clone(
        self,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> PrismLearner:
        """A learner at the present parameters; gradients flow back from it to them.

        Args:
            first_order: of the clone, as this learner's unless given; so are the others.
            allow_unused: likewise.
            allow_nograd: likewise.
        """
        with _grad_of_clones():
            module = _learn2learn().clone_module(self.module)
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
        # Of a clone's clone the inner optimizer goes on where the first one's is.
        clone.state = (
            self.inner.init(_trainable(clone.module)) if self.state is None else self.state
        )
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
            loss: L_train at the present parameters; scalar.
            first_order: of this step, as the learner's unless given; so are the others.
            allow_unused: likewise.
            allow_nograd: likewise.

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
        chosen = _trainable(self.module)
        frozen = [n for n, _ in self.module.named_parameters() if n not in chosen]
        if frozen and not _given(allow_nograd, self.allow_nograd):
            raise ValueError(f"allow_nograd: is False, but frozen are {_list(frozen)}; give True")
        with torch.autocast(loss.device.type, enabled=False):
            grads = torch.autograd.grad(
                loss, list(chosen.values()), create_graph=not first, allow_unused=True
            )
        unused = [n for n, g in zip(chosen, grads, strict=True) if g is None]
        if unused and not _given(allow_unused, self.allow_unused):
            raise ValueError(
                f"allow_unused: is False, but the loss does not depend on {_list(unused)}; give True, "
                "or compute the loss with this clone"
            )
        # In first order the step is one from constants: that leaves d phi_{k+1} / d phi_k = 1.
        start = detached(chosen) if first else chosen
        used = {n: g for n, g in zip(start, grads, strict=True) if g is not None}
        moved, state = self.inner.update(
            used, {n: self.state[n] for n in used}, {n: start[n] for n in used}
        )
        self.state = {**self.state, **state}
        steps = {n: moved.get(n, p) - p for n, p in start.items()}
        updates = [steps.get(n) for n, _ in self.module.named_parameters()]
        with _grad_of_clones():
            _learn2learn().update_module(self.module, updates=updates)


class Learn2LearnStrategy(MetaStrategy):
    """A learner of learn2learn as a strategy: its inner step, its choice of first or second order.

    What the learner learns beside its module (the rates of MetaSGD, the transform of GBML, a learning
    rate given as ``nn.Parameter``) gets a gradient in ``MetaGradient.hyper_gradient``, and
    ``MetaLearner`` trains it where the outer optimizer holds it, as that of ``learner.parameters()``
    does. Losses are computed by the model, so that its buffers, frozen, unused and tied parameters are
    treated as by every strategy; of the learner, ``clone`` and ``adapt`` are used.

    It keeps the graphs of all inner steps, so that memory grows with K. It cannot unscale the inner
    gradients: with a ``GradScaler`` use ``SecondOrder`` or ``FirstOrder``. learn2learn's
    ``KroneckerTransform`` and ``MetaCurvatureTransform`` know no 3-D convolution and no
    ``RegionAwareFusion``; a ``TransformDictionary`` gives a transform to the other layers, and these the
    gradient as it is.

    Args:
        learner: ``l2l.algorithms.MAML``, ``MetaSGD`` or ``GBML``, around the model that will be trained.
        steps: K, the number of inner steps.

    Raises:
        MissingPackageError: learn2learn is not installed.
        ValueError: ``steps`` is less than 1 or ``learner`` is none of the three; later, the model is not
            the learner's, or a ``state`` or a ``scale`` is given.

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
        algorithms = _learn2learn().algorithms
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

    def meta_gradient(
        self,
        model: nn.Module,
        objective: Objective,
        train: Any,
        meta: Any,
        *,
        state: State | None = None,
        scale: Tensor | float = 1.0,
    ) -> MetaGradient:
        if model is not self.learner.module:
            raise ValueError(
                f"model: got another {type(model).__name__} than the learner's; make the learner from "
                "the model that is trained"
            )
        if any((state or {}).values()):
            raise ValueError("state: learn2learn's learners keep none; expected None")
        if isinstance(scale, Tensor) or scale != 1.0:
            raise ValueError(
                f"scale: got {float(scale):g}, expected 1: learn2learn cannot unscale its inner "
                "gradients; use FirstOrder or SecondOrder with a GradScaler"
            )
        problem = Problem(model, objective)
        problem.refuse_learned(type(self).__name__)
        clone = self._clone(problem.trainable)
        params, buffers, losses = _trainable(clone.module), problem.buffers(), []
        batches = batches_of(train)
        for k in range(self.steps):
            value = problem.evaluate(params, batches[k % len(batches)], buffers)
            losses.append(value.loss.detach())
            buffers = value.buffers
            _adapt(clone, value.loss)
            params = _trainable(clone.module)
        value = problem.evaluate(params, meta)
        learned = self.inner.learned()
        gradient = problem.gradient(
            value.loss, {**problem.trainable, **{f"hyper {n}": p for n, p in learned.items()}}
        )
        return problem.result(
            gradient=gradient,
            adapted=params,
            train_loss=losses[0],
            meta=value,
            inner_buffers=buffers,
            hyper_gradient=detached({n: gradient[f"hyper {n}"] for n in learned}),
        )

    def _clone(self, trainable: Mapping[str, Tensor]) -> Any:
        learner: Any = self.learner
        if not isinstance(learner, _learn2learn().algorithms.MetaSGD):
            return learner.clone(allow_unused=True, allow_nograd=True)
        # MetaSGD knows no frozen parameter, and moves a tied one under its first name alone: it gets
        # a flat module of those that it is to move, and their rates.
        clone = learner.clone()
        names = [name for name, _ in clone.module.named_parameters()]
        rates = dict(zip(names, clone.lrs, strict=True))
        params, clone.module = dict(clone.module.named_parameters()), nn.Module()
        clone.module._parameters = {n: params[n] for n in trainable}
        clone.lrs = [rates[n] for n in trainable]
        return clone


class LearnerParameters:
    """What a learner of learn2learn learns beside its module, in the manner of an inner optimizer.

    Args:
        learner: as for ``Learn2LearnStrategy``.
    """

    #: It has no state to share with an outer optimizer.
    torch_optimizer = None

    def __init__(self, learner: nn.Module) -> None:
        self._learner = learner

    def learned(self) -> Params:
        """Those that get a gradient, by the learner's names for them."""
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
            raise ValueError(f"state: got {_list(state)}, expected {_list(own)}")
        with torch.no_grad():
            for name, param in own.items():
                param.copy_(state[name])

    def _named(self) -> Params:
        named = self._learner.named_parameters()
        return {n: p for n, p in named if not n.startswith("module.")}


def _adapt(clone: Any, loss: Tensor) -> None:
    """One inner step. Where the loss depends on no parameter there is none to make."""
    if not loss.requires_grad:
        return
    if not hasattr(clone, "allow_unused"):
        # MetaSGD refuses parameters that the loss does not depend on; it does on their empty parts.
        loss = loss + sum(p.flatten()[:0].sum().to(loss) for p in clone.module.parameters())
    with _grad_of_clones(), torch.autocast(loss.device.type, enabled=False):
        clone.adapt(loss)


@contextmanager
def _grad_of_clones() -> Iterator[None]:
    """torch warns where learn2learn looks at ``.grad`` of a clone's tensors, which are no leaves.

    MetaSGD keeps gradients there, and a recurrent layer's copy is made anew.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"The \.grad attribute of a Tensor that is not a leaf"
        )
        yield


def _trainable(module: nn.Module) -> Params:
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def _copy_buffers(module: nn.Module) -> None:
    """Copies in place of a clone's buffers, one for each, under whatever names it has."""
    copies: dict[int, Tensor] = {}
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False, remove_duplicate=False):
            copy = copies.setdefault(id(buffer), buffer.detach().clone())
            setattr(part, name, copy)


def _given(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def _list(names: Any) -> str:
    return ", ".join(names) or "none"
