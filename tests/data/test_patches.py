"""Patches: where they lie, what they show, and their padding."""

from __future__ import annotations

from pathlib import Path

import niftis
import numpy as np
import pytest
import torch
from episodes import OWN_GRID, episodes
from monai.transforms.utils import generate_label_classes_crop_centers
from niftis import SHAPE
from torch import Tensor

from prism_meta.data.augmentation import Augmentation
from prism_meta.data.cache import CachedCase, prepare
from prism_meta.data.centres import PatchCentres
from prism_meta.data.labels import BRATS_LABELS
from prism_meta.data.layouts.folders import load_cases
from prism_meta.data.masking import StaticMask


@pytest.mark.parametrize("size", [(1, 1, 1), (4, 5, 1), (5, 4, 7), (6, 7, 8)], ids=str)
@pytest.mark.parametrize("foreground", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("empty", [(), (1,), (1, 2, 3)], ids=str)
def test_patches_lie_where_monai_puts_them(
    size: tuple[int, int, int], foreground: float, empty: tuple[int, ...]
) -> None:
    """The same numbers from the same random state, also at the edges and without some classes."""
    shape = (6, 7, 8)
    random = np.random.RandomState(0)
    pools = [random.choice(np.prod(shape), 0 if k in empty else 20) for k in range(4)]
    left = 3 - len(empty)
    ratios = [1 - foreground if left else 1.0] + [
        0.0 if k in empty else foreground / left for k in (1, 2, 3)
    ]
    centres = PatchCentres(pools, shape, foreground=foreground)
    ours, monais = np.random.RandomState(1), np.random.RandomState(1)
    for _ in range(40):
        ((i, j, k),) = generate_label_classes_crop_centers(
            size, 1, shape, pools, ratios, monais, warn=False
        )
        expected = tuple(c - s // 2 for c, s in zip((i, j, k), size, strict=True))
        assert centres.corner(size, ours) == expected


def test_hidden_channels_are_zero(pool: list[CachedCase]) -> None:
    data = episodes(pool)
    hidden = 0
    for t in range(6):
        for batch in data[t]:
            assert torch.all(batch.image[~batch.mask] == 0)
            assert (batch.image[batch.mask].flatten(1) != 0).any(1).all()
            assert torch.isfinite(batch.image).all()
            hidden += int((~batch.mask).sum())
    assert hidden > 0


@pytest.mark.parametrize("patch", [(8, 9, 10), (7, 5, 3), (1, 1, 1), SHAPE, (9, 11), SHAPE[:2]])
def test_shapes_of_patches(pool: list[CachedCase], patch: tuple[int, ...]) -> None:
    data = episodes(pool, patch=patch, steps=4)
    for t in range(4):
        for batch in data[t]:
            assert batch.image.shape == (4, 4, *patch)
            assert batch.image.dtype == torch.float32
            assert batch.mask.shape == (4, 4)
            assert batch.target.shape == (4, *patch)
            assert batch.target.dtype == torch.int64
            assert set(batch.target.unique().tolist()) <= {0, 1, 2, 3}


def test_2d_patches_are_axial_slices(pool: list[CachedCase]) -> None:
    """The last axis, superior, is the one that goes."""
    whole = {c.id: c.patch((0, 0, 0), c.shape, shown=c.availability) for c in pool}
    data = episodes(pool, patch=SHAPE[:2], train_mask=StaticMask(), steps=3)
    for t in range(3):
        batch = data[t][0]
        for image, target, case in zip(batch.image, batch.target, batch.case_ids, strict=True):
            volume, label = whole[case]
            assert any(
                torch.equal(image, volume[..., z]) and torch.equal(target, label[..., z])
                for z in range(SHAPE[2])
            )


def centre(target: Tensor) -> Tensor:
    index = tuple(s // 2 for s in target.shape[1:])
    return target[(slice(None), *index)]


@pytest.mark.parametrize("patch", [(4, 5, 3), (5, 4)])
def test_foreground_share(pool: list[CachedCase], patch: tuple[int, ...]) -> None:
    def drawn(foreground: float) -> Tensor:
        data = episodes(pool, patch=patch, foreground=foreground, batch_size=8, steps=15)
        return torch.cat([batch.target for t in range(15) for batch in data[t]])

    always = drawn(1.0)
    assert always.flatten(1).any(1).all()
    # Small patches fit around every centre, so the centre itself is of the foreground, and the
    # three classes are drawn equally often although their sizes differ.
    shares = torch.bincount(centre(always), minlength=4) / len(always)
    assert shares[0] == 0
    assert torch.all((shares[1:] - 1 / 3).abs() < 0.1), shares
    inside = float((niftis.draw_label() > 0).sum() / (niftis.draw_image() != 0).sum())
    for foreground in (0.0, 0.5):
        share = float((centre(drawn(foreground)) > 0).double().mean())
        assert share == pytest.approx(foreground + (1 - foreground) * inside, abs=0.12)


def test_a_big_patch_around_foreground_contains_it(pool: list[CachedCase]) -> None:
    data = episodes(pool, patch=(16, 20, 12), foreground=1.0)
    for t in range(6):
        for batch in data[t]:
            assert batch.target.flatten(1).any(1).all()


@pytest.mark.parametrize("foreground", [0.0, 0.67, 1.0])
def test_cases_without_foreground_or_contrast_can_be_drawn(
    tmp_path: Path, foreground: float
) -> None:
    """Patches lie in the brain of a case whose label is empty, even if its image is constant."""
    constant = np.where(niftis.draw_image() != 0, np.float32(7), np.float32(0))
    for k in range(2):
        folder = tmp_path / "cases" / f"p{k}"
        niftis.save(constant, folder / "t1.nii.gz")
        niftis.save(np.zeros(SHAPE, np.int16), folder / "seg.nii.gz")
    cases = load_cases(tmp_path / "cases", ("t1",))
    cached = prepare(cases, tmp_path / "cache", preprocessing=OWN_GRID, labels=BRATS_LABELS)
    train, meta = episodes(cached, foreground=foreground)[0]
    assert not train.target.any() and not meta.target.any()
    assert torch.all(train.image == 0)


SMALL = [(8, 25, 9), (21, 8, 30), (40, 40, 40), (32, 16), (21, 25)]


def inside_of(patch: tuple[int, ...]) -> tuple[slice, ...]:
    """Where a volume of ``SHAPE`` lies in a patch that is larger along some axes."""
    ends = [(max(p - s, 0) // 2, min(p, s)) for p, s in zip(patch, SHAPE, strict=False)]
    return tuple(slice(start, start + size) for start, size in ends)


@pytest.mark.parametrize("patch", SMALL, ids=str)
def test_a_volume_smaller_than_the_patch_is_padded(
    pool: list[CachedCase], patch: tuple[int, ...]
) -> None:
    inside = torch.zeros(patch, dtype=torch.bool)
    inside[inside_of(patch)] = True
    for batch in episodes(pool, patch=patch)[0]:
        assert batch.valid is not None and torch.equal(batch.valid, inside.expand(4, *patch))
        assert batch.image[..., inside].any()
        assert not batch.image[..., ~inside].any() and not batch.target[..., ~inside].any()


def test_a_padded_patch_holds_the_whole_volume(pool: list[CachedCase]) -> None:
    by_id = {case.id: case for case in pool}
    box = inside_of((40, 40, 40))
    for batch in episodes(pool, patch=(40, 40, 40))[0]:
        for image, target, name, shown in zip(
            batch.image, batch.target, batch.case_ids, batch.mask, strict=True
        ):
            whole, label = by_id[name].patch((0, 0, 0), SHAPE, shown=shown)
            assert torch.equal(image[(slice(None), *box)], whole)
            assert torch.equal(target[box], label)


@pytest.mark.parametrize("patch", SMALL, ids=str)
def test_augmentation_moves_the_padding_with_the_rest(
    pool: list[CachedCase], patch: tuple[int, ...]
) -> None:
    for batch in episodes(pool, patch=patch, augmentation=Augmentation(len(patch)))[0]:
        assert batch.valid is not None and 0 < batch.valid.float().mean() < 1
        assert batch.target.min() == 0 and not batch.target[~batch.valid].any()


def test_patches_without_padding_say_so(pool: list[CachedCase]) -> None:
    for batch in episodes(pool, patch=SHAPE)[0]:
        assert batch.valid is None
