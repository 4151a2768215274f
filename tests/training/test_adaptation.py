"""Adapting a model to a few cases of a site: what it learns, what it never touches, and when it stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import equal
from niftis import write_cases
from torch import nn

import prism_meta as pm
from prism_meta.data.cache import CachedCase, prepare
from prism_meta.training.adaptation.choice import Setting
from prism_meta.training.adaptation.fine_tuning import Adapter, _groups
from prism_meta.training.validation.one_subset import OneSubsetValidation

NAMES = ("flair", "t1")
CONFIG = pm.load_config(
    overrides=[
        'data.modalities=["flair", "t1"]', "data.spacing=[1, 1, 1]", "data.patch=[16, 16]",
        "data.batch_size=4", "model.network=unet", "model.width=4", "model.depth=2",
        "objective.unimodal=false", "training.steps=120", "training.lr=0.01", "training.ema=0.9",
        "training.augment=false",
    ]
)  # fmt: skip


def scans(folder: Path, count: int, *, other_scanner: bool) -> list[pm.Case]:
    """Small cases; those of the other scanner have the opposite contrast."""
    write_cases(folder, count, modalities=NAMES)
    for file in folder.rglob("*.nii.gz"):
        if other_scanner and not file.name.endswith("_seg.nii.gz"):
            image = nib.load(file)
            values = np.asarray(image.dataobj)
            inverted = np.where(values > 0, 1.05 * values.max() - values, 0).astype(np.float32)
            nib.save(nib.Nifti1Image(inverted, image.affine), file)
    return pm.load_cases(folder, NAMES)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> pm.Run:
    """A run that was trained on cases of one scanner."""
    root = tmp_path_factory.mktemp("source")
    cases = scans(root / "cases", 3, other_scanner=False)
    run = pm.train(cases, CONFIG, out=root / "run", progress=False).run
    assert run is not None
    return run


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> list[CachedCase]:
    """Four prepared cases of another scanner."""
    root = tmp_path_factory.mktemp("site")
    return ready(scans(root / "cases", 4, other_scanner=True), root / "cache")


def ready(cases: list[pm.Case], cache: Path) -> list[CachedCase]:
    return prepare(cases, cache, preprocessing=pm.Preprocessing((1.0,) * 3), labels=pm.BRATS_LABELS)


def adapter(**options: Any) -> Adapter:
    given = {
        "subset": torch.tensor([True, False]),
        "patch": (16, 16),
        "batch_size": 4,
        "augment": False,
        **options,
    }
    objective = given.pop("objective", pm.PrismObjective(unimodal=False))
    return Adapter(given.pop("subset"), objective, NAMES, pm.BRATS_LABELS, **given)


# ------------------------------------------------------------------------------------- what it learns


def test_it_improves_on_another_scanner(source: pm.Run, site: list[CachedCase]) -> None:
    model, adapts = source.load_model(), adapter()
    support, others = site[:2], site[2:]
    choice = adapts.choose(model, support, rates=(3e-3,), lengths=(10, 20))
    assert choice.setting == Setting(3e-3, 20)
    assert all(one.gain > 0.1 for one in choice.compared), choice.compared
    adapted, log = adapts.train(model, support, choice.setting)
    assert [line["step"] for line in log] == list(range(1, 21))
    assert adapts.dice(adapted, others) > adapts.dice(model, others) + 0.1


def test_the_weights_are_kept_if_the_others_teach_the_opposite(
    source: pm.Run, site: list[CachedCase], tmp_path: Path
) -> None:
    """The objective rises instead of falling, from a model that knows the scanner."""
    right = pm.PrismObjective(unimodal=False)

    def wrong(forward: Callable[..., Any], batch: pm.Batch) -> torch.Tensor:
        return -torch.as_tensor(right(forward, batch).loss)

    model = source.load_model()
    known = ready(scans(tmp_path / "cases", 2, other_scanner=False), tmp_path / "cache")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    choice = adapter(objective=wrong).choose(model, known, rates=(1e-2,), lengths=(10, 20))
    assert choice.setting is None
    assert all(one.before > 0.1 and one.gain < 0 for one in choice.compared), choice.compared
    assert choice.reason.endswith("which is not more than its error")
    assert equal(model.state_dict(), before)


def test_a_rate_of_nothing_changes_nothing(source: pm.Run, site: list[CachedCase]) -> None:
    choice = adapter().choose(source.load_model(), site[:2], rates=(1e-30,), lengths=(2,))
    assert choice.setting is None and [one.gain for one in choice.compared] == [0.0, 0.0]


# ---------------------------------------------------------------------------------- what it depends on


def test_the_same_numbers_twice(source: pm.Run, site: list[CachedCase]) -> None:
    found = []
    for noise in (0, 1):  # the state of torch's own generator does not matter
        torch.manual_seed(noise)
        model, adapts = source.load_model(), adapter(seed=3)
        choice = adapts.choose(model, site[:2], rates=(1e-3,), lengths=(2, 3))
        adapted, log = adapts.train(model, site[:2], Setting(1e-3, 3))
        found.append((choice, log, adapted.state_dict()))
    assert found[0][:2] == found[1][:2]
    assert equal(found[0][2], found[1][2])
    other, _ = adapter(seed=4).train(source.load_model(), site[:2], Setting(1e-3, 3))
    assert not equal(found[0][2], other.state_dict())


def test_hidden_modalities_do_not_matter(
    source: pm.Run, site: list[CachedCase], tmp_path: Path
) -> None:
    cases = scans(tmp_path / "cases", 2, other_scanner=True)
    shown = [case.restrict([True, False]) for case in cases]
    results = []
    for number, given in enumerate((cases, shown)):
        support = ready(given, tmp_path / f"cache{number}")
        choice = adapter().choose(source.load_model(), support, rates=(1e-3,), lengths=(2,))
        results.append((choice, adapter().train(source.load_model(), support, Setting(1e-3, 2))[0]))
    assert results[0][0] == results[1][0]
    assert equal(results[0][1].state_dict(), results[1][1].state_dict())


def test_the_weights_are_the_average_over_the_steps(source: pm.Run, site: list[CachedCase]) -> None:
    """After two steps 2 / 11 of the first weights and 9 / 11 of the second, see ``AveragedWeights``."""
    model = source.load_model()
    one, _ = adapter().train(model, site[:1], Setting(1e-3, 1))
    average, _ = adapter().train(model, site[:1], Setting(1e-3, 2))
    last, _ = adapter()._fit(model, site[:1], Setting(1e-3, 2))
    for name, value in average.state_dict().items():
        if value.is_floating_point():
            expected = (2 * one.state_dict()[name] + 9 * last.state_dict()[name]) / 11
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)


def test_progress_counts_all_steps(source: pm.Run, site: list[CachedCase]) -> None:
    told: list[tuple[int, int, str]] = []
    adapter().choose(
        source.load_model(),
        site[:2],
        rates=(1e-3, 3e-3),
        lengths=(2,),
        progress=lambda *values: told.append(values),
    )
    assert [done for done, _, _ in told] == [0, 2, 4, 4, 6, 8]
    assert {total for _, total, _ in told} == {8}
    assert [note for _, _, note in told] == ["p0"] * 3 + ["p1"] * 3


# ------------------------------------------------------------------------------------- who is held out


def fake(*patients: str) -> list[CachedCase]:
    here = torch.ones(1, dtype=torch.bool)
    return [
        CachedCase(f"c{k}", here, (1, 1, 1), Path(), patient=patient)
        for k, patient in enumerate(patients)
    ]


def test_patients_are_held_out_whole_and_in_ten_groups_at_most() -> None:
    assert _groups(fake("a", "b", "a")) == [{"a"}, {"b"}]
    many = _groups(fake(*map(str, range(23))))
    assert [len(group) for group in many] == [3, 3, 3, 2, 2, 2, 2, 2, 2, 2]
    assert set().union(*many) == set(map(str, range(23)))


def test_one_patient_cannot_be_held_out(source: pm.Run, site: list[CachedCase]) -> None:
    same = [replace(case, patient="a") for case in site[:2]]
    with pytest.raises(ValueError, match="got 1 patients and \\[10, 20, 40\\] steps"):
        adapter().choose(source.load_model(), same)


# --------------------------------------------------------------------------------------------- the Dice


class Constant(nn.Module):
    """Predicts one class everywhere that an image is not 0, and the background elsewhere."""

    def __init__(self, value: int) -> None:
        super().__init__()
        self.value = value
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(image), 4, *image.shape[2:])
        logits[:, 0] = 0.5
        logits[:, self.value] += (image != 0).any(1)
        return logits


@pytest.mark.parametrize("values", [(2, 1, 4), (2, 1), (2,)], ids=["all", "no ET", "oedema only"])
def test_regions_with_an_empty_truth_are_left_out(values: tuple[int, ...], tmp_path: Path) -> None:
    root = write_cases(tmp_path / "cases", 1, values=values)
    (case,) = ready(pm.load_cases(root), tmp_path / "cache")
    model = pm.wrap(Constant(3))  # enhancing tumour, so that it is in every region
    subset = torch.tensor([True, False, False, True])
    measure = OneSubsetValidation(
        [case], modalities=pm.BRATS, labels=pm.BRATS_LABELS, patch=(16, 16), subset=subset
    )
    image, target = case.patch((0, 0, 0), case.shape, shown=subset)
    predicted = torch.zeros_like(target).masked_fill((image != 0).any(0), 3)
    expected = []
    for region in pm.BRATS_LABELS.regions:
        p, t = (pm.BRATS_LABELS.region(classes, region) for classes in (predicted, target))
        if t.any():
            expected.append(2 * (p & t).sum().item() / (p.sum() + t.sum()).item())
    assert len(expected) == {3: 3, 2: 2, 1: 1}[len(values)]
    (found,) = measure.dice(model, [case])
    assert list(found) == ["flair+t2"]
    assert found["flair+t2"] == pytest.approx(sum(expected) / len(expected), abs=1e-6)


@pytest.mark.parametrize(("predicted", "dice"), [(0, 1.0), (3, 0.0)])
def test_a_case_without_a_lesion(predicted: int, dice: float, tmp_path: Path) -> None:
    root = write_cases(tmp_path / "cases", 1, values=())
    (case,) = ready(pm.load_cases(root), tmp_path / "cache")
    subset = torch.ones(4).bool()
    measure = OneSubsetValidation(
        [case], modalities=pm.BRATS, labels=pm.BRATS_LABELS, patch=(16, 16), subset=subset
    )
    assert measure.dice(pm.wrap(Constant(predicted)), [case]) == [{"flair+t1ce+t1+t2": dice}]
