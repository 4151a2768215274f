"""Base class of the weightings of distillation (E8) and prototype alignment (E9)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from prism_meta.networks.prediction import ShownPairs

#: One number for all modalities, or one per modality.
Weight = float | Sequence[float]

#: Default weights of E8 and E9.
BETA, DELTA = 0.02, 0.01


@dataclass(frozen=True)
class PairWeights:
    """The weights of the shown pairs of one batch.

    Args:
        beta: (P,), weights of pixel distillation (E8).
        delta: (P,), weights of prototype alignment (E9).
        terms: values that the objective adds to its terms, (M,) each and detached.
    """

    beta: Tensor
    delta: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


class Weighting(nn.Module, ABC):
    """Base class of weightings. A subclass implements ``weights`` and ``weigh``.

    Args:
        num_modalities: M.
        start: initial beta and delta. Defaults to ``(BETA, DELTA)``.
    """

    def __init__(self, num_modalities: int, start: tuple[Weight, Weight] = (BETA, DELTA)) -> None:
        super().__init__()
        self.num_modalities, self.start = num_modalities, start

    @abstractmethod
    def weights(self, beta: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The current weights, (M,) each, given the objective's fixed ``beta`` and ``delta``, (M,)."""

    @abstractmethod
    def weigh(
        self, beta: Tensor, delta: Tensor, pairs: ShownPairs, distance: Callable[[], Tensor]
    ) -> PairWeights:
        """The weights of the pairs of a batch.

        Args:
            beta: (M,), the objective's fixed weights of E8.
            delta: (M,), the objective's fixed weights of E9.
            pairs: the P shown pairs of the batch.
            distance: function that computes D of E11, (P,); call it only if needed.
        """

    def observe(self, terms: Mapping[str, Tensor]) -> None:
        """Record the terms of one evaluation of the objective."""

    def end_epoch(self) -> None:
        """Update the weights from the terms recorded since the last epoch."""

    def hyper_parameters(self) -> dict[str, Tensor]:
        """The parameters that the meta-gradient learns, by name; {} if there are none."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def modality_means(values: Tensor, pairs: ShownPairs) -> Tensor:
    """Mean over the samples that show each modality.

    Args:
        values: (P,).
        pairs: the shown pairs.

    Returns:
        (M,), detached; 0 for a modality that no sample shows.
    """
    shown = pairs.mask.sum(0)
    sums = values.new_zeros(len(shown)).index_add(0, pairs.modality, values.detach())
    return sums / shown.clamp(min=1)
