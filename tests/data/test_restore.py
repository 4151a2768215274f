"""Restoring: maps and classes from the model's grid back to the case's own grid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import niftis
import numpy as np
import pytest
import torch
from helpers import dice
from niftis import BIG, ORIENTATIONS, OWN, SHAPE, world, written
from torch import Tensor
from torch.nn.functional import one_hot

from prism_meta.data import restore as restoring
from prism_meta.data.cases import Volume
from prism_meta.data.labels import BRATS_LABELS
from prism_meta.data.layouts.folders import load_cases
from prism_meta.data.preprocessing import Prepared, Preprocessing
from prism_meta.data.restore import restore_classes, restore_maps


def round_trip(preprocessing: Preprocessing, volume: Volume) -> tuple[Tensor, Tensor, Prepared]:
    """The label to the model's grid and back, and the label as it was."""
    ready = preprocessing(volume, BRATS_LABELS)
    assert ready.target is not None and volume.label is not None
    maps = one_hot(ready.target.long(), 4).movedim(-1, 0).float()
    restored = restore_maps(maps, prepared=ready, volume=volume)
    assert restored.shape == (4, *volume.shape)
    assert type(restored) is Tensor, "MONAI's metadata has done its work"
    return restored.argmax(0), BRATS_LABELS.encode(volume.label), ready


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.9, 1.0, 2.5)])
@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_restore_inverts_reorientation(
    tmp_path: Path, codes: str, spacing: tuple[float, float, float]
) -> None:
    volume = written(tmp_path, codes=codes, spacing=spacing)
    restored, label, _ = round_trip(Preprocessing(spacing=spacing), volume)
    assert torch.equal(restored, label.long())


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_restore_after_downsampling(tmp_path: Path, codes: str) -> None:
    volume = written(tmp_path, codes=codes, shape=BIG)
    restored, label, ready = round_trip(Preprocessing(spacing=(2.0, 2.0, 2.0)), volume)
    assert sorted(ready.image.shape[1:]) == [16, 20, 24]
    assert dice(restored > 0, label > 0) > 0.9
    middle = world(restored > 0, volume.affine)
    torch.testing.assert_close(middle, world(label > 0, volume.affine), atol=0.65, rtol=0)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_restore_after_upsampling(tmp_path: Path, codes: str) -> None:
    volume = written(tmp_path, codes=codes, spacing=(1.0, 1.5, 2.0))
    restored, label, _ = round_trip(Preprocessing(OWN), volume)
    assert dice(restored > 0, label > 0) > 0.97


def test_restore_keeps_a_constant_map_constant_up_to_the_edges(tmp_path: Path) -> None:
    volume = written(tmp_path, codes="LPS")
    preprocessing = Preprocessing(spacing=(2.0, 1.5, 3.0))
    ready = preprocessing(volume)
    restored = restore_maps(torch.full((1, *ready.brain.shape), 7.0), prepared=ready, volume=volume)
    torch.testing.assert_close(restored, torch.full((1, *SHAPE), 7.0))


def test_oblique_grid(tmp_path: Path) -> None:
    volume = written(tmp_path)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    tilted = replace(volume, affine=turn @ volume.affine)
    restored, label, ready = round_trip(Preprocessing(OWN), tilted)
    assert torch.equal(restored, label.long())
    assert ready.target is not None
    middle = world(ready.target > 0, ready.affine)
    torch.testing.assert_close(middle, world(label > 0, tilted.affine), atol=0.25, rtol=0)


# From logits to classes on the case's own grid: only what must be is interpolated


def by_interpolation(logits: Tensor, box: Any, ready: Prepared, volume: Volume) -> Tensor:
    """What ``restore_classes`` promises, voxel by voxel: all of the maps are resampled."""
    maps = torch.zeros(len(logits), *ready.brain.shape)
    maps[0] = 1.0
    maps[(slice(None), *box)] = logits.softmax(0)
    return restore_maps(maps, prepared=ready, volume=volume)


def assert_same_classes(preprocessing: Preprocessing, volume: Volume, box: Any, seed: int) -> float:
    """Compare the two ways on random logits; return the share of the case that is foreground."""
    ready = preprocessing(volume)
    generator = torch.Generator().manual_seed(seed)
    shape = ready.brain[box].shape
    # Large regions of one class and, in between, voxels that are all undecided.
    logits = 4 * torch.randn(4, *shape, generator=generator)
    logits[2, : shape[0] // 2] += 20
    maps = by_interpolation(logits, box, ready, volume)
    classes = restore_classes(logits, box, prepared=ready, volume=volume)
    assert classes.dtype == torch.uint8 and classes.shape == volume.shape
    first, second = maps.topk(2, 0).values
    decided = first - second > 1e-4  # the coordinates of the slow way are rounded to float32
    assert decided.float().mean() > 0.99
    assert torch.equal(classes[decided], maps.argmax(0).to(torch.uint8)[decided])
    return float((classes > 0).float().mean())


BOXES = {
    "whole": (slice(None), slice(None), slice(None)),
    "inside": (slice(2, 7), slice(3, 8), slice(1, 6)),
    "at the borders": (slice(0, 6), slice(4, None), slice(5, None)),
    "one voxel": (slice(4, 5), slice(5, 6), slice(3, 4)),
}


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize(
    "spacing", [(1.0, 1.5, 2.0), (2.0, 2.0, 2.0), (0.7, 1.5, 2.6)], ids=["own", "2 mm", "odd"]
)
@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_restored_classes_are_those_of_the_resampled_maps(
    tmp_path: Path, codes: str, spacing: tuple[float, float, float], box: str
) -> None:
    volume = written(tmp_path, codes=codes, spacing=(1.0, 1.5, 2.0))
    shape = Preprocessing(spacing)(volume).brain.shape
    chosen = tuple(slice(*b.indices(n)) for b, n in zip(BOXES[box], shape, strict=True))
    foreground = assert_same_classes(Preprocessing(spacing), volume, chosen, seed=len(box))
    # A voxel may be too small for any of the case's to have more of it than of the background.
    assert foreground > 0 or box == "one voxel"


@pytest.mark.parametrize(("angle", "fast"), [(0.0, True), (1e-5, True), (0.02, False)])
def test_restored_classes_on_an_oblique_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, angle: float, fast: bool
) -> None:
    """Turned by less than a thousandth of a voxel at its edge, a grid counts as aligned."""
    volume = written(tmp_path, codes="LPS")
    ready = Preprocessing((2.0, 2.0, 2.0))(volume)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    tilted = replace(volume, label=None, affine=turn @ volume.affine)
    box = tuple(slice(2, n - 1) for n in ready.brain.shape)
    logits = 4 * torch.randn(4, *ready.brain[box].shape)
    maps = by_interpolation(logits, box, ready, tilted)
    calls: list[Any] = []
    monkeypatch.setattr(
        restoring,
        "restore_maps",
        lambda *args, **options: calls.append(args) or restore_maps(*args, **options),
    )
    classes = restore_classes(logits, box, prepared=ready, volume=tilted)
    assert len(calls) == (0 if fast else 1)
    first, second = maps.topk(2, 0).values
    decided = first - second > 1e-3
    assert torch.equal(classes[decided], maps.argmax(0).to(torch.uint8)[decided])


@pytest.mark.parametrize("share", [0.6, 0.45], ids=["foreground", "background, but not surely"])
def test_restored_classes_by_hand(share: float) -> None:
    """2 mm to 1 mm along one axis: voxels lie 1/4 and 3/4 of the way, and the likeliest wins."""
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    volume = Volume({}, affine=affine, shape=(6, 1, 1))
    coarse = torch.eye(4, dtype=torch.float64)
    coarse[0, 0], coarse[0, 3] = 2.0, 0.5
    ready = Prepared(
        torch.zeros(1, 3, 1, 1), names=("t1",), brain=torch.ones(3, 1, 1).bool(), affine=coarse
    )
    # Voxels of 2 mm: background outside the box, then p of class 1, share and 0.9.
    logits = torch.tensor([[1 - share, 0.1], [share, 0.9]]).log()[:, :, None, None]
    box = (slice(1, 3), slice(0, 1), slice(0, 1))
    classes = restore_classes(logits, box, prepared=ready, volume=volume)
    # p of class 1 at the six voxels: 0, 0.15, 0.45, 0.675, 0.825, 0.9; or 0, 0.1125, 0.3375, 0.5625,
    # 0.7875, 0.9.
    assert classes.flatten().tolist() == [0, 0, 0, 1, 1, 1]


def test_restored_classes_of_a_real_case() -> None:
    case = load_cases(niftis.real_data() / "brats-tcga")[0]
    assert case.label is not None
    whole, slab = case.read(), slice(40, 75)  # through the tumour: all of it would take 10 s
    assert whole.label is not None
    images = {name: image[..., slab].copy() for name, image in whole.images.items()}
    volume = replace(whole, images=images, label=whole.label[..., slab], shape=(240, 240, 35))
    preprocessing = Preprocessing((2.0, 2.0, 2.0))
    ready = preprocessing(volume, BRATS_LABELS)
    assert ready.target is not None
    box = tuple(slice(int(i.min()), int(i.max()) + 1) for i in ready.brain.nonzero().T)
    logits = one_hot(ready.target[box].long(), 4).movedim(-1, 0) * 4.0
    logits += torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    expected = by_interpolation(logits, box, ready, volume).argmax(0).to(torch.uint8)
    classes = restore_classes(logits, box, prepared=ready, volume=volume)
    assert (expected > 0).sum() > 10_000
    assert int((classes != expected).sum()) <= 2, "only where two classes tie up to rounding"
