"""Distillation of the fused branch's logits to single modalities (E8)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from prism_meta.objective.losses.shapes import mean_over_voxels

Direction = Literal["student_teacher", "teacher_student"]


def pixel_distillation(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 4.0,
    direction: Direction = "student_teacher",
    *,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Kullback-Leibler divergence of single-modality and fused predictions, for one map (E8).

    .. math::
        L = \frac{T^2}{V} \sum_v \sum_k q_k(v) \log \frac{q_k(v)}{p_k(v)}

    Here q = softmax(student / T), p = softmax(teacher / T), and V is the number of voxels. The factor
    T^2 keeps the size of the gradient independent of T. No labels are used, so absent classes count like
    all others. The teacher is detached.

    Args:
        student: (B, K, *S) logits of a single modality, not probabilities.
        teacher: (B, K, *S) logits of the fused branch.
        temperature: T > 0. Defaults to 4.
        direction: ``student_teacher`` (the default) computes KL(q || p); ``teacher_student`` computes
            KL(p || q), as the published code does.
        valid: (B, *S) bool, the voxels v to count. Defaults to None, all voxels.

    Returns:
        (B,), at least 0: sum over classes, mean over voxels; the batch is not reduced.

    Raises:
        ValueError: the shapes differ, or an argument is out of range.

    Source: PASSION (Shi et al., ACM MM 2024); Hinton et al., 2015.

    Example:
        >>> import torch
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
    return temperature**2 * mean_over_voxels(divergence.sum(1).flatten(1), valid)
