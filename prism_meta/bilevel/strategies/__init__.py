"""Meta-gradient strategies: how L_meta at the adapted parameters becomes a gradient at phi.

A strategy sees a module, an objective and two batches of any kind; it knows nothing of medicine.
The objective is called as ``objective(forward, batch)``, and ``forward`` has the module's own signature,
so the same objective runs at phi, at phi~ and inside a derivative.

==================== =========================================== ===================
class                gradient                                    units at K = 1
==================== =========================================== ===================
``SingleLevel``      of L_train at phi                           1 1/3
``FirstOrder``       E3, of L_meta at phi~                       2
``SecondOrder``      E4, exact                                   4
``Reptile``          phi - phi~                                  1 1/3
``FiniteDifference`` E4, curvature from two more gradients       4, in float64
``ImplicitMAML``     of the inner problem's solution             3 + 2 per CG step
==================== =========================================== ===================

One unit is a forward and a backward pass of the objective.
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
from prism_meta.bilevel.strategies.first_order import FirstOrder, Reptile, SingleLevel
from prism_meta.bilevel.strategies.implicit import ImplicitMAML
from prism_meta.bilevel.strategies.registry import (
    ALL_STRATEGIES,
    register_strategy,
    strategy_named,
)
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
