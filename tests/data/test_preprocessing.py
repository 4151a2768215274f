"""Preprocessing: normalisation, orientation, resampling, and labels on the model's grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import niftis
import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers import faults_of
from niftis import BIG, ORIENTATIONS, OWN, SHAPE, world, written

from prism_meta.data import memory
from prism_meta.data.axes import model_codes
from prism_meta.data.cases import Volume
from prism_meta.data.labels import BRATS_LABELS, LabelSet
from prism_meta.data.preprocessing import Preprocessing
from prism_meta.errors import CaseError, ConfigError
from prism_meta.modalities import BRATS


def test_z_score_inside_the_brain_and_zero_outside(tmp_path: Path) -> None:
    volume = written(tmp_path)
    ready = Preprocessing(OWN)(volume, BRATS_LABELS)
    assert ready.names == BRATS
    assert ready.image.dtype == torch.float32
    inside = torch.from_numpy(volume.images["t1"] != 0)
    assert torch.equal(ready.brain, inside)
    for name, image in zip(ready.names, ready.image, strict=True):
        assert float(image[inside].mean()) == pytest.approx(0, abs=1e-4), name
        assert float(image[inside].std(correction=0)) == pytest.approx(1, abs=1e-4), name
        assert torch.all(image[~inside] == 0), name


def test_each_modality_has_its_own_background(tmp_path: Path) -> None:
    images = {"t1": niftis.draw_image(), "t2": niftis.draw_image(index=1)}
    images["t2"][: SHAPE[0] // 2] = 0
    ready = Preprocessing(OWN)(Volume(images, affine=np.eye(4), shape=SHAPE))
    assert torch.all(ready.image[1, : SHAPE[0] // 2] == 0)
    assert float(ready.image[1][images["t2"] != 0].mean()) == pytest.approx(0, abs=1e-4)
    assert torch.equal(ready.brain, torch.from_numpy(images["t1"] != 0)), "any modality counts"
    assert ready.target is None


def test_outliers_are_clipped() -> None:
    image = niftis.draw_image()
    plain = Preprocessing(OWN)(Volume({"t1": image.copy()}, affine=np.eye(4), shape=SHAPE)).image
    image[10, 12, 8] = 1e6
    spiked = Preprocessing(OWN)(Volume({"t1": image}, affine=np.eye(4), shape=SHAPE)).image
    assert float(spiked.max()) < 4
    rest = torch.ones(1, *SHAPE, dtype=torch.bool)
    rest[0, 10, 12, 8] = False
    torch.testing.assert_close(spiked[rest], plain[rest], atol=0.02, rtol=0)
    wide = Preprocessing(OWN, percentiles=(0, 100))
    assert float(wide(Volume({"t1": image}, affine=np.eye(4), shape=SHAPE)).image.max()) > 50


@pytest.mark.parametrize("value", [0.0, 0.1, 7.0, 1000.1, -3.3])
def test_a_constant_image_becomes_zero_and_not_nan(value: float) -> None:
    images = {
        "t1": np.where(niftis.draw_image() != 0, np.float32(value), np.float32(0)),
        "t2": niftis.draw_image(index=1),
    }
    ready = Preprocessing(OWN)(Volume(images, affine=np.eye(4), shape=SHAPE))
    assert torch.all(ready.image[0] == 0)
    assert torch.isfinite(ready.image).all()
    alone = Preprocessing(OWN)(Volume({"t1": images["t1"]}, affine=np.eye(4), shape=SHAPE))
    assert torch.equal(alone.brain, torch.from_numpy(images["t1"] != 0))


@pytest.mark.parametrize("model", [(1.0, 1.0, 1.0), (1.0, 1.5, 2.0), (2.0, 2.0, 2.0)])
@pytest.mark.parametrize("codes", ORIENTATIONS[1:])
def test_the_same_anatomy_in_two_orientations(
    tmp_path: Path, codes: str, model: tuple[float, float, float]
) -> None:
    preprocessing = Preprocessing(spacing=model)
    spacing = (1.0, 1.5, 2.0)
    plain = preprocessing(written(tmp_path / "a", spacing=spacing), BRATS_LABELS)
    turned = preprocessing(written(tmp_path / "b", spacing=spacing, codes=codes), BRATS_LABELS)
    torch.testing.assert_close(turned.image, plain.image, atol=1e-3, rtol=0)
    torch.testing.assert_close(turned.affine, plain.affine, atol=1e-5, rtol=0)
    assert plain.target is not None and turned.target is not None
    assert torch.equal(turned.target, plain.target)
    assert torch.equal(turned.brain, plain.brain)


@pytest.mark.parametrize(
    ("spacing", "codes", "model", "shape"),
    [
        ((1.0, 1.0, 1.0), "RAS", (1.0, 1.0, 1.0), (40, 48, 32)),
        ((1.0, 1.0, 2.0), "RAS", (1.0, 1.0, 1.0), (40, 48, 64)),
        ((1.0, 1.0, 2.0), "SPL", (1.0, 1.0, 1.0), (40, 48, 64)),
        ((1.0, 0.5, 1.0), "LPS", (1.0, 1.0, 2.0), (40, 24, 16)),
        # The third axis of the files is that of the slices: right, after anterior and superior.
        ((1.0, 1.0, 1.0), "PIR", (2.0, 2.0, 2.0), (24, 16, 20)),
    ],
)
def test_resampled_shape_and_place(
    tmp_path: Path,
    spacing: tuple[float, ...],
    codes: str,
    model: tuple[float, float, float],
    shape: tuple[int, ...],
) -> None:
    volume = written(tmp_path, spacing=spacing, codes=codes, shape=BIG)
    ready = Preprocessing(spacing=model)(volume, BRATS_LABELS)
    assert ready.target is not None and volume.label is not None
    assert ready.image.shape == (4, *shape)
    assert ready.target.shape == ready.brain.shape == shape
    order = ["RAS".index(code) for code in model_codes(volume.shape, volume.affine)]
    directions = torch.zeros(3, 3).double()
    directions[order, range(3)] = torch.tensor(model).double()
    torch.testing.assert_close(ready.affine[:3, :3], directions)
    # The anatomy has not moved: the label and the brain lie where they lay, in mm. The nearest
    # voxel is up to half a voxel off, for all of them alike where the grids fit each other.
    label, brain = torch.from_numpy(volume.label > 0), torch.from_numpy(volume.images["t1"] != 0)
    place, near = world(ready.target > 0, ready.affine), 0.5 * max(spacing) + 0.15
    torch.testing.assert_close(place, world(label, volume.affine), atol=near, rtol=0)
    place = world(ready.brain, ready.affine)
    torch.testing.assert_close(place, world(brain, volume.affine), atol=near, rtol=0)


@pytest.mark.parametrize("model", [(0.7, 0.7, 0.7), (1.3, 1.3, 1.3), (2.0, 1.0, 3.0)])
def test_labels_stay_labels(tmp_path: Path, model: tuple[float, float, float]) -> None:
    """Linear interpolation between background and class 3 would invent classes 1 and 2."""
    volume = written(tmp_path, values=(4,))
    ready = Preprocessing(spacing=model)(volume, BRATS_LABELS)
    assert ready.target is not None
    assert ready.target.dtype == torch.uint8
    assert ready.target.unique().tolist() == [0, 3]


def test_label_is_left_out_unless_the_label_set_is_given(tmp_path: Path) -> None:
    volume = written(tmp_path)
    assert Preprocessing(OWN)(volume).target is None
    with pytest.raises(
        CaseError,
        match=r"^case p0: p0_seg.nii.gz: label values 4 are not in the label set \{0: background",
    ):
        Preprocessing(OWN)(volume, LabelSet({"a": 1, "b": 2}))


# Statistics


def z_scores(image: npt.NDArray[Any]) -> torch.Tensor:
    return Preprocessing(OWN)(Volume({"t1": image}, affine=np.eye(4), shape=SHAPE)).image


@pytest.mark.parametrize("scale", [1e15, 1e30, 3e35, 1e-15, 1e-25, 1e-33])
def test_z_scores_do_not_depend_on_the_unit(scale: float) -> None:
    image = niftis.draw_image()
    scaled = (image.astype(np.float64) * scale).astype(np.float32)
    torch.testing.assert_close(z_scores(scaled), z_scores(image), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [1e40, 1e200, 1e305, 1e-60, 1e-200, 1e-300])
def test_z_scores_of_values_beyond_float32(scale: float) -> None:
    image = niftis.draw_image().astype(np.float64)
    torch.testing.assert_close(z_scores(image * scale), z_scores(image), atol=1e-5, rtol=0)


def test_z_scores_do_not_depend_on_a_constant() -> None:
    image = niftis.draw_image().astype(np.float64)
    moved = np.where(image != 0, image + 2.0**40, 0)
    torch.testing.assert_close(z_scores(moved), z_scores(image), atol=2e-4, rtol=0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_results_that_are_not_finite_are_faults(value: float) -> None:
    image = niftis.draw_image()
    image[10, 12, 8] = value
    volume = Volume({"t1": image}, affine=np.eye(4), shape=SHAPE, name="case p0")
    assert faults_of(lambda: Preprocessing(OWN)(volume)) == (
        "case p0: t1 has voxels that are NaN or infinite; repair the file or remove it (a missing "
        "modality is allowed)",
    )


# Bounds


def test_the_models_grid_must_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_size", lambda: 64e9)
    image = niftis.draw_image()
    affine = niftis.affine_of((99, 99, 99))
    volume = Volume({"t1": image}, affine=affine, shape=SHAPE, name="case p0")
    (fault,) = faults_of(lambda: Preprocessing((0.1, 0.1, 0.1))(volume))
    assert fault == (
        "case p0: measures 1980 x 2376 x 1584 mm and, at a spacing of (0.1, 0.1, 0.1) mm, needs about "
        "3.58e+05 GB of memory, but there are 64 GB; correct the voxel sizes in its headers, or use a "
        "coarser spacing"
    )
    assert fault.arguments == ("spacing",)


@pytest.mark.parametrize("spacing", [(1e-6, 1, 1), (1, 0, 1), (1, 1, 1e9), (np.nan, 1, 1), (1, 1)])
def test_spacings_that_no_grid_has(spacing: tuple[float, float, float]) -> None:
    (fault,) = faults_of(lambda: Preprocessing(spacing), ConfigError)
    assert fault.startswith(
        f"spacing: got {spacing}, expected three voxel sizes of 0.01 to 100 mm; "
    )
    assert fault.arguments == ("spacing",)


@pytest.mark.parametrize("percentiles", [(-1, 99), (99, 1), (5, 5), (0, 101), (np.nan, 99)])
def test_percentiles_in_no_order(percentiles: tuple[float, float]) -> None:
    (fault,) = faults_of(lambda: Preprocessing(percentiles=percentiles), ConfigError)
    assert fault.startswith(f"percentiles: got {percentiles}, expected 0 <= low < high <= 100; ")
