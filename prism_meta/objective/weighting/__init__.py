"""Weights of distillation (E8) and alignment (E9) per modality: by preference (E11) or learned (E12).

``PrismObjective`` uses fixed weights by default. A strategy evaluates the objective several times per
step, so ``weigh`` is a pure function of the batch. State changes only in ``observe`` and ``end_epoch``,
or in the outer optimizer.
"""

from prism_meta.objective.weighting.base import (
    BETA,
    DELTA,
    PairWeights,
    Weight,
    Weighting,
    modality_means,
)
from prism_meta.objective.weighting.learned import LearnedWeights
from prism_meta.objective.weighting.preference import (
    LOWEST,
    RelativePreference,
    project_to_sphere,
    relative_preference,
)
from prism_meta.objective.weighting.subsets import LearnedSubsetWeights

__all__ = [
    "BETA",
    "DELTA",
    "LOWEST",
    "LearnedSubsetWeights",
    "LearnedWeights",
    "PairWeights",
    "RelativePreference",
    "Weight",
    "Weighting",
    "modality_means",
    "project_to_sphere",
    "relative_preference",
]
