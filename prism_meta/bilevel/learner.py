"""The outer update E2, with any torch optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prism_meta.bilevel.inner import InnerOptimizer, State
from prism_meta.bilevel.strategies import LearnedObjective, MetaGradient, MetaStrategy, Objective

InnerState = Literal["fresh", "carried", "shared"]
Buffers = Literal["isolated", "inner", "outer"]


class MetaLearner:
    """Trains ``model`` in two levels: phi <- phi_0 + alpha (phi~ - phi_0) - eta_out * G (E2).

    The optimizer makes its step at phi_0 from G alone; the pull towards phi~ is added after it. With
    ``torch.optim.SGD(lr=eta_out)`` that is E2 exactly.

    Args:
        model: any module; it is trained in place.
        objective: ``objective(forward, batch)``, see ``MetaStrategy``.
        strategy: how the meta-gradient is computed.
        optimizer: the outer optimizer, over parameters of ``model``; others stay as they are. It may
            also hold learned hyper-parameters of ``strategy.inner`` and learned weights of the
            objective (E12), which get their gradient too.
        alpha: weight of phi~ - phi_0, in [0, 1].
        inner_state: of the inner optimizer between outer steps. ``fresh`` starts anew each time, so
            that no optimizer's moments ever see the other level; ``carried`` goes on, detached, where
            the last step ended; ``shared`` is one state for both optimizers, as in PRISM's published
            training script (one Adam for both steps): the outer step is made at phi~ and moved back,
            phi <- phi_0 + alpha (phi~ - phi_0) + (p - phi~), p the optimizer's result.
        buffers: whose BatchNorm statistics the model takes over: ``outer``, those of the meta batch;
            ``inner``, those of the inner steps; ``isolated``, none.
        clip_norm: the meta-gradient is scaled down to this norm before the outer step.
        scaler: for half precision: the losses are scaled by it before they are differentiated, and a
            step with a gradient that is not finite is left out.

    Raises:
        ValueError: ``alpha`` or ``clip_norm`` is out of range, the optimizer holds none of the model's
            parameters, or ``inner_state`` does not fit strategy and optimizer.

    Source: Meta-Drop of PRISM; alpha = 0 and first order is FOMAML (Finn et al., 2017), and with one
    SGD step the alpha term is -alpha eta_in grad L_train, so that E2 is first-order MLDG (Li et al.,
    AAAI 2018).

    Example:
        >>> from prism_meta.bilevel.inner import SGD
        >>> from prism_meta.bilevel.strategies import FirstOrder
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
        *,
        inner_state: InnerState = "fresh",
        buffers: Buffers = "isolated",
        clip_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
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
        if inner_state not in ("fresh", "carried", "shared"):
            raise ValueError(
                f"inner_state: got {inner_state!r}, expected 'fresh', 'carried' or 'shared'"
            )
        if buffers not in ("isolated", "inner", "outer"):
            raise ValueError(f"buffers: got {buffers!r}, expected 'isolated', 'inner' or 'outer'")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm: got {clip_norm}, expected a number > 0")
        inner: InnerOptimizer | None = getattr(strategy, "inner", None)
        if inner_state == "shared":
            _check_shared(inner, optimizer)
        if buffers == "isolated" and any(map(_tracks_statistics, model.modules())):
            warnings.warn(
                "buffers: the model has BatchNorm statistics, and 'isolated' leaves them as they "
                "are; give buffers='outer' to use the model with model.eval() later",
                stacklevel=2,
            )
        self.model, self.objective, self.strategy = model, objective, strategy
        self.optimizer, self.alpha = optimizer, alpha
        self.inner_state, self.buffers = inner_state, buffers
        self.clip_norm, self.scaler = clip_norm, scaler
        self._inner = inner
        hyper = {} if inner is None else dict(inner.hyper_parameters())
        if isinstance(objective, LearnedObjective):
            hyper |= {f"objective.{n}": p for n, p in objective.hyper_parameters().items()}
        self._hyper = {n: p for n, p in hyper.items() if id(p) in held}
        self._carried: State | None = None

    def step(self, train: Any, meta: Any) -> MetaGradient:
        """One outer step from one episode: ``meta_gradient``, then ``apply``."""
        result = self.meta_gradient(train, meta)
        self.apply(result)
        return result

    def step_episodes(self, episodes: Sequence[tuple[Any, Any]]) -> MetaGradient:
        """One outer step from the mean over several episodes, (D_train, D_meta) each."""
        result = MetaGradient.mean([self.meta_gradient(train, meta) for train, meta in episodes])
        self.apply(result)
        return result

    def meta_gradient(self, train: Any, meta: Any) -> MetaGradient:
        """The first half of a step: nothing is changed."""
        options: dict[str, Any] = {}
        if self.scaler is not None:
            options["scale"] = self._scale()
        state = self._shared_state() if self.inner_state == "shared" else self._carried
        if state is not None:
            options["state"] = state
        return self.strategy.meta_gradient(self.model, self.objective, train, meta, **options)

    @torch.no_grad()
    def apply(self, result: MetaGradient) -> Tensor:
        """The second half: E2. What lies between (e.g. averaging over processes) is the caller's.

        Parameters that are ``result.unused`` have no gradient (None): the optimizer passes them by, and
        neither its moments nor weight decay move them.

        Returns:
            The norm of the meta-gradient before it is clipped.
        """
        params = {
            name: param
            for name, param in self.model.named_parameters()
            if name in self._learned and name in result.gradient
        }
        targets = [*params.values(), *self._hyper.values()]
        gradients = [result.gradient[n] for n in params]
        gradients += [result.hyper_gradient[n] for n in self._hyper]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.scaler is not None and not norm.isfinite():
            self._skip(targets)
            return norm
        factor = None if self.clip_norm is None else (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        shared = self.inner_state == "shared"
        # The pull is taken at phi_0, before the optimizer moves it; or before it moves phi~.
        weight = self.alpha - 1 if shared else self.alpha
        pulls = {n: weight * (result.adapted[n] - p) for n, p in params.items()}
        if shared:
            self._share(result.state, params)
            for name, param in params.items():
                param.copy_(result.adapted[name])
        for target, gradient in zip(targets, gradients, strict=True):
            target.grad = gradient if factor is None else gradient * factor
        for name in result.unused & params.keys():
            params[name].grad = None
        self._optimize([target for target in targets if target.grad is not None])
        for name, param in params.items():
            param.add_(pulls[name])
        taken = {"outer": result.buffers, "inner": result.inner_buffers, "isolated": {}}
        for name, buffer in self.model.named_buffers():
            if name in taken[self.buffers]:
                buffer.copy_(taken[self.buffers][name])
        if self.inner_state == "carried":
            self._carried = result.state
        return norm

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the model's and the optimizer's states."""
        state: dict[str, Any] = {"carried": self._carried}
        if self._inner is not None:
            state["inner"] = self._inner.state_dict()
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self._carried = state["carried"]
        if self._inner is not None:
            self._inner.load_state_dict(state["inner"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])

    def _optimize(self, targets: Sequence[Tensor]) -> None:
        """The optimizer's step on ``targets``, those of its parameters that have a gradient."""
        if not targets:
            return  # a scaler refuses to make a step without a gradient
        if self.scaler is None:
            self.optimizer.step()
        else:
            scale = self._scale()
            for target in targets:
                assert target.grad is not None
                target.grad = target.grad * scale  # as GradScaler.step expects it
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _skip(self, targets: Sequence[Tensor]) -> None:
        """Let the scaler see a gradient that is not finite: it makes no step and lowers its scale."""
        for target in targets:
            target.grad = torch.full_like(target, torch.inf)
        self._optimize(targets)

    def _scale(self) -> Tensor:
        assert self.scaler is not None
        return self.scaler.scale(torch.ones((), device=self._device()))

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _shared_state(self) -> State:
        """The outer optimizer's state, by the names of the parameters."""
        return {
            name: {
                key: value
                for key, value in self.optimizer.state.get(param, {}).items()
                if value is not None
            }
            for name, param in self.model.named_parameters()
        }

    def _share(self, state: State, params: dict[str, nn.Parameter]) -> None:
        """Let the outer optimizer go on from the inner one's state."""
        for name in state.keys() & params.keys():
            kept = {key: value.clone() for key, value in state[name].items()}
            self.optimizer.state[params[name]].update(kept)


def _check_shared(inner: InnerOptimizer | None, outer: Optimizer) -> None:
    kind = None if inner is None else inner.torch_optimizer
    if kind is None or type(outer) is not kind:
        expected = (
            "SGD, Adam or AdamW inside" if kind is None else f"torch.optim.{kind.__name__} outside"
        )
        raise ValueError(
            f"inner_state: 'shared' needs one kind of optimizer for both steps; got "
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
            f"inner_state: 'shared' does not know {', '.join(unsupported)} of the outer optimizer"
        )


def _tracks_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
