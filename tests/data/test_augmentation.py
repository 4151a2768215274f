"""Augmentation: images and targets change together."""

from __future__ import annotations

import niftis
import numpy as np
import pytest
import torch
from helpers import dice
from niftis import SHAPE
from torch import Tensor

from prism_meta.data.augmentation import Augmentation


@pytest.mark.parametrize("dims", [2, 3])
def test_augmentation_keeps_image_and_target_together(dims: int) -> None:
    """The same change for both: the blob is still where the image is bright."""
    label = torch.from_numpy(niftis.draw_label(SHAPE, (1,)).astype(np.int64))
    label = label[..., 8] if dims == 2 else label
    labels = label.expand(6, *label.shape)
    images = torch.stack([labels * 5.0, labels * 5.0], dim=1)
    augment = Augmentation(dims, probability=1.0)
    kept = images.clone()
    batch = augment(images, labels, np.random.RandomState(1))
    same = augment(images, labels, np.random.RandomState(1))
    assert torch.equal(batch[0], same[0]) and torch.equal(batch[1], same[1])
    assert torch.equal(images, kept) and torch.equal(labels, label.expand_as(labels))
    changes = 0
    for image, changed, target in zip(images, *batch, strict=True):
        assert type(changed) is Tensor and type(target) is Tensor
        assert changed.shape == image.shape and changed.dtype == torch.float32
        assert target.shape == label.shape and target.dtype == torch.int64
        assert set(target.unique().tolist()) == {0, 1}
        for channel in changed:
            middle = (channel.min() + channel.max()) / 2
            assert dice(channel > middle, target > 0) > 0.85
        changes += not torch.equal(target, label)
    assert changes >= 4, "a small turn may leave a small blob as it was"


@pytest.mark.parametrize("dims", [2, 3])
def test_each_sample_of_a_batch_changes_by_its_own_amount(dims: int) -> None:
    image = torch.rand(1, 2, *[9] * dims).expand(8, 2, *[9] * dims)
    target = torch.zeros(8, *[9] * dims).long()
    changed, _ = Augmentation(dims, probability=1.0)(image, target, np.random.RandomState(0))
    assert len(changed.flatten(1).unique(dim=0)) == 8


@pytest.mark.parametrize("dims", [2, 3])
def test_turns_are_about_the_centre(dims: int) -> None:
    """A point in the middle stays there, whatever the flips, the turn and the scale."""
    point = torch.zeros(12, *[9] * dims)
    point[(slice(None), *[4] * dims)] = 1
    image = point[:, None].repeat(1, 2, *[1] * dims)
    _, target = Augmentation(dims, probability=1.0)(image, point.long(), np.random.RandomState(2))
    assert (target[(slice(None), *[4] * dims)] == 1).all()


def test_shares_of_changed_samples() -> None:
    """Flips change half of the samples, and the other transforms as many as their probability says."""
    target = torch.zeros(4000, 4, 4).long()
    target[:, 0, 0] = 1
    image = target[:, None].float()
    random = np.random.RandomState(3)
    changed, moved = Augmentation(2, probability=0.0)(image, target, random)
    corners = torch.stack([moved[:, i, j] for i in (0, -1) for j in (0, -1)], dim=1)
    assert ((corners.float().mean(0) - 0.25).abs() < 0.03).all()
    # Neither scaled (1 - 0.8) nor shifted nor of another contrast nor noisy.
    same = (changed[:, 0] == moved).all(2).all(1).float().mean()
    assert abs(float(same) - 0.2 * 0.2 * 0.8 * 0.8) < 0.01
