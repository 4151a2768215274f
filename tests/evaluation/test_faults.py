"""Faults of cases in prediction and evaluation: all together, with the name of the case."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import faults_of
from niftis import SHAPE, save, write_case, write_cases
from torch import Tensor, nn

from prism_meta.data.cases import Case
from prism_meta.data.labels import LabelSet
from prism_meta.data.layouts.folders import load_cases
from prism_meta.data.preprocessing import Preprocessing
from prism_meta.evaluation.predictor import Predictor
from prism_meta.evaluation.saving import region_volumes, save_labels
from prism_meta.evaluation.windows import Windows
from prism_meta.networks.prism import PrismNet
from prism_meta.records import Record


def predictor(model: nn.Module | None = None) -> Predictor:
    torch.manual_seed(0)
    net = model or PrismNet(4, 4, spatial_dims=2, width=2, depth=2)
    return Predictor(net, preprocessing=Preprocessing((1.0, 1.0, 1.0)), patch=(16, 16))


def nan_voxel(path: Path) -> None:
    image = nib.load(path)
    voxels = np.array(image.dataobj, np.float32)
    voxels[3, 4, 5] = np.nan
    save(voxels, path, image.affine)


class NoNet(nn.Module):
    """Must not be asked."""

    spatial_dims = 2

    def forward(self, *_: Any) -> Any:
        raise AssertionError("predicted")

    segment = segment_subsets = forward


def test_evaluate_names_the_faults_of_all_headers_before_it_predicts(tmp_path: Path) -> None:
    cases = load_cases(write_cases(tmp_path, 3))
    cases[0].files["t1"].write_bytes(b"not an image")
    cases[1] = Case(cases[1].id, cases[1].modalities, files=cases[1].files)
    first, second = faults_of(lambda: predictor(NoNet()).evaluate(cases))
    assert first.startswith("case p0: p0_t1.nii.gz cannot be read")
    assert second == (
        "case p1: no label file; training and evaluation need one, add it or remove the case"
    )


def test_evaluate_names_the_faults_of_all_voxels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = load_cases(write_cases(tmp_path, 4, values=(2, 1, 4)))
    nan_voxel(cases[1].files["t1"])
    write_case(tmp_path / "p3", values=(2, 3, 4))
    predicted: list[str] = []
    first, second = faults_of(
        lambda: predictor().evaluate(
            cases, ["t1"], on_prediction=lambda case, *_: predicted.append(case.id)
        )
    )
    assert first.startswith("case p1: p1_t1.nii.gz has 1 voxels that are NaN or infinite; ")
    assert second.startswith("case p3: p3_seg.nii.gz: label values 3 are not in the label set")
    assert predicted == ["p0"], "after the first fault the records are lost"


def test_evaluate_is_evaluate_case_for_every_case(tmp_path: Path) -> None:
    cases = load_cases(write_cases(tmp_path, 3))
    one_by_one = [predictor().evaluate_case(case, ["t2", "flair+t1"]) for case in cases]
    assert [(r.subset, r.region) for r in one_by_one[0]] == [
        (s, r) for s in ("t2", "flair+t1") for r in ("WT", "TC", "ET")
    ]
    together: list[Record] = predictor().evaluate(cases, ["t2", "flair+t1"])
    assert [(r.subset, r.case) for r in together[::3]] == [
        (s, c) for s in ("t2", "flair+t1") for c in ("p0", "p1", "p2")
    ]
    assert sorted(together, key=lambda r: r.case) == [r for records in one_by_one for r in records]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_output_that_is_not_finite_is_no_background(tmp_path: Path, value: float) -> None:
    (case,) = load_cases(write_cases(tmp_path, 1))
    used = predictor()
    with torch.no_grad():
        used.model.decoder.head.bias[2] = value
    message = (
        "case p0: the model's output is not finite; check the intensities of the case, or train the "
        "model again"
    )
    assert faults_of(lambda: used.predict(case)) == (message,)
    assert faults_of(lambda: used.evaluate([case])) == (message,)


def test_large_output_is_finite(tmp_path: Path) -> None:
    """Its sum is not."""
    (case,) = load_cases(write_cases(tmp_path, 1))
    used = predictor()
    with torch.no_grad():
        used.model.decoder.head.bias[2] = 5e37
    assert np.unique(used.predict(case)).tolist() == [0, 2]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"
        ),
    ],
    ids=["numpy", "cuda", "cpu"],
)
def test_too_little_memory_names_the_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: Any) -> Tensor:
        raise error

    (case,) = load_cases(write_cases(tmp_path, 1))
    monkeypatch.setattr(Windows, "logits", full)
    for use in (predictor().predict, predictor().evaluate_case):
        (fault,) = faults_of(lambda use=use: use(case))  # type: ignore[misc]
        assert fault.startswith("case p0: needs more memory than is free; ")
    monkeypatch.setattr(Windows, "logits", NoNet().forward)
    with pytest.raises(AssertionError, match="predicted"):
        predictor().predict(case)


def test_other_errors_of_the_model_are_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: Any) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    (case,) = load_cases(write_cases(tmp_path, 1))
    monkeypatch.setattr(Windows, "logits", wrong)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        predictor().predict(case)


# Thin and small volumes

THIN = [
    (1, 24, 20), (20, 1, 24), (20, 24, 1), (1, 1, 24), (24, 1, 1), (1, 24, 1), (1, 1, 1), (2, 3, 2),
    (5, 40, 3),
]  # fmt: skip
NETS: list[Any] = [
    pytest.param(2, (16, 16), id="slices"),
    pytest.param(3, (16, 16, 8), id="volumes"),
]


@pytest.mark.parametrize(("dims", "patch"), NETS)
@pytest.mark.parametrize("shape", THIN, ids=str)
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.5, 2.5, 4.0)], ids=["own", "coarser"])
def test_thin_volumes_are_predicted_and_measured(
    tmp_path: Path,
    shape: tuple[int, int, int],
    dims: int,
    patch: tuple[int, ...],
    spacing: tuple[float, float, float],
) -> None:
    random = np.random.default_rng(0)
    for name in ("flair", "t1ce", "t1", "t2"):
        save(random.random(shape, np.float32) + 1, tmp_path / "p0" / f"{name}.nii.gz")
    save(random.choice([0, 1, 2, 4], shape).astype(np.int16), tmp_path / "p0" / "seg.nii.gz")
    (case,) = load_cases(tmp_path)
    torch.manual_seed(0)
    net = PrismNet(4, 4, spatial_dims=dims, width=2, depth=2)
    used = Predictor(net, preprocessing=Preprocessing(spacing), patch=patch)
    assert used.predict(case).shape == shape
    records = used.evaluate([case])
    assert len(records) == 45 and np.isfinite([(r.dice, r.hd95) for r in records]).all()


def test_a_slice_is_predicted_like_the_volume_that_repeats_it(tmp_path: Path) -> None:
    """A model of slices sees each slice on its own."""
    random = np.random.default_rng(0)
    for name in ("flair", "t1ce", "t1", "t2"):
        image = random.random((20, 24, 1), np.float32) + 1
        save(image, tmp_path / "thin" / f"{name}.nii.gz")
        save(image.repeat(3, 2), tmp_path / "thick" / f"{name}.nii.gz")
    thick, thin = load_cases(tmp_path)
    np.testing.assert_array_equal(
        predictor().predict(thick), predictor().predict(thin).repeat(3, 2)
    )


# Files


def lesion_case(folder: Path) -> Case:
    write_case(folder / "p0", spacing=(1.0, 1.0, 1.5))
    (case,) = load_cases(folder)
    return case


@pytest.mark.parametrize("value", [7, 40000, 2**31 - 1])
def test_large_values_are_predicted_and_saved(tmp_path: Path, value: int) -> None:
    case, path = lesion_case(tmp_path), tmp_path / "out" / "p0.nii.gz"
    labels = LabelSet({"lesion": value})
    net = PrismNet(4, 2, spatial_dims=2, width=2, depth=2)
    with torch.no_grad():
        net.decoder.head.bias[1] = 1e6
    predicted = Predictor(
        net, labels=labels, patch=(16, 16), preprocessing=Preprocessing((1.0, 1.0, 1.5))
    ).predict(case)
    save_labels(path, predicted, case)
    written = nib.load(path)
    assert written.get_data_dtype() == (np.int16 if value < 2**15 else np.int32)
    np.testing.assert_array_equal(np.unique(np.asarray(written.dataobj)), [0, value])
    voxels = (np.asarray(written.dataobj) == value).sum()
    assert region_volumes(predicted, case, labels) == {"lesion": pytest.approx(0.0015 * voxels)}


def broken_header(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        image = nib.load(path)
        image = nib.Nifti1Image(np.array(image.dataobj), None, image.header)
        image.header["scl_slope"], image.header["scl_inter"] = 1, 0
        change(image.header)
        path.unlink()
        with path.with_suffix("").open("wb") as file:
            image.header.write_to(file)
            file.write(np.asarray(image.dataobj).tobytes("F"))

    return write


def bad_quaternion(header: Any) -> None:
    header["qform_code"], header["quatern_b"], header["quatern_c"] = 1, 2.0, 3.0


def bad_units(header: Any) -> None:
    header["xyzt_units"] = 63


@pytest.mark.parametrize("change", [bad_quaternion, bad_units])
def test_labels_are_saved_where_a_header_is_odd_but_usable(
    tmp_path: Path, change: Callable[[Any], None]
) -> None:
    write_case(tmp_path / "p0")
    broken_header(change)(tmp_path / "p0" / "p0_flair.nii.gz")
    (case,) = load_cases(tmp_path)
    save_labels(tmp_path / "out.nii.gz", np.ones(SHAPE, np.int16), case)
    written = nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(written.affine, case.read().affine)
    assert written.header.get_xyzt_units()[0] == "unknown" or change is bad_units
