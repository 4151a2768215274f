"""Alignment of class prototypes between single modalities and the fused branch (E9, E11).

The prototype c_k of a class is the mean feature over its voxels in one sample.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prism_meta.objective.losses.shapes import check_target, mean_over_voxels, one_hot_of


def prototype_l2(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    num_classes: int,
    *,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Squared distance of the class prototypes of student and teacher (E9).

    .. math::
        L = \sum_{k\ \mathrm{present}} \lVert c_k^s - c_k^t \rVert^2

    Here c_k^s and c_k^t are the prototypes of class k in the student's and the teacher's features. A class
    that is absent from a sample adds 0 to it and does not change the other samples. The teacher is
    detached.

    Args:
        student: (B, C, *S) features of a single modality.
        teacher: (B, C, *S) features of the fused branch.
        target: (B, *S) long, class indices in [0, K).
        num_classes: K.
        valid: (B, *S) bool, the voxels v to count. Defaults to None, all voxels.

    Returns:
        (B,), at least 0: sum over classes and channels; the batch is not reduced.

    Raises:
        ValueError: the shapes do not match.

    Source: PASSION (Shi et al., ACM MM 2024).

    Example:
        >>> target = torch.tensor([[0, 0, 1, 1]])
        >>> prototype_l2(torch.ones(1, 3, 4), torch.zeros(1, 3, 4), target, num_classes=4)
        tensor([6.])
    """
    one_hot = _prototype_targets(student, teacher, target, num_classes, valid)
    distance = _prototypes(student, one_hot) - _prototypes(teacher.detach(), one_hot)
    return distance.square().sum((1, 2))  # both prototypes of an absent class are exactly 0


def prototype_similarity(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    num_classes: int,
    *,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Squared difference of the voxels' similarities to the prototypes (E9, option).

    .. math::
        L = \frac{1}{V K'} \sum_v \sum_{k\ \mathrm{present}}
            (\cos(z_v^s, c_k^s) - \cos(z_v^t, c_k^t))^2

    Here z_v is the feature of voxel v, c_k the prototype of class k, s the student, t the teacher, V the
    number of voxels and K' the number of classes present in the sample. An absent class is left out. The
    teacher is detached.

    Args:
        student: (B, C, *S) features of a single modality.
        teacher: (B, C, *S) features of the fused branch.
        target: (B, *S) long, class indices in [0, K).
        num_classes: K.
        valid: (B, *S) bool, the voxels v to count. Defaults to None, all voxels.

    Returns:
        (B,), in [0, 4]: mean over voxels and present classes; the batch is not reduced.

    Raises:
        ValueError: the shapes do not match.

    Source: PASSION (Shi et al., ACM MM 2024).

    Example:
        >>> z = torch.randn(2, 3, 8)
        >>> bool((prototype_similarity(z, 2 * z, torch.zeros(2, 8).long(), 4) < 1e-10).all())
        True
    """
    return _mean_over_present(torch.square, student, teacher, target, num_classes, valid)


def prototype_distance(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    num_classes: int,
    *,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Absolute difference of the voxels' similarities to the prototypes (D of E11).

    .. math::
        D = \frac{1}{V K'} \sum_v \sum_{k\ \mathrm{present}}
            |\cos(z_v^s, c_k^s) - \cos(z_v^t, c_k^t)|

    The symbols are those of ``prototype_similarity``. An absent class is left out. The teacher is
    detached.

    Args:
        student: (B, C, *S) features of a single modality.
        teacher: (B, C, *S) features of the fused branch.
        target: (B, *S) long, class indices in [0, K).
        num_classes: K.
        valid: (B, *S) bool, the voxels v to count. Defaults to None, all voxels.

    Returns:
        (B,), in [0, 2]: mean over voxels and present classes; the batch is not reduced.

    Raises:
        ValueError: the shapes do not match.

    Source: PASSION (Shi et al., ACM MM 2024), the distance of its relative preference.

    Example:
        >>> student, teacher = torch.tensor([[[1.0, -1.0]]]), torch.tensor([[[1.0, 3.0]]])
        >>> target = torch.tensor([[0, 1]])  # class 0 differs in voxel 1, class 1 in voxel 0
        >>> prototype_distance(student, teacher, target, num_classes=4)
        tensor([1.])
    """
    return _mean_over_present(torch.abs, student, teacher, target, num_classes, valid)


def _mean_over_present(
    size: Callable[[Tensor], Tensor],
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    num_classes: int,
    valid: Tensor | None,
) -> Tensor:
    """Mean of ``size(difference of the similarities)`` over voxels and present classes: (B,)."""
    one_hot = _prototype_targets(student, teacher, target, num_classes, valid)
    present = one_hot.any(2)
    difference = _similarity(student, one_hot) - _similarity(teacher.detach(), one_hot)
    per_class = mean_over_voxels(size(difference), valid) * present
    return per_class.sum(1) / present.sum(1).clamp(min=1)


def _similarity(features: Tensor, one_hot: Tensor) -> Tensor:
    """cos(z_v, c_k): (B, K, V). Absent classes get a non-zero prototype: 0/0 has no gradient."""
    prototypes = _prototypes(features, one_hot)
    prototypes = torch.where(one_hot.any(2, keepdim=True), prototypes, torch.ones_like(prototypes))
    return torch.einsum("bkc,bcv->bkv", _unit(prototypes, 2), _unit(features.flatten(2), 1))


def _unit(x: Tensor, dim: int) -> Tensor:
    """Normalise to length 1 along ``dim``; unlike F.normalize, twice differentiable at 0."""
    return x / (x.square().sum(dim, keepdim=True) + 1e-12).sqrt()


def _prototypes(features: Tensor, one_hot: Tensor) -> Tensor:
    """c_k: (B, K, C); exactly 0 for an absent class."""
    sums = torch.einsum("bkv,bcv->bkc", one_hot, features.flatten(2))
    return sums / one_hot.sum(2, keepdim=True).clamp(min=1)


def _prototype_targets(
    student: Tensor, teacher: Tensor, target: Tensor, num_classes: int, valid: Tensor | None
) -> Tensor:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student: got {tuple(student.shape)}, expected the teacher's {tuple(teacher.shape)}"
        )
    check_target(student, target, what="features")
    return one_hot_of(target, num_classes, student, valid)
