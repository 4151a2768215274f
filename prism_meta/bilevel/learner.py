"""The outer update E2, with any torch optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from prism_meta.bilevel.functional.checks import (
    not_finite,
    parameters_with_hooks,
    refuse_constant,
)
from prism_meta.bilevel.functional.errors import NonFiniteError
from prism_meta.bilevel.functional.model import FunctionalModel
from prism_meta.bilevel.functional.protocols import LearnedObjective, Objective
from prism_meta.bilevel.functional.trees import Params, State
from prism_meta.bilevel.inner import InnerOptimizer
from prism_meta.bilevel.shared_state import check_shared, share, shared_state
from prism_meta.bilevel.strategies.base import MetaGradient, MetaStrategy, StepBatches, gradients_on
from prism_meta.bilevel.strategies.inner_loop import ParameterFilter

InnerState = Literal["fresh", "carried", "shared"]
Buffers = Literal["isolated", "inner", "outer"]


class MetaLearner:
    """Trains ``model`` in two levels: phi <- phi_0 + alpha (phi~ - phi_0) - eta_out * G (E2).

    The optimizer takes its step at phi_0 from G, and the pull towards phi~ is added afterwards. With
    ``torch.optim.SGD(lr=eta_out)`` that is exactly E2.

    Args:
        model: any module; it is trained in place.
        objective: ``objective(forward, batch)``, see ``MetaStrategy``.
        strategy: how the meta-gradient is computed.
        optimizer: the outer optimizer, over parameters of ``model``; those that it does not hold stay as
            they are. It should also hold the learned hyper-parameters of ``strategy.inner`` and the
            learned weights of the objective (E12).
        alpha: weight of phi~ - phi_0, in [0, 1].
        inner_state: what happens to the inner optimizer's state between outer steps. ``fresh`` starts
            anew each time, so that no moments ever see the other level. ``carried`` continues, detached,
            from the last step. ``shared`` is one state for both optimizers, as in PRISM's published
            training script (one Adam for both steps): the outer step is taken at phi~ and moved back,
            phi <- phi_0 + alpha (phi~ - phi_0) + (p - phi~), where p is the optimizer's result.
        buffers: which BatchNorm statistics the model keeps: ``outer``, those of the meta batch;
            ``inner``, those of the inner steps; ``isolated``, none.
        outer_parameters: predicate on parameter names: which parameters the optimizer moves. The others only
            get the pull, so that the inner level owns them. Defaults to all.
        clip_norm: the meta-gradient is scaled down to this norm before the outer step.
        scaler: for half precision. Losses are scaled by it before they are differentiated, and a step
            whose gradient is not finite is skipped.

    Raises:
        ValueError: ``alpha`` or ``clip_norm`` is out of range, the optimizer cannot be used or holds none
            of the model's parameters, or ``inner_state`` does not fit strategy and optimizer.

    Source: Meta-Drop of PRISM. First order with alpha = 0 is FOMAML (Finn et al., 2017). With one SGD
    step the alpha term is -alpha eta_in grad L_train, so that E2 is first-order MLDG (Li et al., AAAI
    2018).

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
        *,
        alpha: float = 0.5,
        inner_state: InnerState = "fresh",
        buffers: Buffers = "outer",
        outer_parameters: ParameterFilter | None = None,
        clip_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: got {alpha}, expected a number in [0, 1]")
        if inner_state not in ("fresh", "carried", "shared"):
            expected = "'fresh', 'carried' or 'shared'"
            raise ValueError(f"inner_state: got {inner_state!r}, expected {expected}")
        if buffers not in ("isolated", "inner", "outer"):
            raise ValueError(f"buffers: got {buffers!r}, expected 'isolated', 'inner' or 'outer'")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm: got {clip_norm}, expected a number > 0")
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                "optimizer: LBFGS evaluates the loss several times in a step, which an outer step "
                "cannot; use Adam, AdamW or SGD"
            )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._held = {n for n, p in model.named_parameters() if id(p) in held}
        if not self._held:
            raise ValueError(
                "optimizer: holds no parameter of the model; make it from model.parameters() "
                "after the model is on its device"
            )
        self._owned = {n for n in self._held if outer_parameters is None or outer_parameters(n)}
        if not self._owned or (alpha == 0 and self._owned != self._held):
            raise ValueError(
                f"outer_parameters: is True for {len(self._owned)} of {len(self._held)} parameters, with "
                f"alpha {alpha}; it must be True for some, and the others need alpha > 0 to change at all"
            )
        inner: InnerOptimizer | None = getattr(strategy, "inner", None)
        if inner_state == "shared":
            check_shared(inner, optimizer)
        hooked = parameters_with_hooks(model)
        if hooked:
            warnings.warn(
                f"model: hooks on {', '.join(hooked)} (register_hook) do not run, as gradients are "
                "taken at copies of the parameters; change MetaGradient.gradient between "
                "meta_gradient() and apply() instead",
                stacklevel=2,
            )
        self.model, self.objective, self.strategy = model, objective, strategy
        self.optimizer, self.alpha = optimizer, alpha
        self.inner_state, self.buffers = inner_state, buffers
        self.clip_norm, self.scaler = clip_norm, scaler
        self._inner = inner
        hyper = {} if inner is None else dict(inner.hyper_parameters())
        weights = (
            dict(objective.hyper_parameters()) if isinstance(objective, LearnedObjective) else {}
        )
        self._hyper, self._weights = (
            {n: p for n, p in values.items() if id(p) in held} for values in (hyper, weights)
        )
        left_out = [*(hyper.keys() - self._hyper.keys()), *(weights.keys() - self._weights.keys())]
        if left_out:
            warnings.warn(
                f"optimizer: does not hold {', '.join(sorted(left_out))}, which should be learned but will "
                "keep their values; use optimizer.add_param_group, or requires_grad_(False)",
                stacklevel=2,
            )
        self._carried: State | None = None
        self._checked = False

    def step(self, train: Any, meta: Any) -> MetaGradient:
        """One outer step from one episode: ``meta_gradient``, then ``apply``.

        Args:
            train: D_train, a batch as the objective expects it, or ``StepBatches``.
            meta: D_meta, a batch.

        Returns:
            The result of the strategy, with both losses and the adapted parameters.
        """
        result = self.meta_gradient(train, meta)
        self.apply(result)
        return result

    def step_episodes(self, episodes: Sequence[tuple[Any, Any]]) -> MetaGradient:
        """One outer step from the mean over several episodes, each a pair (D_train, D_meta)."""
        result = MetaGradient.mean([self.meta_gradient(train, meta) for train, meta in episodes])
        self.apply(result)
        return result

    def meta_gradient(self, train: Any, meta: Any) -> MetaGradient:
        """The first half of a step: nothing is changed.

        The first call also checks, by one more forward pass, that the loss reaches the parameters, and
        only through the model's registered names.

        Args:
            train: D_train, a batch as the objective expects it, or ``StepBatches``.
            meta: D_meta, a batch.

        Raises:
            HiddenParameterError: it reaches one in another way, or none at all.
        """
        batches = StepBatches.of(train)
        if not self._checked:
            self._check(batches.of_step(0))
        options: dict[str, Any] = {}
        if self.scaler is not None:
            options["scale"] = self._scale()
        state = (
            shared_state(self.model, self.optimizer)
            if self.inner_state == "shared"
            else self._carried
        )
        if state is not None:
            options["state"] = state
        result = self.strategy.meta_gradient(self.model, self.objective, train, meta, **options)
        names = [id for batch in (*batches, meta) for id in getattr(batch, "case_ids", ())]
        return replace(result, case_ids=tuple(dict.fromkeys(names)))

    def needed(self, result: MetaGradient) -> MetaGradient:
        """``result`` without the parts that ``apply`` does not read.

        Several processes have to average only what is left: with ``alpha=0`` and a fresh inner state,
        gradients and the buffers that the model keeps.
        """
        return replace(
            result,
            adapted=result.adapted if self._reads_adapted else {},
            state={} if self.inner_state == "fresh" else result.state,
            buffers=result.buffers if self.buffers == "outer" else {},
            inner_buffers=result.inner_buffers if self.buffers == "inner" else {},
            hyper_gradient=result.hyper_gradient if self._hyper else {},
            weight_gradient=result.weight_gradient if self._weights else {},
        )

    @torch.no_grad()
    def apply(self, result: MetaGradient) -> Tensor:
        """The second half: E2. Anything in between, e.g. averaging over processes, is up to the caller.

        Parameters in ``result.unused`` get no gradient (None), so the optimizer skips them: neither its
        moments nor weight decay move them.

        Returns:
            The norm of the meta-gradient before it is clipped; infinite if a scaler skipped the step.

        Raises:
            NonFiniteError: a loss, a gradient or a buffer is not finite; nothing was changed. A scaler
                skips such a step instead.
        """
        params = {
            name: param
            for name, param in self.model.named_parameters()
            if name in self._held and name in result.gradient
        }
        owned = {name: param for name, param in params.items() if name in self._owned}
        targets = [*owned.values(), *self._hyper.values(), *self._weights.values()]
        gradients = [result.gradient[n] for n in owned]
        gradients += [result.hyper_gradient[n] for n in self._hyper]
        gradients += [result.weight_gradient[n] for n in self._weights]
        norm = torch.nn.utils.get_total_norm(gradients)
        kept = {"outer": result.buffers, "inner": result.inner_buffers, "isolated": Params()}
        buffers = kept[self.buffers]
        wrong = self._not_finite(result, buffers)
        if wrong and self.scaler is not None:
            self._skip(targets)
            return torch.full_like(norm, torch.inf)
        if wrong:
            cases = f" on cases {', '.join(result.case_ids)}" if result.case_ids else ""
            raise NonFiniteError(
                f"outer step: not finite{cases}: {', '.join(wrong)}; the parameters were left as they "
                "are; check the images and targets, or lower the inner or outer rate"
            )
        factor = None if self.clip_norm is None else (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        shared = self.inner_state == "shared"
        # The pull is taken at phi_0, before the optimizer moves it; or before it moves phi~.
        weight = self.alpha - 1 if shared else self.alpha
        pulls = {n: weight * (result.adapted[n] - p) for n, p in params.items() if weight != 0}
        if shared:
            share(result.state, params, self.optimizer)
            for name, param in params.items():
                param.copy_(result.adapted[name])
        for target, gradient in zip(targets, gradients, strict=True):
            target.grad = gradient if factor is None else gradient * factor
        for name in result.unused & owned.keys():
            owned[name].grad = None
        self._optimize([target for target in targets if target.grad is not None])
        for name, pull in pulls.items():
            params[name].add_(pull)
        for name, buffer in self.model.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])
        if self.inner_state == "carried":
            self._carried = result.state
        return norm

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs in addition to the model's and the optimizer's states."""
        state: dict[str, Any] = {"carried": self._carried}
        if self._inner is not None:
            state["inner"] = self._inner.state_dict()
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict`` (``state``)."""
        self._carried = state["carried"]
        if self._inner is not None:
            self._inner.load_state_dict(state["inner"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])

    def _check(self, batch: Any) -> None:
        """Raise if the loss reaches parameters behind the engine's back; draws no random numbers."""
        functional = FunctionalModel(self.model, self.objective)
        with gradients_on(), functional.random_state().replayed():
            phi = functional.leaves()
            refuse_constant(phi, functional.evaluate(phi, batch).loss)
        self._checked = True

    def _not_finite(self, result: MetaGradient, buffers: Params) -> list[str]:
        """What the step would write and is not finite: its one device synchronisation."""
        scalars = {"train loss": result.train_loss, "meta loss": result.meta_loss}
        groups = {
            "gradient of": result.gradient,
            "hyper-gradient of": {**result.hyper_gradient, **result.weight_gradient},
            "phi~ of": result.adapted if self._reads_adapted else {},
            "buffer": {n: b for n, b in buffers.items() if b.is_floating_point()},
        }
        return not_finite(scalars, result.terms, groups)

    @property
    def _reads_adapted(self) -> bool:
        return self.alpha > 0 or self.inner_state == "shared"

    def _optimize(self, targets: Sequence[Tensor]) -> None:
        """The optimizer's step on ``targets``, those of its parameters that have a gradient."""
        if not targets:
            return  # a scaler refuses a step without any gradient
        if self.scaler is None:
            self.optimizer.step()
        else:
            scale = self._scale()
            for target in targets:
                assert target.grad is not None
                target.grad = target.grad * scale  # GradScaler.step expects scaled gradients
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _skip(self, targets: Sequence[Tensor]) -> None:
        """Show the scaler a gradient that is not finite: it takes no step and lowers its scale."""
        for target in targets:
            target.grad = torch.full_like(target, torch.inf)
        self._optimize(targets)

    def _scale(self) -> Tensor:
        assert self.scaler is not None
        return self.scaler.scale(torch.ones((), device=next(self.model.parameters()).device))
