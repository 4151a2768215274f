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
    image = torch.stack([label * 5.0, label * 5.0])
    augment = Augmentation(dims, probability=1.0)
    changes = 0
    for seed in range(5):
        augment.seed(seed)
        changed, target = augment(image.clone(), label.clone())
        augment.seed(seed)
        again, again_target = augment(image.clone(), label.clone())
        assert torch.equal(changed, again) and torch.equal(target, again_target)
        assert type(changed) is Tensor and type(target) is Tensor
        assert changed.shape == image.shape and changed.dtype == torch.float32
        assert target.shape == label.shape and target.dtype == torch.int64
        assert set(target.unique().tolist()) == {0, 1}
        for channel in changed:
            middle = (channel.min() + channel.max()) / 2
            assert dice(channel > middle, target > 0) > 0.85
        changes += not torch.equal(target, label)
    assert changes >= 4, "a small turn may leave a small blob as it was"
