"""Volumes of any shape: one voxel along an axis, thinner than the model's grid, and both ways round."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from prism_meta.data.cases import Volume
from prism_meta.data.labels import LabelSet
from prism_meta.data.preprocessing import Prepared, Preprocessing
from prism_meta.data.restore import restore_classes, restore_maps

SHAPES = [(1, 1, 1), (1, 9, 8), (9, 1, 8), (9, 8, 1), (1, 1, 8), (9, 1, 1), (2, 3, 1), (5, 7, 3)]
SPACINGS = [(1.0, 1.0, 1.0), (2.0, 2.0, 2.0), (0.5, 0.7, 3.0), (30.0, 30.0, 30.0)]
LESION = LabelSet({"lesion": 1})


def volume_of(shape: tuple[int, int, int], turn: float = 0.0) -> Volume:
    generator = np.random.default_rng(0)
    label = np.zeros(shape, np.int16)
    label[tuple(slice(n // 2, None) for n in shape)] = 1
    affine = np.diag([1.0, 1.2, 0.9, 1.0])
    affine[:3, 3] = (0.3, -0.2, 40.0)  # origins near 0 need their sign
    change = np.eye(4)
    change[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    image = 1 + generator.random(shape, np.float32)
    return Volume({"t1": image}, affine=change @ affine, shape=shape, label=label)


@pytest.mark.parametrize("turn", [0.0, 0.3])
@pytest.mark.parametrize(("shape", "spacing"), [*product(SHAPES, SPACINGS)], ids=str)
def test_any_shape_is_prepared_and_restored(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], turn: float
) -> None:
    volume = volume_of(shape, turn)
    ready = Preprocessing(spacing)(volume, LESION)
    assert ready.target is not None
    assert min(ready.image.shape) >= 1
    assert torch.isfinite(ready.image).all()
    assert ready.brain.all(), "every voxel of the case is in the brain"
    maps = one_hot(ready.target.long(), 2).movedim(-1, 0).float()
    restored = restore_maps(maps, prepared=ready, volume=volume)
    assert restored.shape == (2, *shape)
    torch.testing.assert_close(restored.sum(0), torch.ones(shape))
    box = tuple(slice(0, n) for n in ready.target.shape)
    classes = restore_classes(20 * maps, box, prepared=ready, volume=volume)
    assert classes.shape == shape
    if spacing == (1.0, 1.0, 1.0) and turn == 0:
        assert (classes.numpy() != volume.label).mean() < 0.25


def centre(prepared: Prepared) -> np.ndarray:
    """Centre of the model's grid in mm."""
    middle = [(n - 1) / 2 for n in prepared.brain.shape]
    return np.asarray(prepared.affine.numpy() @ [*middle, 1.0])[:3]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_models_grid_covers_the_volume(shape: tuple[int, int, int]) -> None:
    """Also if the first voxel lies near 0, where MONAI's own formula loses the sign."""
    volume = volume_of(shape)
    middle = volume.affine @ [*((n - 1) / 2 for n in shape), 1.0]
    ready = Preprocessing((2.0, 2.0, 2.0))(volume)
    # Half of what rounding the number of voxels adds or takes away: half a voxel at most.
    np.testing.assert_allclose(centre(ready), middle[:3], atol=1.0)
    extent = np.array(ready.brain.shape) * 2.0
    extent = extent[
        np.abs(ready.affine.numpy()[:3, :3]).argmax(1)
    ]  # along right, anterior, superior
    np.testing.assert_allclose(extent, np.maximum(2, volume.spacing * np.array(shape)), atol=1.0)


def test_one_slice_keeps_its_values() -> None:
    volume = volume_of((6, 5, 1))
    ready = Preprocessing((1.0, 1.2, 5.0))(volume)
    plain = Preprocessing((1.0, 1.2, 0.9))(volume)
    assert ready.image.shape == (1, 6, 5, 1)
    torch.testing.assert_close(ready.image, plain.image, atol=1e-5, rtol=0)
