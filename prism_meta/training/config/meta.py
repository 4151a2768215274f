"""The section ``meta`` of a configuration: the strategy, and what its two levels do."""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from prism_meta.bilevel.strategies import MetaStrategy, SingleLevel
from prism_meta.bilevel.strategies.registry import ALL_STRATEGIES, strategy_named
from prism_meta.bilevel.strategies.reptile import EPSILON, StepWeights
from prism_meta.errors import ConfigError, raise_faults
from prism_meta.training.config.types import (
    NotNegative,
    Positive,
    Repeats,
    Section,
    Share,
    listed,
)
from prism_meta.training.outer.optimizer import ALPHA

Epsilon = Annotated[float, Field(strict=True, gt=0, le=1)]
#: A pattern of parameter names, with * and ?.
Pattern = Annotated[str, Field(strict=True, min_length=1)]
#: Keys that say nothing to a strategy without inner steps.
INNER_KEYS = (
    "inner",
    "inner_lr",
    "inner_momentum",
    "inner_decay",
    "inner_steps",
    "inner_state",
    "alpha",
)


class MetaConfig(Section):
    """The two levels: the strategy, its inner steps, and the pull of E2."""

    #: Name of a registered strategy, see ``register_strategy``.
    strategy: str = SingleLevel.name
    inner: Literal["sgd", "adamw"] = "sgd"
    inner_lr: NotNegative = 0.05
    inner_momentum: Share = 0.0
    #: Let the inner rate follow training.schedule, as the outer one does.
    inner_decay: bool = True
    inner_steps: Repeats = 1
    #: State of the inner optimizer between outer steps: fresh, carried, or shared with the outer AdamW.
    inner_state: Literal["fresh", "carried", "shared"] = "fresh"
    #: Patterns of parameter names, e.g. ``"*films*"``: only these get the meta-gradient, and the inner steps
    #: move all others, which the outer step pulls by alpha. Defaults to no such division.
    outer_parameters: (
        Annotated[tuple[Pattern, ...], BeforeValidator(listed), Field(min_length=1)] | None
    ) = None
    #: Weight of phi~ - phi in E2; 0 for a strategy that prescribes its own outer step.
    alpha: Share = ALPHA
    #: Episodes that an outer step averages over.
    episodes: Repeats = 1
    #: Step size of ``reptile``: constant, or the first and the last of a linear schedule. A constant 1 is
    #: plain training with the inner optimizer, a smaller one Lookahead.
    epsilon: Epsilon | tuple[Epsilon, Epsilon] = EPSILON
    #: Weights of the inner gradients of ``reptile``: equal, or falling as 2 (n - i + 1) / (n + 1).
    step_weights: StepWeights = "equal"
    #: Lambda and the number of conjugate-gradient steps of ``implicit``.
    proximal: Positive = 1.0
    cg_steps: Repeats = 5

    @property
    def kind(self) -> type[MetaStrategy]:
        """The class that ``strategy`` names."""
        return strategy_named(self.strategy)

    @property
    def prescribes_outer(self) -> bool:
        """Whether the strategy brings an outer optimizer of its own."""
        return self.kind.outer_optimizer is not MetaStrategy.outer_optimizer

    @field_validator("strategy")
    @classmethod
    def _registered(cls, name: str) -> str:
        known = [kind.name for kind in ALL_STRATEGIES]
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"got {name!r}, expected one of {', '.join(known)}; did you mean {nearest}?"
            )
        return name

    @model_validator(mode="after")
    def _consistent(self) -> MetaConfig:
        useless = [
            f"{name}: {self.strategy} has none; leave it out, or use reptile"
            for name in ("epsilon", "step_weights")
            if getattr(self, name) != type(self).model_fields[name].default
            and name not in self.kind.options
        ]
        useless += [
            f"{name}: {self.strategy} takes no inner steps; leave it out, or name another strategy, e.g. "
            "first_order"
            for name in INNER_KEYS
            if getattr(self, name) != type(self).model_fields[name].default and not self.kind.adapts
        ]
        raise_faults(ConfigError, useless)
        if self.inner_state == "shared" and self.inner != "adamw":
            raise ValueError(
                "inner_state: shared needs inner = adamw, the optimizer of the outer step; use it, or "
                "fresh or carried"
            )
        if self.inner_state == "shared" and self.prescribes_outer:
            raise ValueError(
                f"inner_state: shared does not go with {self.strategy}; use fresh or carried"
            )
        divides = self.outer_parameters is not None
        if divides and not (self.kind.adapts and self.kind.learns_from_meta):
            raise ValueError(
                f"outer_parameters: {self.strategy} has no inner steps for the other parameters, or no "
                "gradient for these; use first_order or second_order, or leave it out"
            )
        if divides and self.alpha == 0:
            raise ValueError(
                "alpha, outer_parameters: with alpha 0 all parameters but these would never change; use "
                "alpha 1"
            )
        unknown = [name for name in self.kind.options if name not in type(self).model_fields]
        if unknown:
            raise ValueError(
                f"strategy: {self.strategy} has the options {', '.join(unknown)}, which are no keys of "
                "a configuration; pass the strategy as an object to prism_meta.train"
            )
        return self
