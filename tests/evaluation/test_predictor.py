"""Every subset of a case in one go, against the case with only these files, and evaluation on it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import niftis
import numpy as np
import pytest
import torch
from niftis import SHAPE
from torch import Tensor, nn

from prism_meta.data.cases import Case, Volume
from prism_meta.data.labels import BRATS_LABELS
from prism_meta.data.layouts.folders import load_cases
from prism_meta.data.preprocessing import Preprocessing
from prism_meta.empty_masks import DiagonalEmpty, EmptyPolicy, NanEmpty
from prism_meta.evaluation import windows
from prism_meta.evaluation.metrics import dice_hd95
from prism_meta.evaluation.predictor import Predictor
from prism_meta.evaluation.shortcuts import evaluate, predict
from prism_meta.modalities import subset_name, subsets
from prism_meta.networks.prism import PrismNet
from prism_meta.networks.wrapped import wrap
from prism_meta.records import Record

NAMES = ("flair", "t1", "t2")
#: A modality's share of each axis: the boxes of subsets differ, and one lies inside another.
EXTENTS = {
    "flair": ((0.0, 1.0), (0.0, 1.0), (0.0, 1.0)),
    "t1": ((0.3, 0.7), (0.2, 0.8), (0.25, 0.75)),
    "t2": ((0.0, 0.6), (0.4, 1.0), (0.1, 0.6)),
}
PATCHES: list[Any] = [
    pytest.param((9, 11), id="slices"),
    pytest.param((9, 11, 7), id="volumes"),
    pytest.param((64, 64), id="larger"),
]


class Masked(nn.Module):
    """Logits that depend on the shown modalities, on their places, and on where the window lies.

    It runs once per subset.
    """

    spatial_dims: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, ...]] = []

    def segment(self, image: Tensor, mask: Tensor) -> Tensor:
        self.calls.append(tuple(image.shape))
        shown = torch.where(mask.view(*mask.shape, *[1] * (image.ndim - 2)), image, 0.0)
        ramp = torch.linspace(-1, 1, image.shape[2]).view(-1, *[1] * (image.ndim - 3))
        weights = torch.tensor([1.0, -0.7, 0.5])[: image.shape[1]]
        mixed = torch.tensordot(shown, weights, ([1], [0])) + 0.3 * ramp
        return torch.stack([0 * mixed, mixed - 0.4, 0.8 * mixed, -mixed - 0.3], 1)

    def segment_subsets(self, image: Tensor, subsets: Tensor) -> Tensor:
        return torch.stack([self.segment(image, row.expand(len(image), -1)) for row in subsets])


class Stacked(Masked):
    """Serves all subsets of a window in one call."""

    def segment_subsets(self, image: Tensor, subsets: Tensor) -> Tensor:
        self.calls.append((len(subsets), *image.shape))
        masks = [row.expand(len(image), -1) for row in subsets]
        return torch.stack([Masked().segment(image, mask) for mask in masks])


class OneByOne(Stacked):
    """The same, one subset after the other."""

    def segment_subsets(self, image: Tensor, subsets: Tensor) -> Iterator[Tensor]:  # type: ignore[override]
        return iter(super().segment_subsets(image, subsets))


MODELS: list[Any] = [Stacked, OneByOne, Masked]


def write(folder: Path, *, extents: bool = True, codes: str = "LPS") -> Case:
    """A case of three modalities; with ``extents`` each fills a part of the grid of its own."""
    for k, name in enumerate(NAMES):
        image = niftis.draw_image(index=k)
        if extents:
            ends = zip(EXTENTS[name], SHAPE, strict=True)
            box = tuple(slice(int(a * n), int(b * n)) for (a, b), n in ends)
            inside = np.zeros(SHAPE, bool)
            inside[box] = True
            image = np.where(inside, image, np.float32(0))
        moved, affine = niftis.reorient(image, niftis.affine_of((1, 1, 1.5)), codes)
        niftis.save(moved, folder / "p0" / f"{name}.nii.gz", affine)
    label, affine = niftis.reorient(niftis.draw_label(), niftis.affine_of((1, 1, 1.5)), codes)
    niftis.save(label, folder / "p0" / "seg.nii.gz", affine)
    (case,) = load_cases(folder, NAMES)
    return case


def options(patch: tuple[int, ...]) -> dict[str, Any]:
    return {"preprocessing": Preprocessing((1.3, 1.0, 2.0)), "patch": patch}


def predicted_from(model: nn.Module, case: Case, shown: Tensor, patch: tuple[int, ...]) -> Any:
    """The prediction for a case that has only the files of these modalities."""
    return predict(model, case.restrict(shown), **options(patch))


# Many subsets at once


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("model", MODELS)
def test_a_subset_is_the_case_with_only_its_files(
    tmp_path: Path, model: Callable[[], nn.Module], patch: tuple[int, ...]
) -> None:
    """Whatever the others show, and where: they change neither box nor windows nor intensities."""
    case = write(tmp_path)
    every = subsets(3)
    predictions = Predictor(model(), **options(patch)).predict_subsets(case, every)
    assert len(predictions) == 7
    for shown, prediction in zip(every, predictions, strict=True):
        np.testing.assert_array_equal(prediction, predicted_from(Masked(), case, shown, patch))
        assert len(np.unique(prediction)) > 2
    different = {prediction.tobytes() for prediction in predictions}
    assert len(different) == 7


def test_windows_depend_on_the_box() -> None:
    """Else the test above could not see a box that a hidden modality made."""
    image = torch.randn(1, 3, 12, 12)
    mask = torch.ones(1, 3, dtype=torch.bool)
    whole = Masked().segment(image, mask)
    assert not torch.allclose(whole[..., 2:, :], Masked().segment(image[..., 2:, :], mask))


def test_prism_net_serves_every_subset_with_the_same_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = PrismNet(3, 4, 2, 4, depth=2).eval()
    case, patch = write(tmp_path), (16, 16)
    every = subsets(3)
    predictions = Predictor(net, **options(patch)).predict_subsets(case, every)
    for shown, prediction in zip(every, predictions, strict=True):
        expected = predicted_from(net, case, shown, patch)
        assert (prediction != expected).mean() < 1e-3, "only ties may differ, by rounding"
        assert len(np.unique(prediction)) > 1


@pytest.mark.parametrize("patch", PATCHES)
def test_subsets_with_one_box_share_their_windows(tmp_path: Path, patch: tuple[int, ...]) -> None:
    case = write(tmp_path, extents=False)
    every, model = subsets(3), Stacked()
    Predictor(model, **options(patch)).predict_subsets(case, every)
    single = Stacked()
    Predictor(single, **options(patch)).predict_subsets(case, every[-1:])
    assert [call[1:] for call in model.calls] == [call[1:] for call in single.calls]
    assert {call[0] for call in model.calls} == {7} and {call[0] for call in single.calls} == {1}


def test_files_are_read_once_and_only_those_that_a_subset_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = write(tmp_path)
    read = niftis.record_reads(monkeypatch)
    shown = torch.tensor([[True, False, False], [False, False, True], [True, False, True]])
    Predictor(Stacked(), **options((9, 11))).predict_subsets(case, shown)
    assert [path.name for path in read] == ["flair.nii.gz", "t2.nii.gz"]


def test_fewer_at_a_time_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = write(tmp_path, extents=False)
    every = subsets(3)
    expected = Predictor(Stacked(), **options((9, 11))).predict_subsets(case, every)
    model = Stacked()
    each = 4 * (4 * 9 * 11 * 16 + 4 * 16 * 24 * 13)  # at most: K maps of 16 windows and of the box
    monkeypatch.setattr(windows, "LOGITS_BYTES", 3 * each)
    predictions = Predictor(model, **options((9, 11))).predict_subsets(case, every)
    assert {call[0] for call in model.calls} == {3, 1}
    for prediction, of_all in zip(predictions, expected, strict=True):
        np.testing.assert_array_equal(prediction, of_all)
    monkeypatch.setattr(windows, "LOGITS_BYTES", 1)
    Predictor(model := Stacked(), **options((9, 11))).predict_subsets(case, every)
    assert {call[0] for call in model.calls} == {1}


def test_a_modality_of_zeros_alone(tmp_path: Path) -> None:
    """On its own it has no box and is predicted everywhere; it adds nothing to the box of another."""
    case = write(tmp_path)
    empty = nib.Nifti1Image(np.zeros(SHAPE, np.float32), nib.load(case.files["t1"]).affine)
    nib.save(empty, case.files["t2"])
    every = subsets(3)
    predictions = Predictor(Stacked(), **options((9, 11))).predict_subsets(case, every)
    for shown, prediction in zip(every, predictions, strict=True):
        np.testing.assert_array_equal(prediction, predicted_from(Masked(), case, shown, (9, 11)))


def test_bad_subsets(tmp_path: Path) -> None:
    case = write(tmp_path).restrict([True, True, False])
    predictor = Predictor(Stacked(), **options((9, 11)))
    with pytest.raises(
        ValueError, match=r"^subset: flair\+t2 has modalities that case p0 lacks; it has flair, t1$"
    ):
        predictor.predict_subsets(case, torch.tensor([[True, False, False], [True, False, True]]))
    with pytest.raises(ValueError, match=r"^subset: got no modality, expected at least one$"):
        predictor.predict_subsets(case, torch.tensor([[True, False, False], [False] * 3]))
    with pytest.raises(ValueError, match=r"^subset: got no modality, expected at least one$"):
        predict(Stacked(), case, subset=[False] * 3, **options((9, 11)))
    message = r"^subsets: got \(3,\), expected \(S, 3\), a column for each of flair, t1, t2$"
    with pytest.raises(ValueError, match=message):
        predictor.predict_subsets(case, torch.tensor([True, False, False]))
    with pytest.raises(
        ValueError, match=r"^subset: unknown modality pet; use some of flair, t1, t2$"
    ):
        predictor.predict(case, subset="flair+pet")


def test_a_subset_has_a_name(tmp_path: Path) -> None:
    case, predictor = write(tmp_path), Predictor(Stacked(), **options((9, 11)))
    by_name = predictor.predict(case, subset="flair+t2")
    np.testing.assert_array_equal(by_name, predictor.predict(case, subset=[True, False, True]))
    (listed,) = predictor.predict_subsets(case, ["flair+t2"])
    np.testing.assert_array_equal(by_name, listed)
    assert not np.array_equal(by_name, predictor.predict(case))
    np.testing.assert_array_equal(
        predictor.predict(case), predictor.predict(case, subset="flair+t1+t2")
    )
    records = predictor.evaluate([case], ["t1", "flair+t2"])
    assert [record.subset for record in records] == ["t1"] * 3 + ["flair+t2"] * 3


def test_cases_with_other_modalities_are_refused(tmp_path: Path) -> None:
    predictor = Predictor(Stacked(), modalities=("t1", "flair", "t2"), **options((9, 11)))
    message = (
        "case p0: has the modalities flair, t1, t2, but the model was trained on t1, flair, t2; "
        "load it with these names in this order"
    )
    for use in (predictor.predict, lambda case: predictor.evaluate([case])):
        with pytest.raises(ValueError, match=f"^{message}$"):
            use(write(tmp_path))


def test_a_bare_net_is_refused_with_the_fix() -> None:
    message = (
        r"^model: got Conv2d, which is no SegmentationModel; give a PrismNet or pm.wrap\(net\)$"
    )
    with pytest.raises(TypeError, match=message):
        Predictor(nn.Conv2d(3, 4, 1), patch=(8, 8))
    Predictor(wrap(nn.Conv2d(3, 4, 1), NAMES), patch=(8, 8))


@pytest.mark.parametrize(("dims", "patch"), [(2, (96, 96)), (3, (64, 64, 64))])
def test_the_default_window_follows_the_model(dims: int, patch: tuple[int, ...]) -> None:
    net = PrismNet(3, 4, spatial_dims=dims, width=1)
    assert Predictor(net).windows.patch == patch
    other = (8,) * (5 - dims)
    message = rf"^patch: got {re.escape(str(other))}, expected {dims} numbers, e\.g\. "
    with pytest.raises(ValueError, match=message):
        Predictor(net, patch=other)


def test_a_model_of_unknown_dimensions_needs_a_patch() -> None:
    message = (
        "patch: Stacked does not say whether it works on slices or volumes (spatial_dims is None); "
        "give e.g. patch=(96, 96) for 2-D or patch=(64, 64, 64) for 3-D"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Predictor(Stacked())


def test_evaluate_feeds_volumes_to_a_volume_net(tmp_path: Path) -> None:
    net = PrismNet(3, 4, width=1, depth=2)
    (record, *_) = evaluate(net, [write(tmp_path)], ["flair"])
    assert (record.case, record.subset) == ("p0", "flair") and 0 <= record.dice <= 1


def test_the_model_is_in_evaluation_mode_and_gets_its_own_back(tmp_path: Path) -> None:
    class Dropping(Stacked):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Dropout(0.5), nn.Dropout(0.5)

        def segment_subsets(self, image: Tensor, subsets: Tensor) -> Tensor:
            return super().segment_subsets(self.second(self.first(image)), subsets)

    model, case = Dropping(), write(tmp_path)
    model.second.eval()
    predicted = predict(model, case, **options((9, 11)))
    assert [module.training for module in model.modules()] == [True, True, False]
    np.testing.assert_array_equal(predicted, predict(Stacked(), case, **options((9, 11))))


# Evaluation


def one_at_a_time(
    model: nn.Module, cases: list[Case], every: Tensor, patch: tuple[int, ...], empty: EmptyPolicy
) -> list[Record]:
    """Subset by subset, case by case, every region on the whole volume."""
    records = []
    for shown in every:
        for case in cases:
            if (shown & ~case.availability).any():
                continue
            volume = case.read()
            assert volume.label is not None
            prediction = BRATS_LABELS.encode(predicted_from(model, case, shown, patch))
            truth = BRATS_LABELS.encode(volume.label)
            for region in BRATS_LABELS.regions:
                dice, hd95 = dice_hd95(
                    BRATS_LABELS.region(prediction, region),
                    BRATS_LABELS.region(truth, region),
                    spacing=volume.spacing,
                    empty=empty,
                )
                name = subset_name(shown.tolist(), case.modalities)
                records.append(Record(case.id, name, region, dice, hd95))
    return records


class NoEnhancing(Stacked):
    """Never predicts the last class: ET is missed everywhere."""

    def segment_subsets(self, image: Tensor, subsets: Tensor) -> Tensor:
        logits = super().segment_subsets(image, subsets)
        logits[:, :, 3] = -9
        return logits

    def segment(self, image: Tensor, mask: Tensor) -> Tensor:
        logits = super().segment(image, mask)
        logits[:, 3] = -9
        return logits


@pytest.mark.parametrize("empty", [DiagonalEmpty(), NanEmpty()], ids=["diagonal", "nan"])
@pytest.mark.parametrize("model", [Stacked, Masked, NoEnhancing])
def test_evaluate_measures_what_one_at_a_time_gives(
    tmp_path: Path, model: Callable[[], nn.Module], empty: EmptyPolicy
) -> None:
    cases = [
        write(tmp_path / "a"),
        write(tmp_path / "b", extents=False, codes="RAS").restrict([True, False, True]),
    ]
    seen: list[tuple[str, str]] = []

    def on_prediction(
        case: Case, volume: Volume, subset: str, truth: Tensor, prediction: Tensor
    ) -> None:
        assert truth.shape == prediction.shape == volume.shape == SHAPE
        seen.append((case.id, subset))

    got = evaluate(model(), cases, **options((9, 11)), empty=empty, on_prediction=on_prediction)
    expected = one_at_a_time(model(), cases, subsets(3), (9, 11), empty)
    assert [(r.case, r.subset, r.region) for r in got] == [
        (r.case, r.subset, r.region) for r in expected
    ]
    for actual, wanted in zip(got, expected, strict=True):
        pair = (actual.dice, actual.hd95)
        assert pair == pytest.approx((wanted.dice, wanted.hd95), abs=1e-6, nan_ok=True), actual
    names = [subset_name(row.tolist(), NAMES) for row in subsets(3)]
    assert seen == [("p0", n) for n in names] + [("p0", n) for n in names if "t1" not in n]


def test_evaluate_takes_the_subsets_in_the_order_given(tmp_path: Path) -> None:
    chosen = torch.tensor([[True, True, True], [False, True, False]])
    records = evaluate(Stacked(), [write(tmp_path)], chosen, **options((9, 11)))
    assert [r.subset for r in records] == ["flair+t1+t2"] * 3 + ["t1"] * 3
