"""Prepared cases on disk: what is kept, when it is made anew, and what is read of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import niftis
import numpy as np
import pytest
import torch
from helpers import faults_of
from niftis import SHAPE, write_case, write_cases
from safetensors.torch import load, save_file

from prism_meta.data.cache import CachedCase, prepare
from prism_meta.data.cases import Case
from prism_meta.data.labels import BRATS_LABELS, LabelSet
from prism_meta.data.layouts.folders import load_cases
from prism_meta.data.preprocessing import Preprocessing
from prism_meta.errors import CaseError, OutputError

#: The voxel size of the synthetic cases, mm.
OWN = (1.0, 1.0, 1.0)


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    return load_cases(write_cases(tmp_path / "cases", 2, missing=("t1ce",), codes="LPS"))


def test_prepared_cases(cases: list[Case], tmp_path: Path) -> None:
    seen: list[str] = []
    preprocessing = Preprocessing(spacing=(2.0, 2.0, 1.0))
    cached = prepare(
        cases,
        tmp_path / "a" / "b",
        preprocessing=preprocessing,
        labels=BRATS_LABELS,
        on_case=seen.append,
    )
    assert [case.id for case in cached] == seen == ["p0", "p1"]
    for case, stored in zip(cases, cached, strict=True):
        assert torch.equal(stored.availability, case.availability)
        assert stored.shape == (10, 12, 16)
        ready = preprocessing(case.read(), BRATS_LABELS)
        image, target = stored.patch((0, 0, 0), stored.shape, shown=case.availability)
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
    first = prepare(
        cases, tmp_path / "cache", preprocessing=Preprocessing(OWN), labels=BRATS_LABELS
    )
    assert {path.name for path in opened} == {
        f"{p}_{m}.nii.gz" for p in ("p0", "p1") for m in ("flair", "t1", "t2", "seg")
    }
    opened.clear()
    second = prepare(
        cases, str(tmp_path / "cache"), preprocessing=Preprocessing(OWN), labels=BRATS_LABELS
    )
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
    "image": (change_image, Preprocessing(OWN), BRATS_LABELS),
    "label": (change_label, Preprocessing(OWN), BRATS_LABELS),
    "spacing": (id, Preprocessing(spacing=(2.0, 1.0, 1.0)), BRATS_LABELS),
    "percentiles": (id, Preprocessing(OWN, percentiles=(0.0, 100.0)), BRATS_LABELS),
    "more labels": (id, Preprocessing(OWN), LabelSet({**BRATS_LABELS.values, "cyst": 5})),
    "order of labels": (id, Preprocessing(OWN), RELABELLED),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_the_cache_follows_every_change(cases: list[Case], tmp_path: Path, changed: str) -> None:
    change, preprocessing, labels = CHANGES[changed]
    for case in cases:  # on one grid with what the changes write
        write_case(case.files["t1"].parent, missing=("t1ce",))
    before = prepare(
        cases, tmp_path / "cache", preprocessing=Preprocessing(OWN), labels=BRATS_LABELS
    )
    change(cases[0])
    (after,) = prepare(cases[:1], tmp_path / "cache", preprocessing=preprocessing, labels=labels)
    assert after.path != before[0].path
    (fresh,) = prepare(cases[:1], tmp_path / "other", preprocessing=preprocessing, labels=labels)
    shown = cases[0].availability
    for a, b in zip(
        after.patch((0, 0, 0), after.shape, shown=shown),
        fresh.patch((0, 0, 0), fresh.shape, shown=shown),
        strict=True,
    ):
        assert torch.equal(a, b)
    if changed == "image":
        (same,) = prepare(cases[1:], tmp_path / "cache", preprocessing=preprocessing, labels=labels)
        assert same.path == before[1].path, "only the changed case is prepared again"


def test_the_cache_follows_the_modalities(cases: list[Case], tmp_path: Path) -> None:
    (whole,) = prepare(
        cases[:1], tmp_path / "cache", preprocessing=Preprocessing(OWN), labels=BRATS_LABELS
    )
    hidden = [cases[0].restrict([True, False, False, False])]
    (part,) = prepare(
        hidden, tmp_path / "cache", preprocessing=Preprocessing(OWN), labels=BRATS_LABELS
    )
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
        prepare(cases, tmp_path / "cache", preprocessing=Preprocessing(OWN), labels=BRATS_LABELS)
    assert caught.value.faults == (
        "case a: no label file; training and evaluation need one, add it or remove the case",
        "case b: b_seg.nii.gz: label values 3 are not in the label set "
        "{0: background, 1: necrotic, 2: oedema, 4: enhancing}; correct the file or the label set",
        "case c: t1.nii.gz has 2 voxels that are NaN or infinite; "
        "repair the file or remove it (a missing modality is allowed)",
        "case e: e_t1.nii.gz cannot be read as NIfTI "
        "(Compressed file ended before the end-of-stream marker was reached); "
        "restore it or remove it (a missing modality is allowed)",
        "case f: all voxels are 0 in t1.nii.gz, t2.nii.gz; restore the files or remove the case",
    )
    assert [p.name.split("-")[0] for p in sorted((tmp_path / "cache").iterdir(), reverse=True)] == [
        "d",
        "CACHEDIR.TAG",
    ]


def assert_equal(path: Path, whole: dict[str, torch.Tensor]) -> None:
    stored = load(path.read_bytes())
    assert stored.keys() == whole.keys()
    assert all(torch.equal(stored[name], whole[name]) for name in whole)


def flip(place: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(place * (len(content) - 1))] ^= 4
        path.write_bytes(content)

    return damage


def truncate(share: float) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def without_checksum(path: Path) -> None:
    save_file({"target": torch.zeros(2, 2, 2)}, path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    **{f"bit at {place}": flip(place) for place in (0, 1e-5, 1e-4, 1e-3, 0.01, 0.3, 0.7, 1)},
    **{f"truncated to {share}": truncate(share) for share in (0, 1e-4, 0.01, 0.5, 0.9999)},
    "garbage": lambda path: path.write_bytes(b"\xff" * 1000),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "another file": without_checksum,
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("lost")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_prepared_again(
    cases: list[Case], tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    def prepared() -> CachedCase:
        options = {"preprocessing": Preprocessing(OWN), "labels": BRATS_LABELS}
        return prepare(cases[:1], tmp_path / "cache", **options)[0]

    case = prepared()
    whole, content = load(case.path.read_bytes()), case.path.read_bytes()
    DAMAGES[name](case.path)
    assert not case.path.exists() or case.path.read_bytes() != content
    assert prepared().path == case.path
    assert_equal(case.path, whole)
    (message,) = caplog.messages
    assert message.startswith(f"{case.path} is damaged (")
    assert message.endswith("); the case is prepared again")
    prepared()
    assert len(caplog.messages) == 1


def test_a_file_that_cannot_be_read_is_prepared_again(cases: list[Case], tmp_path: Path) -> None:
    (case,) = prepare(
        cases[:1], tmp_path / "cache", preprocessing=Preprocessing(OWN), labels=BRATS_LABELS
    )
    whole = load(case.path.read_bytes())
    case.path.chmod(0)
    prepare(cases[:1], tmp_path / "cache", preprocessing=Preprocessing(OWN), labels=BRATS_LABELS)
    assert_equal(case.path, whole)


def test_a_folder_in_the_place_of_a_file(cases: list[Case], tmp_path: Path) -> None:
    (case,) = prepare(
        cases[:1], tmp_path / "cache", preprocessing=Preprocessing(OWN), labels=BRATS_LABELS
    )
    case.path.unlink()
    case.path.mkdir()
    with pytest.raises(OutputError) as caught:
        prepare(cases, tmp_path / "cache", preprocessing=Preprocessing(OWN), labels=BRATS_LABELS)
    assert str(caught.value) == (
        f"{case.path}: is a folder, expected a prepared case; remove the folder"
    )


def test_long_names(tmp_path: Path) -> None:
    names = ["\u00e9" * 95 + end for end in "ab"]
    for name in names:
        write_case(tmp_path / "cases" / name, names="{modality}.nii.gz")
    cached = prepare(
        load_cases(tmp_path / "cases"),
        tmp_path / "cache",
        preprocessing=Preprocessing(OWN),
        labels=BRATS_LABELS,
    )
    assert [case.id for case in cached] == names
    assert len({case.path for case in cached}) == 2


def test_only_a_folder_of_its_own_is_marked_as_a_cache(cases: list[Case], tmp_path: Path) -> None:
    for folder in ("cases", "cases/cache"):
        prepare(cases, tmp_path / folder, preprocessing=Preprocessing(OWN), labels=BRATS_LABELS)
    assert (
        (tmp_path / "cases/cache/CACHEDIR.TAG")
        .read_text()
        .startswith("Signature: 8a477f597d28d172789f06886806bc55\n")
    )
    assert not (tmp_path / "cases/CACHEDIR.TAG").exists()
    assert [case.id for case in load_cases(tmp_path / "cases")] == ["p0", "p1"]


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
            prepare(cases, cache, preprocessing=Preprocessing(OWN), labels=BRATS_LABELS)
    assert list(cache.iterdir()) == []
    assert len(prepare(cases, cache, preprocessing=Preprocessing(OWN), labels=BRATS_LABELS)) == 2


def test_cache_that_cannot_be_written(cases: list[Case], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError) as caught:
        prepare(cases, tmp_path / "file", preprocessing=Preprocessing(OWN), labels=BRATS_LABELS)
    message = str(caught.value)
    assert message.startswith(f"cannot write {tmp_path / 'file'}/p0-")
    assert message.endswith(".safetensors: file exists; choose a folder that you may write to")


def test_full_disk(cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError) as caught:
        prepare(cases, tmp_path / "cache", preprocessing=Preprocessing(OWN), labels=BRATS_LABELS)
    message = str(caught.value)
    assert message.startswith(f"cannot write {tmp_path / 'cache'}/p0-")
    assert message.endswith(": no space left on device; free some space")


def test_no_permission(cases: list[Case], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    with niftis.forbidden(cache), pytest.raises(OutputError) as caught:
        prepare(cases, cache, preprocessing=Preprocessing(OWN), labels=BRATS_LABELS)
    message = str(caught.value)
    assert message.startswith(f"cannot write {cache}/p0-")
    assert message.endswith(": permission denied; choose a folder that you may write to")


def test_patch_is_a_box_of_the_prepared_volume(cases: list[Case], tmp_path: Path) -> None:
    (case,) = prepare(
        cases[:1], tmp_path / "cache", preprocessing=Preprocessing(OWN), labels=BRATS_LABELS
    )
    whole, target = case.patch((0, 0, 0), case.shape, shown=case.availability)
    corner, size = (3, 5, 2), (7, 8, 11)
    box = tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))
    shown = torch.tensor([True, False, False, True])
    image, labels = case.patch(corner, size, shown=shown)
    assert torch.equal(image[shown], whole[(shown, *box)])
    assert image[shown].abs().sum() > 0
    assert torch.all(image[~shown] == 0)
    assert torch.equal(labels, target[box])


def test_hidden_modalities_are_not_read(
    cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case,) = prepare(
        cases[:1], tmp_path / "cache", preprocessing=Preprocessing(OWN), labels=BRATS_LABELS
    )
    read: list[str] = []
    open_file = niftis.record_slices(monkeypatch, read)
    case.patch((0, 0, 0), (4, 4, 4), shown=torch.tensor([True, False, False, False]))
    assert read == ["image_0", "target"]
    assert open_file == [case.path]


def test_centres_lie_in_the_brain_and_in_each_class(cases: list[Case], tmp_path: Path) -> None:
    labels = LabelSet({**BRATS_LABELS.values, "cyst": 5})
    (case,) = prepare(
        cases[:1], tmp_path / "cache", preprocessing=Preprocessing(OWN), labels=labels
    )
    ready = Preprocessing(OWN)(cases[0].read(), labels)
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


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"x" * 9)])
def test_a_volume_that_is_gone_when_it_is_needed(
    cases: list[Case], tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    case = prepare(cases, tmp_path, preprocessing=Preprocessing(), labels=BRATS_LABELS)[0]
    damage(case.path)
    for read in (case.centres, lambda: case.patch((0, 0, 0), (2, 2, 2), shown=case.availability)):
        (fault,) = faults_of(read, CaseError)
        assert fault == (
            f"case {case.id}: its prepared volume {case.path} was removed or damaged since the training "
            "started; start again with --resume, which prepares it again"
        )
