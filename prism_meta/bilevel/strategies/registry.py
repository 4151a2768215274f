"""The list of strategies that configurations, preflight, the documentation and the tests read."""

from __future__ import annotations

from prism_meta.bilevel.strategies.base import MetaStrategy
from prism_meta.bilevel.strategies.finite_difference import FiniteDifference
from prism_meta.bilevel.strategies.first_order import FirstOrder, SingleLevel
from prism_meta.bilevel.strategies.implicit import ImplicitMAML
from prism_meta.bilevel.strategies.joint import Joint
from prism_meta.bilevel.strategies.reptile import Reptile
from prism_meta.bilevel.strategies.second_order import SecondOrder

#: Every strategy. Add a new one here, or from outside with ``register_strategy``.
ALL_STRATEGIES: list[type[MetaStrategy]] = [
    SingleLevel,
    Joint,
    FirstOrder,
    SecondOrder,
    Reptile,
    FiniteDifference,
    ImplicitMAML,
]


def register_strategy(kind: type[MetaStrategy]) -> type[MetaStrategy]:
    """Add a strategy, so that a configuration can name it; usable as a decorator.

    Args:
        kind: the class, with a ``name``.

    Returns:
        The class itself.

    Raises:
        ValueError: its name is missing or taken by another class.

    Example:
        >>> register_strategy(FirstOrder)  # the same class again changes nothing
        <class 'prism_meta.bilevel.strategies.first_order.FirstOrder'>
    """
    name = getattr(kind, "name", None)
    if not isinstance(name, str) or not name:
        raise ValueError(f"{kind.__name__}: has no name; set the class attribute name = '...'")
    other = next((k for k in ALL_STRATEGIES if k.name == name and k is not kind), None)
    if other is not None:
        raise ValueError(f"{kind.__name__}: the name {name!r} belongs to {other.__name__}")
    if kind not in ALL_STRATEGIES:
        ALL_STRATEGIES.append(kind)
    return kind


def strategy_named(name: str) -> type[MetaStrategy]:
    """The class with this name in configurations.

    Raises:
        ValueError: there is none; the message lists those that there are.

    Example:
        >>> strategy_named("second_order").__name__
        'SecondOrder'
    """
    for kind in ALL_STRATEGIES:
        if kind.name == name:
            return kind
    raise ValueError(
        f"strategy: got {name!r}, expected one of {', '.join(k.name for k in ALL_STRATEGIES)}"
    )
