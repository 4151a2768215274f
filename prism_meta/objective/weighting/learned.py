"""Weights learned through the inner step (E12)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, torch's own convention

from prism_meta.networks.prediction import ShownPairs
from prism_meta.objective.weighting.base import BETA, DELTA, PairWeights, Weight, Weighting


class LearnedWeights(Weighting):
    """Weights beta and delta learned through the inner step, by the gradient of L_meta (E12).

    beta_m = softplus(free_beta_m), and delta_m = softplus(free_delta_m). For one SGD step with
    v = grad L_meta(phi~),

        d L_meta / d beta_m = -eta_in <grad_phi L_pixel^m(phi), v>.

    Only L_train uses the learned weights, because L_meta would reduce them to 0; see
    ``PrismObjective.meta_objective``. Add the tensors of ``hyper_parameters()`` to the optimizer of
    ``MetaLearner`` as a parameter group without weight decay.

    Args:
        num_modalities: M.
        beta: initial weight of pixel distillation (E8), > 0, one number or one per modality. Defaults to
            0.02.
        delta: initial weight of prototype alignment (E9), in the same form. Defaults to 0.01.

    Raises:
        ValueError: an initial value is not positive, or the number of values is wrong.

    Source: E12 is MAML's meta-gradient with respect to the weights of the objective. Meta-SGD (Li et
    al., 2017) does the same for learning rates.

    Example:
        >>> weighting = LearnedWeights(2, beta=0.5, delta=(0.1, 0.2))
        >>> weighting.weights(torch.zeros(2), torch.zeros(2))[1].detach()
        tensor([0.1000, 0.2000])
        >>> sorted(weighting.hyper_parameters())
        ['free_beta', 'free_delta']
    """

    def __init__(self, num_modalities: int, *, beta: Weight = BETA, delta: Weight = DELTA) -> None:
        super().__init__(num_modalities, (beta, delta))
        self.free_beta = nn.Parameter(_free("beta", beta, num_modalities))
        self.free_delta = nn.Parameter(_free("delta", delta, num_modalities))

    def weights(self, beta: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        return F.softplus(self.free_beta).to(beta), F.softplus(self.free_delta).to(delta)

    def weigh(
        self, beta: Tensor, delta: Tensor, pairs: ShownPairs, distance: Callable[[], Tensor]
    ) -> PairWeights:
        beta, delta = self.weights(beta, delta)
        terms = {"beta": beta.detach(), "delta": delta.detach()}
        return PairWeights(beta[pairs.modality], delta[pairs.modality], terms)


def _free(name: str, start: Weight, count: int) -> Tensor:
    """Inverse softplus of the initial values, (M,)."""
    values = list(start) if isinstance(start, Sequence) else [start] * count
    if len(values) != count:
        raise ValueError(
            f"{name}: got {len(values)} weights, expected 1 or {count}, one per modality"
        )
    if any(not value > 0 for value in values):
        raise ValueError(f"{name}: got {start}, expected numbers > 0, because softplus is never 0")
    return torch.tensor([value + math.log(-math.expm1(-value)) for value in values])
