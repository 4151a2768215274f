"""Slices go along the axis in which a case was acquired, and everything stays where it is in mm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import dice
from niftis import SHAPE, affine_of, draw_image, draw_label, world
from stacks import CODES, RADIUS, STACKS, Stack, reoriented
from torch import Tensor, nn

from prism_meta.data import preprocessing
from prism_meta.data.axes import model_codes, slice_axis
from prism_meta.data.cache import prepare
from prism_meta.data.cases import Volume
from prism_meta.data.episodes import Episodes
from prism_meta.data.labels import BRATS_LABELS, LabelSet
from prism_meta.data.layouts.folders import load_cases
from prism_meta.data.preprocessing import TRACE, Preprocessing
from prism_meta.evaluation.predictor import Predictor
from prism_meta.evaluation.saving import save_labels
from prism_meta.networks.wrapped import wrap
from prism_meta.report.overlays import OverlayCollector

LESION = LabelSet({"lesion": 1})
NAMES = tuple(STACKS)


# The slice axis


@pytest.mark.parametrize("name", STACKS)
def test_the_slice_axis_is_that_of_the_acquisition(name: str) -> None:
    stack = STACKS[name]
    assert slice_axis(stack.shape, stack.affine) == stack.axis


@pytest.mark.parametrize(
    ("shape", "spacing", "axis"),
    [
        ((20, 20, 20), (1.0, 1.0, 1.0), 2),
        ((20, 20, 20), (1.09, 1.0, 1.0), 2),  # alike within 10 percent
        ((20, 20, 20), (1.2, 1.0, 1.0), 0),
        ((20, 20, 20), (1.0, 3.0, 3.0), 2),
        ((20, 20, 20), (3.0, 3.0, 1.0), 1),
        ((20, 20, 1), (1.5, 1.5, 1.0), 2),  # the thickness of one slice is often a guess
        ((1, 20, 20), (1.0, 1.0, 1.0), 0),
        ((20, 1, 20), (1.0, 0.5, 4.0), 1),
        ((1, 1, 1), (1.0, 1.0, 1.0), 2),
    ],
)
def test_slice_axis_by_hand(shape: Any, spacing: Any, axis: int) -> None:
    assert slice_axis(shape, affine_of(spacing)) == axis


@pytest.mark.parametrize("codes", CODES)
def test_the_axis_does_not_depend_on_the_order_of_the_files_axes(codes: str) -> None:
    """Thick slices; the model's grid is the same for all 48 orders and directions."""
    stack = reoriented(STACKS["axial"], codes)
    assert model_codes(stack.shape, stack.affine) == "RAS"
    sagittal = reoriented(STACKS["sagittal, slices first"], codes)
    assert model_codes(sagittal.shape, sagittal.affine) == "ASR"
    coronal = reoriented(STACKS["coronal"], codes)
    assert model_codes(coronal.shape, coronal.affine) == "RSA"


# Prepared cases


def volume_of(stack: Stack) -> Volume:
    return Volume(
        {"t1": stack.image(RADIUS)},
        affine=stack.affine,
        shape=stack.shape,
        label=stack.label(RADIUS),
    )


@pytest.mark.parametrize("name", STACKS)
def test_slices_are_kept_as_they_lie(name: str) -> None:
    """At its own spacing, no voxel changes: slice k of the model's grid is slice k of the files."""
    stack = STACKS[name]
    volume = volume_of(stack)
    ready = Preprocessing(stack.spacing)(volume, LESION)
    assert ready.target is not None and volume.label is not None
    assert ready.target.shape[-1] == stack.slices
    sizes = nib.affines.voxel_sizes(ready.affine.numpy())
    np.testing.assert_allclose(sizes, stack.spacing, rtol=1e-6)
    counts = ready.target.sum((0, 1)).tolist()
    others = tuple(axis for axis in range(3) if axis != stack.axis)
    expected = volume.label.sum(others).tolist()
    assert counts in (expected, expected[::-1])
    label = torch.from_numpy(volume.label)
    place = world(ready.target > 0, ready.affine)
    torch.testing.assert_close(place, world(label > 0, stack.affine), atol=1e-4, rtol=0)


@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), (1.0, 1.0, 1.0), (1.5, 3.0, 2.0)], ids=str)
def test_isotropic_axial_volumes_are_prepared_bit_by_bit_as_ever(
    spacing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By MONAI's own steps: orientation RAS, then one resampling. Only traces of rounding become 0."""
    from monai.data.meta_tensor import MetaTensor
    from monai.transforms.spatial.array import Orientation, SpatialResample

    image, label, affine = draw_image(), draw_label(), affine_of((1.0, 1.0, 1.0))
    volume = Volume({"t1": image}, affine=affine, shape=SHAPE, label=label)
    ready = Preprocessing(spacing)(volume, BRATS_LABELS)
    monkeypatch.setattr(preprocessing, "TRACE", 0.0)
    own = Preprocessing((1.0, 1.0, 1.0))(volume)  # only the z-score
    shape = tuple(round(n / s) for n, s in zip(SHAPE, spacing, strict=True))
    target = np.diag([*spacing, 1.0])
    first = [0.5 * (n / m - 1) for n, m in zip(SHAPE, shape, strict=True)]
    target[:3, 3] = (affine @ [*first, 1.0])[:3]
    oriented = Orientation(axcodes="RAS", labels=None)(MetaTensor(own.image, affine=own.affine))
    resample = SpatialResample(mode="bilinear", padding_mode="border", dtype=torch.float32)
    expected = resample(
        oriented, dst_affine=torch.from_numpy(target), spatial_size=shape
    ).as_tensor()
    expected[expected.abs() < TRACE] = 0.0
    assert torch.equal(ready.image, expected)
    assert torch.equal(ready.affine, torch.from_numpy(target))


# Training


@pytest.mark.parametrize("name", [n for n in NAMES if n != "one sagittal slice"])
def test_patches_are_slices_of_the_acquisition(tmp_path: Path, name: str) -> None:
    """A patch of a whole slice is a slice of the files, up to the order and direction of its axes."""
    stack = STACKS[name]
    for k in range(2):
        stack.write(tmp_path / "cases" / f"p{k}", radius=RADIUS)
    cases = load_cases(tmp_path / "cases", ("t1",))
    cached = prepare(
        cases, tmp_path / "cache", preprocessing=Preprocessing(stack.spacing), labels=LESION
    )
    patch = cached[0].shape[:2]
    areas = {int(plane.sum()) for plane in np.moveaxis(stack.label(RADIUS), stack.axis, 0)}
    data = Episodes(cached, patch=patch, batch_size=8, steps=2)
    for batch in (*data[0], *data[1]):
        assert batch.valid is None and batch.image.shape == (8, 1, *patch)
        assert set(batch.target.sum((1, 2)).tolist()) <= areas
    whole = Episodes(cached, patch=(64, 64, 40), batch_size=2, steps=1)
    for batch in whole[0]:
        assert batch.valid is not None
        assert batch.valid[0].sum() == np.prod(stack.shape)
        assert batch.target[0].sum() == stack.label(RADIUS).sum()


# Prediction


class Threshold(nn.Module):
    """Finds what is brighter than the body, and remembers the sizes that it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[tuple[int, ...]] = []

    def forward(self, image: Tensor) -> Tensor:
        self.shown.append(tuple(image.shape))
        bright = 20 * (image[:, :1] - 2.0)
        return torch.cat([-bright, bright], 1)


def predictor(model: nn.Module, spacing: Any, patch: tuple[int, ...]) -> Predictor:
    return Predictor(
        wrap(model, ("t1",)), preprocessing=Preprocessing(spacing), labels=LESION, patch=patch
    )


def check(
    tmp_path: Path, stack: Stack, spacing: Any, patch: tuple[int, ...], radius: float
) -> None:
    """The lesion is predicted where it is in mm, and its file lies on the files of the case."""
    stack.write(tmp_path / "p0", radius=radius)
    (case,) = load_cases(tmp_path, ("t1",))
    model = Threshold()
    predicted = predictor(model, spacing, patch).predict(case)
    save_labels(tmp_path / "out.nii.gz", predicted, case)
    written, source = nib.load(tmp_path / "out.nii.gz"), nib.load(case.files["t1"])
    assert written.shape == source.shape == stack.shape
    np.testing.assert_array_equal(written.affine, source.affine)
    voxels = torch.from_numpy(np.asarray(written.dataobj).astype(np.int64))
    truth = torch.from_numpy(stack.label(radius).astype(np.int64))
    largest = max(*nib.affines.voxel_sizes(stack.affine), *spacing)
    place, known = world(voxels > 0, written.affine), world(truth > 0, stack.affine)
    assert float((place - known).norm()) < 0.3 * largest
    assert dice(voxels > 0, truth > 0) > 0.85
    if spacing == stack.spacing:
        assert torch.equal(voxels, truth)
        if len(patch) == 2:
            assert sum(shape[0] for shape in model.shown) >= stack.slices
            assert all(len(shape) == 4 for shape in model.shown)


@pytest.mark.parametrize("patch", [(96, 96), (64, 64, 64), (16, 16), (16, 16, 4)], ids=str)
@pytest.mark.parametrize("own", [True, False], ids=["own spacing", "2 mm"])
@pytest.mark.parametrize("name", STACKS)
def test_a_lesion_is_predicted_where_it_is(
    tmp_path: Path, name: str, own: bool, patch: tuple[int, ...]
) -> None:
    stack = STACKS[name]
    check(tmp_path, stack, stack.spacing if own else (2.0, 2.0, 2.0), patch, RADIUS)


@pytest.mark.parametrize("codes", CODES)
def test_a_lesion_is_predicted_where_it_is_in_every_orientation(tmp_path: Path, codes: str) -> None:
    for k, name in enumerate(("axial", "short-axis", "isotropic")):
        stack = reoriented(STACKS[name], codes) if name != "short-axis" else STACKS[name]
        if name == "short-axis":
            moved, affine = _permuted(stack, codes)
            stack = Stack(moved, affine, int(np.argmax(nib.affines.voxel_sizes(affine))))
        for dims, patch in enumerate([(32, 32), (32, 32, 8)]):
            spacing = (1.5, 1.5, 5.0)
            check(tmp_path / f"{k}{dims}", stack, spacing, patch, RADIUS)


def _permuted(stack: Stack, codes: str) -> tuple[tuple[int, int, int], Any]:
    """Reorder and flip the array axes as ``codes`` reorders those of an RAS volume."""
    order = ["RLAPSI".index(code) // 2 for code in codes]
    affine = stack.affine[:, [*order, 3]].copy()
    shape = [stack.shape[axis] for axis in order]
    for axis, code in enumerate(codes):
        if code in "LPI":
            affine[:3, 3] += affine[:3, axis] * (shape[axis] - 1)
            affine[:3, axis] *= -1
    d, h, w = shape
    return (d, h, w), affine


# Overlays


@pytest.mark.parametrize("name", STACKS)
def test_overlays_show_slices_of_the_acquisition(tmp_path: Path, name: str) -> None:
    stack = STACKS[name]
    stack.write(tmp_path / "p0", radius=RADIUS)
    (case,) = load_cases(tmp_path, ("t1",))
    collector = OverlayCollector()
    volume = case.read()
    truth = torch.from_numpy(stack.label(RADIUS).astype(np.int64))
    collector(case, volume, "t1", truth, truth)
    (overlay,) = collector.overlays(["t1"])
    plane = [n for axis, n in enumerate(stack.shape) if axis != stack.axis]
    assert sorted(overlay.background.shape) == sorted(plane)
    areas = np.moveaxis(stack.label(RADIUS), stack.axis, 0).sum((1, 2))
    assert overlay.truth.sum() == areas.max()


@pytest.mark.parametrize("name", ["axial", "sagittal, slices first", "coronal"])
@pytest.mark.parametrize("codes", CODES)
def test_overlays_do_not_depend_on_the_order_of_the_axes(name: str, codes: str) -> None:
    """The head is up, or else the nose; the patient's right is on the left, or else the nose."""
    shown = []
    for stack in (reoriented(STACKS[name], "LPS"), reoriented(STACKS[name], codes)):
        index = np.stack(np.meshgrid(*map(np.arange, stack.shape), indexing="ij"), -1)
        places = nib.affines.apply_affine(stack.affine, index)
        images = {axis: places[..., k].astype(np.float32) for k, axis in enumerate("xyz")}
        distance = np.linalg.norm(places - STACKS[name].centre, axis=-1)
        truth = torch.from_numpy((distance <= RADIUS).astype(np.int64))
        planes = {}
        for axis, image in images.items():
            collector = OverlayCollector()
            volume = Volume({"t1": image}, affine=stack.affine, shape=stack.shape)
            collector(_Named(), volume, "t1", truth, truth)
            planes[axis] = collector.overlays([])[0].background
        shown.append(planes)
    for axis in "xyz":
        np.testing.assert_allclose(shown[1][axis], shown[0][axis], atol=1e-3)
    up, left = {"axial": "yx", "coronal": "zx"}.get(name, "zy")
    assert (np.diff(shown[1][up], axis=0) < 0).all()
    assert (np.diff(shown[1][left], axis=1) < 0).all()


class _Named:
    id = "p0"
