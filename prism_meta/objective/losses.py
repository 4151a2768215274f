"""PRISM's losses E5-E9 and the distance of E11 as pure functions, one number per sample.

All of them take logits or features with channels second, any number of spatial dimensions ``*S``, and
labels as class indices. They do not average over the batch, because E10 weights the samples first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812, torch's own convention

Direction = Literal["student_teacher", "teacher_student"]


def weighted_cross_entropy(logits: Tensor, target: Tensor, *, weighted: bool = True) -> Tensor:
    """Cross-entropy with smaller weights for frequent classes, per sample.

        mean over v of -w_{y_v} log p_{y_v}(v),    w_k = 1 - |V_k| / |V|

    where v runs over the voxels V of the sample, V_k are those of class k, and p = softmax(logits). The
    sum is divided by the number of voxels, not by the sum of the weights. A sample with
    only one class has loss 0.

    Args:
        logits: (B, K, *S).
        target: (B, *S) long.
        weighted: False for plain cross-entropy. Defaults to True.

    Returns:
        (B,).

    Raises:
        ValueError: the shapes do not fit.

    Source: PASSION (Shi et al., ACM MM 2024).

    Example:
        >>> logits, target = torch.zeros(1, 2, 4), torch.tensor([[0, 0, 0, 1]])
        >>> weighted_cross_entropy(logits, target) / torch.tensor(2.0).log()
        tensor([0.3750])
    """
    _check(logits, target)
    per_voxel = F.cross_entropy(logits, target, reduction="none").flatten(1)
    if weighted:
        labels = target.flatten(1)
        counts = per_voxel.new_zeros(logits.shape[:2]).scatter_add_(
            1, labels, torch.ones_like(per_voxel)
        )
        weights = 1 - counts / labels.shape[1]
        per_voxel = per_voxel * weights.gather(1, labels)
    return per_voxel.mean(1)


def soft_dice(logits: Tensor, target: Tensor, *, eps: float = 1e-7) -> Tensor:
    """Soft Dice loss over all classes, background included, per sample.

        1 - mean over k of 2 sum_v p_k y_k / (sum_v p_k + sum_v y_k + eps)

    where p = softmax(logits), y is the one-hot target, and sums run over the voxels v of the sample. A
    class that is neither predicted nor present has a Dice of 0, so it adds 1/K to the loss.

    Args:
        logits: (B, K, *S).
        target: (B, *S) long.
        eps: prevents 0/0. Defaults to 1e-7.

    Returns:
        (B,), in [0, 1].

    Raises:
        ValueError: the shapes do not fit.

    Source: V-Net (Milletari et al., 3DV 2016), in the form of E5.

    Example:
        >>> soft_dice(torch.tensor([[[30.0, -30.0], [-30.0, 30.0]]]), torch.tensor([[0, 1]])).item() < 1e-6
        True
    """
    _check(logits, target)
    probability = logits.softmax(1).flatten(2)
    one_hot = _one_hot(target, logits.shape[1], probability)
    overlap = 2 * (probability * one_hot).sum(2)
    return 1 - (overlap / (probability.sum(2) + one_hot.sum(2) + eps)).mean(1)


def segmentation(logits: Tensor, target: Tensor, *, weighted: bool = True) -> Tensor:
    """CE + Dice, the segmentation loss of E5, E6 and E7, per sample.

    Args:
        logits: (B, K, *S).
        target: (B, *S) long.
        weighted: class weights in the cross-entropy. Defaults to True.

    Returns:
        (B,).

    Example:
        >>> segmentation(torch.zeros(2, 4, 8, 8), torch.zeros(2, 8, 8).long()).shape
        torch.Size([2])
    """
    return weighted_cross_entropy(logits, target, weighted=weighted) + soft_dice(logits, target)


def pixel_distillation(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 4.0,
    direction: Direction = "student_teacher",
) -> Tensor:
    """Pixel distillation (E8) for one map, per sample.

        mean over v of T^2 KL(softmax(z^s / T) || softmax(z^t / T))

    where v runs over the voxels, the divergence sums over classes, and z^s and z^t are the logits of student
    and teacher. The teacher is detached.

    Args:
        student: (B, K, *S) logits from a single modality.
        teacher: (B, K, *S) logits of the fused branch.
        temperature: T > 0. Defaults to 4.
        direction: ``teacher_student`` for KL(teacher || student), as in the published code.

    Returns:
        (B,), at least 0.

    Raises:
        ValueError: the shapes differ, or an argument is out of range.

    Source: PASSION (Shi et al., ACM MM 2024); Hinton et al., 2015.

    Example:
        >>> z = torch.randn(2, 4, 8, 8)
        >>> pixel_distillation(z, z)
        tensor([0., 0.])
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student: got {tuple(student.shape)}, expected the teacher's {tuple(teacher.shape)}"
        )
    if temperature <= 0:
        raise ValueError(f"temperature: got {temperature}, expected a number > 0")
    log_student = (student / temperature).log_softmax(1)
    log_teacher = (teacher.detach() / temperature).log_softmax(1)
    if direction == "student_teacher":
        divergence = log_student.exp() * (log_student - log_teacher)
    elif direction == "teacher_student":
        divergence = log_teacher.exp() * (log_teacher - log_student)
    else:
        raise ValueError(
            f"direction: got {direction!r}, expected 'student_teacher' or 'teacher_student'"
        )
    return temperature**2 * divergence.sum(1).flatten(1).mean(1)


def prototype_l2(student: Tensor, teacher: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """E9: sum over present classes k of ||c_k^student - c_k^teacher||^2, per sample.

    c_k is the mean feature over the voxels of class k in that sample. An absent class adds 0. The
    teacher is detached.

    Args:
        student: (B, C, *S) features from a single modality.
        teacher: (B, C, *S) features of the fused branch.
        target: (B, *S) long.
        num_classes: K.

    Returns:
        (B,).

    Raises:
        ValueError: the shapes do not fit.

    Source: PASSION (Shi et al., ACM MM 2024).

    Example:
        >>> target = torch.tensor([[0, 0, 1, 1]])
        >>> prototype_l2(torch.ones(1, 3, 4), torch.zeros(1, 3, 4), target, num_classes=4)
        tensor([6.])
    """
    one_hot = _prototype_targets(student, teacher, target, num_classes)
    distance = _prototypes(student, one_hot) - _prototypes(teacher.detach(), one_hot)
    return distance.square().sum((1, 2))  # both prototypes of an absent class are exactly 0


def prototype_similarity(
    student: Tensor, teacher: Tensor, target: Tensor, num_classes: int
) -> Tensor:
    """E9, option ``similarity``: how differently voxels relate to their prototypes, per sample.

    Mean over voxels and present classes of (cos(z^student, c_k^student) - cos(z^teacher,
    c_k^teacher))^2. The teacher is detached.

    Args:
        student: (B, C, *S) features from a single modality.
        teacher: (B, C, *S) features of the fused branch.
        target: (B, *S) long.
        num_classes: K.

    Returns:
        (B,), in [0, 4].

    Raises:
        ValueError: the shapes do not fit.

    Source: PASSION (Shi et al., ACM MM 2024).

    Example:
        >>> z = torch.randn(2, 3, 8)
        >>> bool((prototype_similarity(z, 2 * z, torch.zeros(2, 8).long(), 4) < 1e-10).all())
        True
    """
    return _mean_over_present(torch.square, student, teacher, target, num_classes)


def prototype_distance(
    student: Tensor, teacher: Tensor, target: Tensor, num_classes: int
) -> Tensor:
    """D of E11: ``prototype_similarity`` with absolute values instead of squares, per sample.

    Mean over voxels and present classes of |cos(z^student, c_k^student) - cos(z^teacher,
    c_k^teacher)|. The teacher is detached.

    Args:
        student: (B, C, *S) features from a single modality.
        teacher: (B, C, *S) features of the fused branch.
        target: (B, *S) long.
        num_classes: K.

    Returns:
        (B,), in [0, 2].

    Raises:
        ValueError: the shapes do not fit.

    Source: PASSION (Shi et al., ACM MM 2024), the distance of its relative preference.

    Example:
        >>> student, teacher = torch.tensor([[[1.0, -1.0]]]), torch.tensor([[[1.0, 3.0]]])
        >>> target = torch.tensor([[0, 1]])  # class 0 differs in voxel 1, class 1 in voxel 0
        >>> prototype_distance(student, teacher, target, num_classes=4)
        tensor([1.])
    """
    return _mean_over_present(torch.abs, student, teacher, target, num_classes)


def _mean_over_present(
    size: Callable[[Tensor], Tensor],
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    num_classes: int,
) -> Tensor:
    """Mean over voxels and present classes of ``size`` of the difference of similarities: (B,)."""
    one_hot = _prototype_targets(student, teacher, target, num_classes)
    present = one_hot.any(2)
    difference = _similarity(student, one_hot) - _similarity(teacher.detach(), one_hot)
    per_class = size(difference).mean(2) * present
    return per_class.sum(1) / present.sum(1)


def _similarity(features: Tensor, one_hot: Tensor) -> Tensor:
    """cos(z_v, c_k): (B, K, V). Zero prototypes of absent classes are replaced, as 0/0 has no gradient."""
    prototypes = _prototypes(features, one_hot)
    prototypes = torch.where(one_hot.any(2, keepdim=True), prototypes, torch.ones_like(prototypes))
    return torch.einsum("bkc,bcv->bkv", _unit(prototypes, 2), _unit(features.flatten(2), 1))


def _unit(x: Tensor, dim: int) -> Tensor:
    """Scale to length 1 along ``dim``; unlike F.normalize, it has two derivatives at 0."""
    return x / (x.square().sum(dim, keepdim=True) + 1e-12).sqrt()


def _prototypes(features: Tensor, one_hot: Tensor) -> Tensor:
    """c_k: (B, K, C), exactly 0 for an absent class."""
    sums = torch.einsum("bkv,bcv->bkc", one_hot, features.flatten(2))
    return sums / one_hot.sum(2, keepdim=True).clamp(min=1)


def _prototype_targets(
    student: Tensor, teacher: Tensor, target: Tensor, num_classes: int
) -> Tensor:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student: got {tuple(student.shape)}, expected the teacher's {tuple(teacher.shape)}"
        )
    _check(student, target, what="features")
    return _one_hot(target, num_classes, student)


def _one_hot(target: Tensor, num_classes: int, like: Tensor) -> Tensor:
    """(B, K, V) in the dtype of ``like``; F.one_hot would return int64 with the classes last."""
    labels = target.flatten(1)[:, None]
    shape = (target.shape[0], num_classes, labels.shape[2])
    return torch.zeros(shape, dtype=like.dtype, device=like.device).scatter_(1, labels, 1)


def _check(maps: Tensor, target: Tensor, *, what: str = "logits") -> None:
    if (maps.shape[0], *maps.shape[2:]) != target.shape:
        raise ValueError(
            f"target: got {tuple(target.shape)}, expected (B, *S) = "
            f"{(maps.shape[0], *maps.shape[2:])} for {what} {tuple(maps.shape)}"
        )
