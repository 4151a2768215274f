"""From files to batches: preprocessing, the cache, and episodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import niftis
import numpy as np
import pytest
import torch
from niftis import SHAPE, write_case, write_cases
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader

from prism_meta.cases import Case, Volume, load_cases
from prism_meta.data import (
    CachedCase,
    Prepared,
    Preprocessing,
    prepare,
)
from prism_meta.episodes import Augmentation, Episodes
from prism_meta.errors import CaseError, ConfigError, OutputError
from prism_meta.labels import BRATS_LABELS, LabelSet
from prism_meta.masking import DynamicMask, FullMask, SingleModalityMask, StaticMask
from prism_meta.modalities import BRATS, Batch

ORIENTATIONS = ("RAS", "LPS", "PSR", "ILA")
#: Where the size of a voxel must be small against the blob.
BIG = (40, 48, 32)


def written(folder: Path, **options: Any) -> Volume:
    write_case(folder / "p0", **options)
    (case,) = load_cases(folder)
    return case.read()


def world(voxels: Tensor, affine: Any) -> Tensor:
    """Centre of mass of ``voxels`` in mm."""
    affine = torch.as_tensor(affine, dtype=torch.float64)
    return affine[:3, :3] @ voxels.nonzero().double().mean(0) + affine[:3, 3]


def dice(a: Tensor, b: Tensor) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


# Preprocessing


def test_z_score_inside_the_brain_and_zero_outside(tmp_path: Path) -> None:
    volume = written(tmp_path)
    ready = Preprocessing()(volume, BRATS_LABELS)
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
    ready = Preprocessing()(Volume(images, None, np.eye(4), SHAPE))
    assert torch.all(ready.image[1, : SHAPE[0] // 2] == 0)
    assert float(ready.image[1][images["t2"] != 0].mean()) == pytest.approx(0, abs=1e-4)
    assert torch.equal(ready.brain, torch.from_numpy(images["t1"] != 0)), "any modality counts"
    assert ready.target is None


def test_outliers_are_clipped() -> None:
    image = niftis.draw_image()
    plain = Preprocessing()(Volume({"t1": image.copy()}, None, np.eye(4), SHAPE)).image
    image[10, 12, 8] = 1e6
    spiked = Preprocessing()(Volume({"t1": image}, None, np.eye(4), SHAPE)).image
    assert float(spiked.max()) < 4
    rest = torch.ones(1, *SHAPE, dtype=torch.bool)
    rest[0, 10, 12, 8] = False
    torch.testing.assert_close(spiked[rest], plain[rest], atol=0.02, rtol=0)
    wide = Preprocessing(percentiles=(0, 100))
    assert float(wide(Volume({"t1": image}, None, np.eye(4), SHAPE)).image.max()) > 50


@pytest.mark.parametrize("value", [0.0, 0.1, 7.0, 1000.1, -3.3])
def test_a_constant_image_becomes_zero_and_not_nan(value: float) -> None:
    images = {
        "t1": np.where(niftis.draw_image() != 0, np.float32(value), np.float32(0)),
        "t2": niftis.draw_image(index=1),
    }
    ready = Preprocessing()(Volume(images, None, np.eye(4), SHAPE))
    assert torch.all(ready.image[0] == 0)
    assert torch.isfinite(ready.image).all()
    alone = Preprocessing()(Volume({"t1": images["t1"]}, None, np.eye(4), SHAPE))
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
        ((1.0, 1.0, 1.0), "PIR", (2.0, 2.0, 2.0), (20, 24, 16)),
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
    torch.testing.assert_close(ready.affine[:3, :3], torch.diag(torch.tensor(model)).double())
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
    assert Preprocessing()(volume).target is None
    with pytest.raises(
        CaseError, match=r"^label values 4 are not in the label set \{0: background"
    ):
        Preprocessing()(volume, LabelSet({"a": 1, "b": 2}))


def round_trip(preprocessing: Preprocessing, volume: Volume) -> tuple[Tensor, Tensor, Prepared]:
    """The label to the model's grid and back, and the label as it was."""
    ready = preprocessing(volume, BRATS_LABELS)
    assert ready.target is not None and volume.label is not None
    maps = one_hot(ready.target.long(), 4).movedim(-1, 0).float()
    restored = preprocessing.restore(maps, ready, volume)
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
    assert ready.image.shape[1:] == (20, 24, 16)
    assert dice(restored > 0, label > 0) > 0.9
    middle = world(restored > 0, volume.affine)
    torch.testing.assert_close(middle, world(label > 0, volume.affine), atol=0.65, rtol=0)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_restore_after_upsampling(tmp_path: Path, codes: str) -> None:
    volume = written(tmp_path, codes=codes, spacing=(1.0, 1.5, 2.0))
    restored, label, _ = round_trip(Preprocessing(), volume)
    assert dice(restored > 0, label > 0) > 0.97


def test_restore_keeps_a_constant_map_constant_up_to_the_edges(tmp_path: Path) -> None:
    volume = written(tmp_path, codes="LPS")
    preprocessing = Preprocessing(spacing=(2.0, 1.5, 3.0))
    ready = preprocessing(volume)
    restored = preprocessing.restore(torch.full((1, *ready.brain.shape), 7.0), ready, volume)
    torch.testing.assert_close(restored, torch.full((1, *SHAPE), 7.0))


def test_oblique_grid(tmp_path: Path) -> None:
    volume = written(tmp_path)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    tilted = Volume(volume.images, volume.label, turn @ volume.affine, volume.shape)
    restored, label, ready = round_trip(Preprocessing(), tilted)
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
    return Preprocessing().restore(maps, ready, volume)


def assert_same_classes(preprocessing: Preprocessing, volume: Volume, box: Any, seed: int) -> float:
    """Compare the two ways on random logits; return the share of the case that is foreground."""
    ready = preprocessing(volume)
    generator = torch.Generator().manual_seed(seed)
    shape = ready.brain[box].shape
    # Large regions of one class and, in between, voxels that are all undecided.
    logits = 4 * torch.randn(4, *shape, generator=generator)
    logits[2, : shape[0] // 2] += 20
    maps = by_interpolation(logits, box, ready, volume)
    classes = preprocessing.restore_classes(logits, box, prepared=ready, volume=volume)
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
    tilted = Volume(volume.images, None, turn @ volume.affine, volume.shape)
    box = tuple(slice(2, n - 1) for n in ready.brain.shape)
    logits = 4 * torch.randn(4, *ready.brain[box].shape)
    maps = by_interpolation(logits, box, ready, tilted)
    calls: list[Any] = []
    restore = Preprocessing.restore
    monkeypatch.setattr(
        Preprocessing, "restore", lambda *args: calls.append(args) or restore(*args)
    )
    classes = Preprocessing().restore_classes(logits, box, prepared=ready, volume=tilted)
    assert len(calls) == (0 if fast else 1)
    first, second = maps.topk(2, 0).values
    decided = first - second > 1e-3
    assert torch.equal(classes[decided], maps.argmax(0).to(torch.uint8)[decided])


def test_restored_classes_by_hand() -> None:
    """2 mm to 1 mm along one axis: voxels lie 1/4 and 3/4 of the way, and the likeliest wins."""
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    volume = Volume({}, None, affine, (6, 1, 1))
    coarse = torch.eye(4, dtype=torch.float64)
    coarse[0, 0], coarse[0, 3] = 2.0, 0.5
    ready = Prepared(torch.zeros(1, 3, 1, 1), ("t1",), torch.ones(3, 1, 1).bool(), None, coarse)
    # Voxels of 2 mm: background outside the box, then p = (0.4, 0.6), then p = (0.1, 0.9).
    logits = torch.tensor([[0.4, 0.1], [0.6, 0.9]]).log()[:, :, None, None]
    box = (slice(1, 3), slice(0, 1), slice(0, 1))
    classes = Preprocessing().restore_classes(logits, box, prepared=ready, volume=volume)
    # p of class 1 at the six voxels: 0, 0.15, 0.45, 0.675, 0.825, 0.9.
    assert classes.flatten().tolist() == [0, 0, 0, 1, 1, 1]


def test_restored_classes_of_a_real_case() -> None:
    case = load_cases(niftis.real_data() / "brats-tcga")[0]
    assert case.label is not None
    whole, slab = case.read(), slice(40, 75)  # through the tumour: all of it would take 10 s
    assert whole.label is not None
    images = {name: image[..., slab].copy() for name, image in whole.images.items()}
    volume = Volume(images, whole.label[..., slab], whole.affine, (240, 240, 35))
    preprocessing = Preprocessing((2.0, 2.0, 2.0))
    ready = preprocessing(volume, BRATS_LABELS)
    assert ready.target is not None
    box = tuple(slice(int(i.min()), int(i.max()) + 1) for i in ready.brain.nonzero().T)
    logits = one_hot(ready.target[box].long(), 4).movedim(-1, 0) * 4.0
    logits += torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    expected = by_interpolation(logits, box, ready, volume).argmax(0).to(torch.uint8)
    classes = preprocessing.restore_classes(logits, box, prepared=ready, volume=volume)
    assert (expected > 0).sum() > 10_000
    assert int((classes != expected).sum()) <= 2, "only where two classes tie up to rounding"


# The cache


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    return load_cases(write_cases(tmp_path / "cases", 2, missing=("t1ce",), codes="LPS"))


def test_prepared_cases(cases: list[Case], tmp_path: Path) -> None:
    seen: list[str] = []
    preprocessing = Preprocessing(spacing=(2.0, 2.0, 1.0))
    cached = prepare(cases, preprocessing, BRATS_LABELS, tmp_path / "a" / "b", on_case=seen.append)
    assert [case.id for case in cached] == seen == ["p0", "p1"]
    for case, stored in zip(cases, cached, strict=True):
        assert torch.equal(stored.availability, case.availability)
        assert stored.shape == (10, 12, 16)
        ready = preprocessing(case.read(), BRATS_LABELS)
        image, target = stored.patch((0, 0, 0), stored.shape, case.availability)
        expected = torch.zeros(4, *stored.shape)
        expected[case.availability] = ready.image
        torch.testing.assert_close(image, expected, atol=2e-3, rtol=1e-3)  # half precision
        assert image.dtype == torch.float32
        assert target.dtype == torch.int64
        assert ready.target is not None
        assert torch.equal(target, ready.target.long())


def test_a_second_call_reads_no_image(
    cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = niftis.record_reads(monkeypatch)
    first = prepare(cases, Preprocessing(), BRATS_LABELS, tmp_path / "cache")
    assert {path.name for path in opened} == {
        f"{p}_{m}.nii.gz" for p in ("p0", "p1") for m in ("flair", "t1", "t2", "seg")
    }
    opened.clear()
    second = prepare(cases, Preprocessing(), BRATS_LABELS, str(tmp_path / "cache"))
    assert opened == []
    assert [case.path for case in second] == [case.path for case in first]


def change_image(case: Case) -> None:
    image = niftis.draw_image(seed=9)
    niftis.save(image, case.files["t1"], niftis.affine_of((1, 1, 1)))


def change_label(case: Case) -> None:
    assert case.label is not None
    niftis.save(niftis.draw_label(values=(1, 2)), case.label, niftis.affine_of((1, 1, 1)))


RELABELLED = LabelSet({"oedema": 2, "necrotic": 1, "enhancing": 4})  # other class indices
CHANGES: dict[str, tuple[Callable[[Case], object], Preprocessing, LabelSet]] = {
    "image": (change_image, Preprocessing(), BRATS_LABELS),
    "label": (change_label, Preprocessing(), BRATS_LABELS),
    "spacing": (id, Preprocessing(spacing=(2.0, 1.0, 1.0)), BRATS_LABELS),
    "percentiles": (id, Preprocessing(percentiles=(0.0, 100.0)), BRATS_LABELS),
    "more labels": (id, Preprocessing(), LabelSet({**BRATS_LABELS.values, "cyst": 5})),
    "order of labels": (id, Preprocessing(), RELABELLED),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_the_cache_follows_every_change(cases: list[Case], tmp_path: Path, changed: str) -> None:
    change, preprocessing, labels = CHANGES[changed]
    for case in cases:  # on one grid with what the changes write
        write_case(case.files["t1"].parent, missing=("t1ce",))
    before = prepare(cases, Preprocessing(), BRATS_LABELS, tmp_path / "cache")
    change(cases[0])
    (after,) = prepare(cases[:1], preprocessing, labels, tmp_path / "cache")
    assert after.path != before[0].path
    (fresh,) = prepare(cases[:1], preprocessing, labels, tmp_path / "other")
    shown = cases[0].availability
    for a, b in zip(
        after.patch((0, 0, 0), after.shape, shown),
        fresh.patch((0, 0, 0), fresh.shape, shown),
        strict=True,
    ):
        assert torch.equal(a, b)
    if changed == "image":
        (same,) = prepare(cases[1:], preprocessing, labels, tmp_path / "cache")
        assert same.path == before[1].path, "only the changed case is prepared again"


def test_the_cache_follows_the_modalities(cases: list[Case], tmp_path: Path) -> None:
    (whole,) = prepare(cases[:1], Preprocessing(), BRATS_LABELS, tmp_path / "cache")
    hidden = [cases[0].restrict([True, False, False, False])]
    (part,) = prepare(hidden, Preprocessing(), BRATS_LABELS, tmp_path / "cache")
    assert part.path != whole.path
    assert part.availability.tolist() == [True, False, False, False]


def test_faults_of_all_cases_are_collected_and_nothing_is_half_written(tmp_path: Path) -> None:
    root = tmp_path / "cases"
    write_case(root / "a", label=None)
    write_case(root / "b", values=(2, 1, 3))
    image = niftis.draw_image()
    image[:2, 0, 0] = np.nan
    write_case(root / "c", missing=("t1",))
    niftis.save(image, root / "c" / "t1.nii.gz", niftis.affine_of((1, 1, 1)))
    write_case(root / "d")
    path = write_case(root / "e", missing=("t2",)) / "e_t1.nii.gz"
    blank = np.zeros(SHAPE, np.float32)
    for name in ("t1", "t2"):
        niftis.save(blank, root / "f" / f"{name}.nii.gz", niftis.affine_of((1, 1, 1)))
    niftis.save(niftis.draw_label(), root / "f" / "seg.nii.gz", niftis.affine_of((1, 1, 1)))
    cases = load_cases(root)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CaseError) as caught:
        prepare(cases, Preprocessing(), BRATS_LABELS, tmp_path / "cache")
    assert caught.value.faults == (
        "case a: no label file; training and evaluation need one",
        "case b: b_seg.nii.gz: label values 3 are not in the label set "
        "{0: background, 1: necrotic, 2: oedema, 4: enhancing}; mend the file or set data.labels",
        "case c: t1.nii.gz has 2 voxels that are NaN or infinite; "
        "repair the file or remove it (a missing modality is allowed)",
        "case e: e_t1.nii.gz cannot be read as NIfTI "
        "(Compressed file ended before the end-of-stream marker was reached); "
        "restore it or remove it (a missing modality is allowed)",
        "case f: nothing but zeros in t1.nii.gz, t2.nii.gz; restore the files or remove the case",
    )
    assert [p.name.split("-")[0] for p in (tmp_path / "cache").iterdir()] == ["d"]


def test_an_interrupted_write_leaves_nothing(
    cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path, content: bytes) -> int:
        with path.open("wb") as handle:
            handle.write(content[: len(content) // 2])
        raise KeyboardInterrupt

    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(cases, Preprocessing(), BRATS_LABELS, cache)
    assert list(cache.iterdir()) == []
    assert len(prepare(cases, Preprocessing(), BRATS_LABELS, cache)) == 2


def test_cache_that_cannot_be_written(cases: list[Case], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError) as caught:
        prepare(cases, Preprocessing(), BRATS_LABELS, tmp_path / "file")
    message = str(caught.value)
    assert message.startswith(f"cannot write {tmp_path / 'file'}/p0-")
    assert message.endswith(".safetensors: file exists; choose a folder that you may write to")


def test_full_disk(cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError) as caught:
        prepare(cases, Preprocessing(), BRATS_LABELS, tmp_path / "cache")
    message = str(caught.value)
    assert message.startswith(f"cannot write {tmp_path / 'cache'}/p0-")
    assert message.endswith(": no space left on device; choose a folder that you may write to")


def test_no_permission(cases: list[Case], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    with niftis.forbidden(cache), pytest.raises(OutputError) as caught:
        prepare(cases, Preprocessing(), BRATS_LABELS, cache)
    message = str(caught.value)
    assert message.startswith(f"cannot write {cache}/p0-")
    assert message.endswith(": permission denied; choose a folder that you may write to")


def test_patch_is_a_box_of_the_prepared_volume(cases: list[Case], tmp_path: Path) -> None:
    (case,) = prepare(cases[:1], Preprocessing(), BRATS_LABELS, tmp_path / "cache")
    whole, target = case.patch((0, 0, 0), case.shape, case.availability)
    corner, size = (3, 5, 2), (7, 8, 11)
    box = tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))
    shown = torch.tensor([True, False, False, True])
    image, labels = case.patch(corner, size, shown)
    assert torch.equal(image[shown], whole[(shown, *box)])
    assert image[shown].abs().sum() > 0
    assert torch.all(image[~shown] == 0)
    assert torch.equal(labels, target[box])


def test_hidden_modalities_are_not_read(
    cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case,) = prepare(cases[:1], Preprocessing(), BRATS_LABELS, tmp_path / "cache")
    read: list[str] = []
    open_file = niftis.record_slices(monkeypatch, read)
    case.patch((0, 0, 0), (4, 4, 4), torch.tensor([True, False, False, False]))
    assert read == ["image_0", "target"]
    assert open_file == [case.path]


def test_centres_lie_in_the_brain_and_in_each_class(cases: list[Case], tmp_path: Path) -> None:
    labels = LabelSet({**BRATS_LABELS.values, "cyst": 5})
    (case,) = prepare(cases[:1], Preprocessing(), labels, tmp_path / "cache")
    ready = Preprocessing()(cases[0].read(), labels)
    assert ready.target is not None
    brain, *classes = case.centres()
    assert ready.brain.flatten()[brain].all()
    # Evenly over axial slices, however much brain there is in each.
    slices = torch.bincount(brain % ready.brain.shape[2], minlength=ready.brain.shape[2])
    inside = ready.brain.any(0).any(0)
    assert (slices[~inside] == 0).all()
    expected = slices.sum() / inside.sum()
    assert ((slices[inside] - expected).abs() < 5 * expected.sqrt()).all()
    assert [len(c) > 0 for c in classes] == [True, True, True, False], "no case has a cyst"
    for k, centres in enumerate(classes, start=1):
        assert torch.equal(centres, (ready.target == k).flatten().nonzero().flatten()), k


# Episodes

AVAILABLE = [
    [True, True, True, True],
    [True, True, True, True],
    [True, False, True, True],
    [False, True, False, False],
    [True, False, False, True],
    [False, False, True, True],
]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list[CachedCase]:
    """Six prepared cases, two of them complete."""
    root = tmp_path_factory.mktemp("episodes")
    cases = load_cases(write_cases(root / "cases", len(AVAILABLE)))
    shown = [case.restrict(row) for case, row in zip(cases, AVAILABLE, strict=True)]
    return prepare(shown, Preprocessing(), BRATS_LABELS, root / "cache")


def episodes(pool: list[CachedCase], **options: Any) -> Episodes:
    given: dict[str, Any] = {"patch": (8, 9, 10), "batch_size": 4, "steps": 12, **options}
    return Episodes(pool, **given)


def equal(a: tuple[Batch, Batch], b: tuple[Batch, Batch]) -> bool:
    return all(
        x.case_ids == y.case_ids
        and torch.equal(x.image, y.image)
        and torch.equal(x.mask, y.mask)
        and torch.equal(x.target, y.target)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("augmentation", [None, Augmentation(3)], ids=["plain", "augmented"])
def test_episodes_depend_on_seed_rank_and_step_alone(
    pool: list[CachedCase], augmentation: Augmentation | None
) -> None:
    data = episodes(pool, seed=3, augmentation=augmentation)
    first = [data[t] for t in range(4)]
    torch.manual_seed(99)
    np.random.seed(99)
    again = episodes(pool, seed=3, augmentation=augmentation)
    resumed = {t: again[t] for t in (3, 1, 1, 2, 0)}  # any order, any number of times
    for t, episode in enumerate(first):
        assert equal(episode, resumed[t]), t
    others = [data[4], episodes(pool, seed=4)[0], episodes(pool, seed=3, rank=1)[0]]
    for other in others:
        assert not any(equal(other, episode) for episode in first)


def test_drawing_leaves_the_global_random_state_alone(pool: list[CachedCase]) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    episodes(pool, augmentation=Augmentation(3))[0]
    assert torch.equal(torch.rand(3), expected[0])
    np.testing.assert_array_equal(np.random.rand(3), expected[1])


def test_worker_processes_change_nothing(pool: list[CachedCase]) -> None:
    data = episodes(pool, steps=6, augmentation=Augmentation(3))
    here = list(DataLoader(data, batch_size=None, num_workers=0))
    there = list(DataLoader(data, batch_size=None, num_workers=2))
    assert len(here) == len(there) == len(data) == 6
    for t, (a, b) in enumerate(zip(here, there, strict=True)):
        assert isinstance(b[0], Batch)
        assert equal(tuple(a), tuple(b)), t
        assert equal(tuple(a), data[t]), t


def test_train_and_meta_cases_are_disjoint_and_masks_available(pool: list[CachedCase]) -> None:
    available = {case.id: case.availability for case in pool}
    together: set[frozenset[str]] = set()
    data = episodes(pool, batch_size=5, steps=40)
    for t in range(len(data)):
        train, meta = data[t]
        assert len(train.case_ids) == len(meta.case_ids) == 5
        assert not set(train.case_ids) & set(meta.case_ids)
        together.add(frozenset(train.case_ids))
        for batch in (train, meta):
            assert batch.mask.any(1).all()
            for shown, case in zip(batch.mask, batch.case_ids, strict=True):
                assert not (shown & ~available[case]).any(), case
    assert len(together) > 5, "the halves are drawn anew for each episode"


def test_every_case_is_drawn_before_one_is_drawn_again(pool: list[CachedCase]) -> None:
    for t in range(5):
        for batch in episodes(pool, batch_size=5)[t]:
            assert sorted(batch.case_ids.count(c) for c in set(batch.case_ids)) == [1, 2, 2]


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


def test_static_masks_show_what_there_is(pool: list[CachedCase]) -> None:
    available = {case.id: case.availability for case in pool}
    data = episodes(pool, train_mask=StaticMask(), meta_mask=SingleModalityMask())
    for t in range(6):
        train, meta = data[t]
        expected = torch.stack([available[case] for case in train.case_ids])
        assert torch.equal(train.mask, expected)
        assert torch.all(meta.mask.sum(1) == 1)


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
    whole = {c.id: c.patch((0, 0, 0), c.shape, c.availability) for c in pool}
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
    cached = prepare(cases, Preprocessing(), BRATS_LABELS, tmp_path / "cache")
    train, meta = episodes(cached, foreground=foreground)[0]
    assert not train.target.any() and not meta.target.any()
    assert torch.all(train.image == 0)


def test_patch_larger_than_the_volume(pool: list[CachedCase]) -> None:
    for patch, shown in (((8, 25, 8), "(8, 25, 8)"), ((21, 8), "(21, 8)")):
        with pytest.raises(ConfigError) as caught:
            episodes(pool[:2], patch=patch)
        assert caught.value.faults == tuple(
            f"patch {shown} is larger than the volume of case {case}, (20, 24, 16) voxels at the "
            "model's spacing; use a smaller data.patch or a finer data.spacing"
            for case in ("p0", "p1")
        )


def test_too_few_cases(pool: list[CachedCase]) -> None:
    for count in (0, 1):
        with pytest.raises(ConfigError) as caught:
            episodes(pool[:count])
        assert str(caught.value) == (
            f"{count} training case: an episode needs at least 2, for its train and its meta batch "
            "are drawn from different cases; add cases or hold fewer out"
        )


def test_both_faults_of_episodes_are_reported_together(pool: list[CachedCase]) -> None:
    with pytest.raises(ConfigError) as caught:
        episodes(pool[:1], patch=(99, 9, 9))
    assert len(caught.value.faults) == 2


def test_full_meta_batches_hold_complete_cases_only(pool: list[CachedCase]) -> None:
    data = episodes(pool, meta_mask=FullMask())
    for t in range(len(data)):
        train, meta = data[t]
        assert set(meta.case_ids) <= {"p0", "p1"}
        assert meta.mask.all()
        assert not set(train.case_ids) & set(meta.case_ids)


def test_full_train_batches_leave_a_complete_case_in_every_episode(pool: list[CachedCase]) -> None:
    """By chance the meta half may take all complete cases; then it gives some of them back."""
    for meta_mask in (DynamicMask(), FullMask()):
        data = episodes(pool, train_mask=FullMask(), meta_mask=meta_mask, steps=60)
        for t in range(len(data)):
            train, meta = data[t]
            assert train.mask.all()
            assert not set(train.case_ids) & set(meta.case_ids)
    data = episodes([pool[0], pool[3]], train_mask=FullMask(), steps=10)
    assert {data[t][0].case_ids[0] for t in range(10)} == {"p0"}


@pytest.mark.parametrize(
    ("chosen", "train_mask", "meta_mask", "found"),
    [
        (slice(2, 6), DynamicMask(), FullMask(), (4, 0)),
        (slice(2, 6), FullMask(), DynamicMask(), (0, 2)),
        (slice(1, 6), FullMask(), FullMask(), (1, 0)),
    ],
    ids=["meta", "train", "both"],
)
def test_no_complete_case_for_the_full_policy(
    pool: list[CachedCase], chosen: slice, train_mask: Any, meta_mask: Any, found: tuple[int, int]
) -> None:
    with pytest.raises(ConfigError) as caught:
        episodes(pool[chosen], train_mask=train_mask, meta_mask=meta_mask)
    assert str(caught.value) == (
        f"masks: no episode can be drawn: {found[0]} cases fit the train mask and {found[1]} "
        "others the meta mask; the full policy needs complete cases, use dynamic instead"
    )


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


def test_real_case_through_the_whole_path(tmp_path: Path) -> None:
    cases = load_cases(niftis.real_data() / "brats-tcga")[:2]
    shown = [case.restrict([True, k == 0, False, False]) for k, case in enumerate(cases)]
    cached = prepare(shown, Preprocessing(spacing=(2.0, 2.0, 2.0)), BRATS_LABELS, tmp_path)
    assert [case.shape for case in cached] == [(120, 120, 78)] * 2
    data = Episodes(cached, patch=(48, 48, 48), batch_size=1, steps=2, foreground=1.0)
    for t in range(2):
        for batch in data[t]:
            assert batch.target.any()
            assert torch.isfinite(batch.image).all()
            assert 0.1 < float(batch.image[batch.mask].std()) < 3
