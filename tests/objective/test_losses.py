"""Every loss against numbers worked out by hand, explicit loops, and MONAI."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers import F64, labels, randn
from monai.losses.dice import DiceCELoss, DiceLoss
from torch import Tensor
from torch.nn import functional as F  # noqa: N812, torch's own convention

from prism_meta.objective import losses

CLASSES = 3
Loss = Callable[..., Tensor]

#: Every loss as a function of student (B, C, *S), teacher and labels, with C = CLASSES.
LOSSES: dict[str, Loss] = {
    "weighted_cross_entropy": lambda z, _, y: losses.weighted_cross_entropy(z, y),
    "plain_cross_entropy": lambda z, _, y: losses.weighted_cross_entropy(z, y, weighted=False),
    "soft_dice": lambda z, _, y: losses.soft_dice(z, y),
    "segmentation": lambda z, _, y: losses.segmentation(z, y),
    "pixel student_teacher": lambda z, t, _: losses.pixel_distillation(z, t),
    "pixel teacher_student": lambda z, t, _: losses.pixel_distillation(
        z, t, direction="teacher_student"
    ),
    "prototype_l2": lambda z, t, y: losses.prototype_l2(z, t, y, CLASSES),
    "prototype_similarity": lambda z, t, y: losses.prototype_similarity(z, t, y, CLASSES),
    "prototype_distance": lambda z, t, y: losses.prototype_distance(z, t, y, CLASSES),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def arguments(batch: int, *size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and labels for LOSSES."""
    student, teacher = (randn(batch, CLASSES, *size, seed=seed + i) for i in (0, 1))
    return student, teacher, labels(batch, *size, classes=CLASSES, seed=seed + 2)


# ---------------------------------------------------------------- one suite for all


@pytest.mark.parametrize("size", [(4, 5), (3, 4, 2)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("batch", [1, 5])
@every_loss
def test_one_number_per_sample_that_depends_on_it_alone(
    loss: Loss, batch: int, size: tuple[int, ...]
) -> None:
    student, teacher, target = arguments(batch, *size, seed=100)
    target[0] %= 2  # a sample that lacks a class must not touch the others
    whole = loss(student, teacher, target)
    assert whole.shape == (batch,)
    assert whole.dtype == F64
    assert bool((whole > 0).all())
    for n in range(batch):
        single = loss(student[n : n + 1], teacher[n : n + 1], target[n : n + 1])
        assert single.item() == pytest.approx(whole[n].item(), rel=1e-12)


@every_loss
def test_space_is_only_a_set_of_voxels(loss: Loss) -> None:
    student, teacher, target = arguments(2, 12, seed=110)
    line = loss(student, teacher, target)
    volume = loss(
        student.view(2, CLASSES, 2, 3, 2),
        teacher.view(2, CLASSES, 2, 3, 2),
        target.view(2, 2, 3, 2),
    )
    torch.testing.assert_close(volume, line, rtol=1e-12, atol=0)


@every_loss
def test_derivatives_of_first_and_second_order(loss: Loss) -> None:
    student, teacher, target = arguments(2, 3, 2, seed=120)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, teacher, target), student)
    assert torch.autograd.gradgradcheck(lambda z: loss(z, teacher, target), student)


@pytest.mark.parametrize("present", [[0], [2], [0, 2]], ids=str)
@every_loss
def test_absent_classes_leave_every_derivative_finite(loss: Loss, present: list[int]) -> None:
    student, teacher, _ = arguments(2, 4, 4, seed=130)
    student.requires_grad_()
    target = torch.tensor(present)[labels(2, 4, 4, classes=len(present), seed=133)]
    value = loss(student, teacher, target).sum()
    (gradient,) = torch.autograd.grad(value, student, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), student, materialize_grads=True)
    for tensor in (value, gradient, second):
        assert bool(tensor.isfinite().all())


@every_loss
def test_far_logits_leave_value_and_gradient_finite(loss: Loss) -> None:
    student, teacher, target = arguments(2, 4, 4, seed=140)
    student = (2000 * student).requires_grad_()
    value = loss(student, 2000 * teacher, target).sum()
    (gradient,) = torch.autograd.grad(value, student)
    assert bool(value.isfinite()) and bool(gradient.isfinite().all())


@pytest.mark.parametrize("name", [n for n in LOSSES if n.startswith(("pixel", "prototype"))])
def test_the_teacher_gets_no_gradient_and_none_is_needed_to_agree(name: str) -> None:
    loss = LOSSES[name]
    student, teacher, target = arguments(2, 3, 4, seed=150)
    student.requires_grad_(), teacher.requires_grad_()
    of_student, of_teacher = torch.autograd.grad(
        loss(student, teacher, target).sum(), (student, teacher), allow_unused=True
    )
    assert of_teacher is None
    assert of_student.abs().sum() > 0
    assert loss(student, student, target).abs().max() < 1e-15


@pytest.mark.parametrize(
    "loss", [losses.weighted_cross_entropy, losses.soft_dice, losses.segmentation]
)
def test_a_target_of_another_shape_is_refused(loss: Loss) -> None:
    with pytest.raises(
        ValueError,
        match=r"target: got \(2, 4, 4\), expected \(B, \*S\) = \(2, 4, 5\) "
        r"for logits \(2, 3, 4, 5\)",
    ):
        loss(torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 4).long())


@pytest.mark.parametrize(
    "loss", [losses.prototype_l2, losses.prototype_similarity, losses.prototype_distance]
)
def test_prototypes_refuse_shapes_that_do_not_fit(loss: Callable[..., Tensor]) -> None:
    z = torch.zeros(2, 3, 4)
    with pytest.raises(
        ValueError, match=r"student: got \(2, 3, 4\), expected the teacher's \(2, 3, 5\)"
    ):
        loss(z, torch.zeros(2, 3, 5), torch.zeros(2, 4).long(), 3)
    with pytest.raises(
        ValueError,
        match=r"target: got \(1, 4\), expected \(B, \*S\) = \(2, 4\) for features \(2, 3, 4\)",
    ):
        loss(z, z, torch.zeros(1, 4).long(), 3)


# ---------------------------------------------------------------- cross-entropy


def test_weighted_cross_entropy_by_hand() -> None:
    # Half of the voxels are class 0, a quarter each class 1 and 2: w = 1/2, 3/4, 3/4.
    probability = torch.tensor(
        [[0.5, 0.25, 0.25], [0.8, 0.1, 0.1], [0.2, 0.6, 0.2], [0.1, 0.2, 0.7]], dtype=F64
    )
    logits, target = probability.log().T[None], torch.tensor([[0, 0, 1, 2]])
    expected = (
        -(0.5 * math.log(0.5) + 0.5 * math.log(0.8) + 0.75 * math.log(0.6) + 0.75 * math.log(0.7))
        / 4
    )
    actual = losses.weighted_cross_entropy(logits, target)
    assert actual.item() == pytest.approx(expected, rel=1e-12)


def test_weights_are_those_of_each_sample() -> None:
    # Uniform predictions: sample 0 has w = 1/4, 3/4 (3 x 1/4 + 3/4), sample 1 has one class, w = 0.
    logits = torch.zeros(2, 2, 4, dtype=F64)
    target = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1]])
    actual = losses.weighted_cross_entropy(logits, target)
    assert actual.tolist() == pytest.approx([1.5 / 4 * math.log(2), 0.0], rel=1e-12)


def test_weighted_cross_entropy_equals_loops() -> None:
    logits, target = randn(3, 4, 5, 2, seed=11), labels(3, 5, 2, classes=4, seed=12)
    for n, value in enumerate(losses.weighted_cross_entropy(logits, target).tolist()):
        z, y = logits[n].flatten(1).T.tolist(), target[n].flatten().tolist()
        total = 0.0
        for voxel, label in zip(z, y, strict=True):
            weight = 1 - y.count(label) / len(y)
            total -= weight * (voxel[label] - math.log(sum(math.exp(v) for v in voxel)))
        assert value == pytest.approx(total / len(y), rel=1e-12)


def test_plain_cross_entropy_is_torch() -> None:
    logits, target = randn(3, 4, 5, 2, seed=11), labels(3, 5, 2, classes=4, seed=12)
    expected = F.cross_entropy(logits, target, reduction="none").mean((1, 2))
    actual = losses.weighted_cross_entropy(logits, target, weighted=False)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


# ---------------------------------------------------------------- Dice


def test_soft_dice_by_hand() -> None:
    # p = (0.75, 0.25), (0.5, 0.5); y = 0, 1. Class 0: 2 * 0.75 / (1.25 + 1 + eps); class 1:
    # 2 * 0.5 / (0.75 + 1 + eps). eps is large so that leaving it out shows.
    logits = torch.tensor([[[0.75, 0.5], [0.25, 0.5]]], dtype=F64).log()
    actual = losses.soft_dice(logits, torch.tensor([[0, 1]]), eps=0.25)
    assert actual.item() == pytest.approx(1 - (1.5 / 2.5 + 1.0 / 2.0) / 2, rel=1e-12)


def test_soft_dice_counts_the_background_and_absent_classes() -> None:
    # All is background and so predicted: Dice 1 for class 0, 0 for the two absent classes.
    logits = torch.zeros(1, 3, 8, dtype=F64)
    logits[:, 0] = 800
    actual = losses.soft_dice(logits, torch.zeros(1, 8).long())
    assert actual.item() == pytest.approx(2 / 3, rel=1e-7)


def test_soft_dice_default_eps() -> None:
    logits, target = torch.tensor([[[800.0], [0.0]]], dtype=F64), torch.tensor([[0]])
    actual = losses.soft_dice(logits, target)
    assert actual.item() == pytest.approx(1 - 2 / (2 + 1e-7) / 2, rel=1e-12)


@pytest.mark.parametrize("size", [(6, 5), (3, 4, 5)], ids=["2-D", "3-D"])
def test_soft_dice_is_monai(size: tuple[int, ...]) -> None:
    logits, target = randn(3, 4, *size, seed=13), labels(3, *size, classes=4, seed=14)
    monai = DiceLoss(
        softmax=True,
        to_onehot_y=True,
        include_background=True,
        reduction="none",
        smooth_nr=0,
        smooth_dr=1e-7,
    )
    expected = monai(logits, target[:, None]).flatten(1).mean(1)
    torch.testing.assert_close(losses.soft_dice(logits, target), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [(6, 5), (3, 4, 5)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("batch", [1, 5])
def test_unweighted_segmentation_is_monai(batch: int, size: tuple[int, ...]) -> None:
    logits = randn(batch, 4, *size, seed=27)
    target = labels(batch, *size, classes=3, seed=28)  # class 3 is absent
    monai = DiceCELoss(softmax=True, to_onehot_y=True, smooth_nr=0, smooth_dr=1e-7)
    expected = monai(logits, target[:, None])
    actual = losses.segmentation(logits, target, weighted=False)
    torch.testing.assert_close(actual.mean(), expected, rtol=1e-12, atol=0)


def test_weights_of_one_sample_are_monai_class_weights() -> None:
    # torch divides a weighted cross-entropy by the weights that it met, and E5 by the voxels.
    logits, target = randn(1, 3, 6, 5, seed=29), labels(1, 6, 5, classes=3, seed=30)
    weight = 1 - target.flatten().bincount().double() / 30
    monai = DiceCELoss(
        softmax=True,
        to_onehot_y=True,
        weight=weight,
        lambda_dice=0.0,
        reduction="sum",
    )
    expected = monai(logits, target[:, None]) / 30
    actual = losses.weighted_cross_entropy(logits, target)
    torch.testing.assert_close(actual[0], expected, rtol=1e-12, atol=0)


def test_segmentation_is_the_sum() -> None:
    logits, target = randn(3, 4, 5, seed=15), labels(3, 5, classes=4, seed=16)
    for weighted in (True, False):
        expected = losses.weighted_cross_entropy(
            logits, target, weighted=weighted
        ) + losses.soft_dice(logits, target)
        assert torch.equal(losses.segmentation(logits, target, weighted=weighted), expected)


# ---------------------------------------------------------------- pixel distillation


def test_pixel_distillation_by_hand() -> None:
    # At T = 2 the softmax of 2 log p is p. Two voxels; the second agrees and adds 0.
    student = 2 * torch.tensor([[[0.5, 0.3], [0.5, 0.7]]], dtype=F64).log()
    teacher = 2 * torch.tensor([[[0.8, 0.3], [0.2, 0.7]]], dtype=F64).log()
    forward = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    backward = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    default = losses.pixel_distillation(student, teacher, 2.0)
    published = losses.pixel_distillation(student, teacher, 2.0, "teacher_student")
    assert default.item() == pytest.approx(4 * forward / 2, rel=1e-12)
    assert published.item() == pytest.approx(4 * backward / 2, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_pixel_distillation_is_torch_kl(temperature: float) -> None:
    student, teacher = randn(3, 4, 5, 2, seed=17), randn(3, 4, 5, 2, seed=18)
    p, q = ((z / temperature).log_softmax(1) for z in (student, teacher))
    scale = temperature**2
    # torch's kl_div(input, target) is KL(target || input).
    default = scale * F.kl_div(q, p, log_target=True, reduction="none").sum(1).mean((1, 2))
    published = scale * F.kl_div(p, q, log_target=True, reduction="none").sum(1).mean((1, 2))
    torch.testing.assert_close(
        losses.pixel_distillation(student, teacher, temperature), default, rtol=1e-10, atol=0
    )
    torch.testing.assert_close(
        losses.pixel_distillation(student, teacher, temperature, "teacher_student"),
        published,
        rtol=1e-10,
        atol=0,
    )


def test_the_default_temperature_is_4() -> None:
    student, teacher = randn(1, 4, 5, seed=19), randn(1, 4, 5, seed=20)
    assert torch.equal(
        losses.pixel_distillation(student, teacher),
        losses.pixel_distillation(student, teacher, 4.0, "student_teacher"),
    )


def test_pixel_distillation_refuses_bad_arguments() -> None:
    z = torch.zeros(1, 2, 3)
    with pytest.raises(
        ValueError, match=r"student: got \(1, 2, 3\), expected the teacher's \(1, 2, 4\)"
    ):
        losses.pixel_distillation(z, torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="temperature: got 0, expected a number > 0"):
        losses.pixel_distillation(z, z, 0)
    with pytest.raises(
        ValueError, match="direction: got 'both', expected 'student_teacher' or 'teacher_student'"
    ):
        losses.pixel_distillation(z, z, 4.0, "both")  # type: ignore[arg-type]
