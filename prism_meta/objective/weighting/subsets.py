"""Weights of the samples' losses by subset, learned through the inner step (E12)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prism_meta.modalities import subset_index


class LearnedSubsetWeights(nn.Module):
    """A weight for each subset of modalities, which the losses of its samples in L_train are multiplied by.

    With S = 2^M - 1 subsets and free parameters a_s,

        w_s = S exp(a_s) / sum_r exp(a_r),        L_train = 1 / B sum_b w_s(b) L_b,

    so the mean weight is 1, where training starts. The weights get the gradient of L_meta through the inner
    step. For one SGD step with v = grad L_meta(phi~), and L^s the part of L_train that subset s has at
    w_s = 1,

        d L_meta / d w_s = -eta_in <grad_phi L^s(phi), v>.

    ``FirstOrder`` gets all of them by one forward-mode pass. A subset gains weight if a step on its samples
    is also a step down L_meta. L_meta itself uses no weights; combined with ``SoftWorst`` it asks which
    subsets to train on for the worst one.

    Args:
        num_modalities: M.

    Source: learning to reweight, Ren et al., ICML 2018, with a weight per subset instead of per sample; E12.

    Example:
        >>> subset_weights = LearnedSubsetWeights(2)
        >>> subset_weights.of(torch.tensor([[True, False], [True, True]])).tolist()
        [1.0, 1.0]
    """

    def __init__(self, num_modalities: int) -> None:
        super().__init__()
        self.num_modalities = num_modalities
        self.free_subsets = nn.Parameter(torch.zeros(2**num_modalities - 1))

    def weights(self) -> Tensor:
        """The weights (2^M - 1,), in the order of ``subsets``."""
        return len(self.free_subsets) * self.free_subsets.softmax(0)

    def of(self, mask: Tensor) -> Tensor:
        """The weight of each sample, (B,).

        Args:
            mask: bool (B, M).

        Raises:
            ValueError: the number of modalities differs.
        """
        if mask.shape[1] != self.num_modalities:
            raise ValueError(
                f"subset_weights: have {self.num_modalities} modalities, expected {mask.shape[1]} as in the "
                "batch"
            )
        return self.weights()[subset_index(mask)]
