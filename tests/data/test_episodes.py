"""Episodes: which cases and masks come together, and patches of them."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import niftis
import numpy as np
import pytest
import torch
from helpers import faults_of
from niftis import SHAPE, write_cases
from torch import Tensor
from torch.utils.data import DataLoader

from prism_meta.data.augmentation import Augmentation
from prism_meta.data.cache import CachedCase, prepare
from prism_meta.data.episodes import Episodes
from prism_meta.data.labels import BRATS_LABELS
from prism_meta.data.layouts.folders import load_cases
from prism_meta.data.masking import DynamicMask, FullMask, SingleModalityMask, StaticMask
from prism_meta.data.preprocessing import Preprocessing
from prism_meta.data.subset_masks import OneSubsetMask
from prism_meta.errors import ConfigError
from prism_meta.modalities import Batch
from prism_meta.step_batches import StepBatches
from prism_meta.training.loader import load_episodes

#: The synthetic cases have voxels of 1 mm.
OWN_GRID = Preprocessing((1.0, 1.0, 1.0))
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
    return prepare(shown, root / "cache", preprocessing=OWN_GRID, labels=BRATS_LABELS)


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


def test_each_inner_step_has_a_batch_of_its_own(pool: list[CachedCase]) -> None:
    data = episodes(pool, inner_steps=3, batch_size=2)
    again = episodes(pool, inner_steps=3, batch_size=2)
    available = {case.id: case.availability for case in pool}
    for t in (4, 0, 4, 2):
        train, meta = data[t]
        assert isinstance(train, StepBatches) and len(train) == 3 and isinstance(meta, Batch)
        for a, b in combinations((*train, meta), 2):
            assert not torch.equal(a.image, b.image)
        for one, other in zip((*train, meta), (*again[t][0], again[t][1]), strict=True):
            assert equal((one, one), (other, other))
        seen = {name for batch in train for name in batch.case_ids}
        assert not seen & set(meta.case_ids)
        assert len(seen) == 3, "all three cases of the half are drawn before one comes again"
        for batch in train:
            for shown, case in zip(batch.mask, batch.case_ids, strict=True):
                assert shown.any() and not (shown & ~available[case]).any()
    masks = {tuple(batch.mask.flatten().tolist()) for t in range(8) for batch in data[t][0]}
    assert len(masks) > 8, "each batch has its own masks"
    assert isinstance(episodes(pool)[0][0], Batch)


def test_one_inner_step_draws_what_it_always_drew(pool: list[CachedCase]) -> None:
    """The first batch of several has the cases of the only one."""
    one, several = episodes(pool), episodes(pool, inner_steps=2)
    for t in range(4):
        assert one[t][0].case_ids == several[t][0][0].case_ids
        assert torch.equal(one[t][0].image, several[t][0][0].image)


def test_worker_processes_keep_the_batches_of_the_steps(pool: list[CachedCase]) -> None:
    data = episodes(pool, inner_steps=2, steps=3)
    with closing(load_episodes(data, range(3), workers=1)) as loaded:
        for t, (train, meta) in enumerate(loaded):
            assert isinstance(train, StepBatches)
            assert equal((train[0], train[1]), data[t][0]) and equal(
                (meta, meta), (data[t][1],) * 2
            )


def test_one_subset_per_inner_step(pool: list[CachedCase]) -> None:
    """As Reptile over all subsets needs it: each of K batches shows one subset, and all differ."""
    data = episodes(pool, inner_steps=4, train_mask=OneSubsetMask(), steps=20)
    available = {case.id: case.availability for case in pool}
    orders = set()
    for t in range(20):
        train, meta = data[t]
        shown = [tuple(batch.mask[0].tolist()) for batch in train]
        orders.add(tuple(shown))
        assert shown == (list(dict.fromkeys(shown)) * 4)[:4], (
            "none comes again before all have come"
        )
        for batch in train:
            assert (batch.mask == batch.mask[0]).all()
            assert all(not (batch.mask[0] & ~available[case]).any() for case in batch.case_ids)
            assert not set(batch.case_ids) & set(meta.case_ids)
    assert len(orders) > 15, "the order is drawn anew for each episode"


@pytest.mark.parametrize("per_patient", [2, 3])
@pytest.mark.parametrize(
    "train_mask", [DynamicMask(), FullMask(), OneSubsetMask()], ids=lambda mask: type(mask).__name__
)
def test_the_batches_come_from_disjoint_patients(
    pool: list[CachedCase], per_patient: int, train_mask: Any
) -> None:
    shared = [replace(c, patient=f"patient{k // per_patient}") for k, c in enumerate(pool)]
    if isinstance(train_mask, FullMask):  # complete cases of two patients
        shared[1] = replace(shared[1], patient="patient9")
    of = {case.id: case.patient for case in shared}
    data = episodes(shared, steps=40, inner_steps=2, train_mask=train_mask)
    seen = set()
    for t in range(40):
        train, meta = data[t]
        patients = {of[name] for batch in train for name in batch.case_ids}
        assert not patients & {of[name] for name in meta.case_ids}
        seen |= patients
    assert seen == (
        {"patient0", "patient9"} if isinstance(train_mask, FullMask) else set(of.values())
    )


def test_cases_of_one_patient_make_no_episode(pool: list[CachedCase]) -> None:
    alone = [replace(case, patient="anna") for case in pool]
    assert faults_of(partial(episodes, alone), ConfigError) == (
        "6 training cases of one patient: an episode needs at least 2, because its train and meta batch "
        "come from different patients; add cases or hold fewer out",
    )


def test_drawing_leaves_the_global_random_state_alone(pool: list[CachedCase]) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    episodes(pool, augmentation=Augmentation(3))[0]
    assert torch.equal(torch.rand(3), expected[0])
    np.testing.assert_array_equal(np.random.rand(3), expected[1])


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # on one core
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


def test_too_few_cases(pool: list[CachedCase]) -> None:
    for count in (0, 1):
        found = "1 training case" if count == 1 else "0 training cases"
        assert faults_of(partial(episodes, pool[:count]), ConfigError) == (
            f"{found}: an episode needs at least 2, because its train and meta batch come from "
            "different cases; add cases or hold fewer out",
        )


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
    action = partial(episodes, pool[chosen], train_mask=train_mask, meta_mask=meta_mask)
    assert faults_of(action, ConfigError) == (
        f"no episode can be drawn: {found[0]} cases fit the train mask and {found[1]} others fit the "
        "meta mask; a full mask needs complete cases, use a dynamic one instead",
    )


def test_real_case_through_the_whole_path(tmp_path: Path) -> None:
    cases = load_cases(niftis.real_data() / "brats-tcga")[:2]
    shown = [case.restrict([True, k == 0, False, False]) for k, case in enumerate(cases)]
    cached = prepare(shown, tmp_path, preprocessing=Preprocessing(), labels=BRATS_LABELS)
    assert [case.shape for case in cached] == [(120, 120, 78)] * 2
    data = Episodes(cached, patch=(48, 48, 48), batch_size=1, steps=2, foreground=1.0)
    for t in range(2):
        for batch in data[t]:
            assert batch.target.any()
            assert torch.isfinite(batch.image).all()
            assert 0.1 < float(batch.image[batch.mask].std()) < 3
