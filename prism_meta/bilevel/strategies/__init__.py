"""Meta-gradient strategies: how L_meta at the adapted parameters becomes a gradient at phi.

A strategy sees a module, an objective and two batches of any kind; it knows nothing of medicine.
The objective is called as ``objective(forward, batch)``, and ``forward`` has the module's own signature,
so the same objective runs at phi, at phi~ and inside a derivative.
"""

from prism_meta.bilevel.functional.errors import (
    CheckpointError,
    HiddenParameterError,
    ReplayError,
    SecondDerivativeError,
)
from prism_meta.bilevel.functional.protocols import (
    Forward,
    LearnedObjective,
    Objective,
    ObjectiveValue,
)
from prism_meta.bilevel.strategies.base import (
    FunctionalStrategy,
    GraphSizes,
    MetaGradient,
    MetaStrategy,
    StepBatches,
)
from prism_meta.bilevel.strategies.finite_difference import FiniteDifference
from prism_meta.bilevel.strategies.first_order import FirstOrder, SingleLevel
from prism_meta.bilevel.strategies.implicit import ImplicitMAML
from prism_meta.bilevel.strategies.joint import Joint
from prism_meta.bilevel.strategies.registry import (
    ALL_STRATEGIES,
    register_strategy,
    strategy_named,
)
from prism_meta.bilevel.strategies.reptile import Reptile
from prism_meta.bilevel.strategies.second_order import SecondOrder

__all__ = [
    "ALL_STRATEGIES",
    "CheckpointError",
    "FiniteDifference",
    "FirstOrder",
    "Forward",
    "FunctionalStrategy",
    "GraphSizes",
    "HiddenParameterError",
    "ImplicitMAML",
    "Joint",
    "LearnedObjective",
    "MetaGradient",
    "MetaStrategy",
    "Objective",
    "ObjectiveValue",
    "ReplayError",
    "Reptile",
    "SecondDerivativeError",
    "SecondOrder",
    "SingleLevel",
    "StepBatches",
    "register_strategy",
    "strategy_named",
]
