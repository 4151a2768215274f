"""Losses of logits against labels: cross-entropy, Dice and their sum (E5, E6, E7)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812, torch's own convention

from prism_meta.objective.losses.shapes import check_target, mean_over_voxels, one_hot_of


def weighted_cross_entropy(
    logits: Tensor, target: Tensor, *, weighted: bool = True, valid: Tensor | None = None
) -> Tensor:
    r"""Cross-entropy with a smaller weight for frequent classes.

    .. math::
        \mathrm{CE} = -\frac{1}{V} \sum_v w_{y_v} \log p_{y_v}(v), \qquad w_k = 1 - V_k / V

    Here p = softmax(logits), V is the number of voxels and V_k the number of voxels of class k in the
    same sample. The sum is divided by V, not by the sum of the weights. A class that is absent from a
    sample adds 0. A sample with a single class has the loss 0, because w_k = 0.

    Args:
        logits: (B, K, *S) logits, not probabilities.
        target: (B, *S) long, class indices in [0, K).
        weighted: False sets all w_k to 1, which is plain cross-entropy. Defaults to True.
        valid: (B, *S) bool, the voxels v to count. Defaults to None, all voxels.

    Returns:
        (B,), the mean over voxels of each sample; the batch is not reduced.

    Raises:
        ValueError: the shapes do not match.

    Source: PASSION (Shi et al., ACM MM 2024).

    Example:
        >>> logits, target = torch.zeros(1, 2, 4), torch.tensor([[0, 0, 0, 1]])
        >>> weighted_cross_entropy(logits, target) / torch.tensor(2.0).log()
        tensor([0.3750])
    """
    check_target(logits, target)
    per_voxel = F.cross_entropy(logits, target, reduction="none").flatten(1)
    if weighted:
        labels = target.flatten(1)
        one = torch.ones_like(per_voxel) if valid is None else valid.flatten(1).to(per_voxel.dtype)
        counts = per_voxel.new_zeros(logits.shape[:2]).scatter_add_(1, labels, one)
        total = labels.shape[1] if valid is None else one.sum(1, keepdim=True).clamp(min=1)
        weights = 1 - counts / total
        per_voxel = per_voxel * weights.gather(1, labels)
    return mean_over_voxels(per_voxel, valid)


def soft_dice(
    logits: Tensor, target: Tensor, *, eps: float = 1e-7, valid: Tensor | None = None
) -> Tensor:
    r"""Soft Dice loss over all classes, including the background.

    .. math::
        \mathrm{Dice} = 1 - \frac{1}{K} \sum_k
            \frac{2 \sum_v p_k(v) y_k(v)}{\sum_v p_k(v) + \sum_v y_k(v) + \varepsilon}

    Here p = softmax(logits) and y_k(v) is 1 if voxel v has class k, else 0. A class that is absent from
    a sample has a Dice of 0, so it adds 1/K to the loss, whatever is predicted.

    Args:
        logits: (B, K, *S) logits, not probabilities.
        target: (B, *S) long, class indices in [0, K).
        eps: avoids 0/0 for a class that is neither present nor predicted. Defaults to 1e-7.
        valid: (B, *S) bool, the voxels v to count. Defaults to None, all voxels.

    Returns:
        (B,), in [0, 1]; the batch is not reduced.

    Raises:
        ValueError: the shapes do not match.

    Source: V-Net (Milletari et al., 3DV 2016), without squares in the denominator.

    Example:
        >>> soft_dice(torch.tensor([[[30.0, -30.0], [-30.0, 30.0]]]), torch.tensor([[0, 1]])).item() < 1e-6
        True
    """
    check_target(logits, target)
    probability = logits.softmax(1).flatten(2)
    if valid is not None:
        probability = probability * valid.flatten(1)[:, None]
    one_hot = one_hot_of(target, logits.shape[1], probability, valid)
    overlap = 2 * (probability * one_hot).sum(2)
    return 1 - (overlap / (probability.sum(2) + one_hot.sum(2) + eps)).mean(1)


def segmentation(
    logits: Tensor, target: Tensor, *, weighted: bool = True, valid: Tensor | None = None
) -> Tensor:
    """Cross-entropy plus Dice, the loss of the fused, unimodal and prm logits (E5, E6, E7).

    The sum of ``weighted_cross_entropy`` and ``soft_dice``, which say what an absent class does.

    Args:
        logits: (B, K, *S) logits, not probabilities.
        target: (B, *S) long, class indices in [0, K).
        weighted: True uses class weights in the cross-entropy. Defaults to True.
        valid: (B, *S) bool, the voxels to count. Defaults to None, all voxels.

    Returns:
        (B,); the batch is not reduced.

    Raises:
        ValueError: the shapes do not match.

    Example:
        >>> segmentation(torch.zeros(2, 4, 8, 8), torch.zeros(2, 8, 8).long()).shape
        torch.Size([2])
    """
    cross_entropy = weighted_cross_entropy(logits, target, weighted=weighted, valid=valid)
    return cross_entropy + soft_dice(logits, target, valid=valid)
