"""Episodes: which cases and masks come together."""

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
from episodes import episodes
from helpers import faults_of
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
from prism_meta.training.episodes.loader import load_episodes


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
    walk = []
    for t in range(20):
        train, meta = data[t]
        walk += [tuple(batch.mask[0].tolist()) for batch in train]
        for batch in train:
            assert (batch.mask == batch.mask[0]).all()
            assert all(not (batch.mask[0] & ~available[case]).any() for case in batch.case_ids)
            assert not set(batch.case_ids) & set(meta.case_ids)
    orders = [tuple(walk[k : k + 15]) for k in range(0, 75, 15)]
    assert all(len(set(order)) == 15 for order in orders), "none comes again before all have come"
    assert len(set(orders)) == 5, "each time in a new order"


@pytest.mark.parametrize("role", ["train_mask", "meta_mask"])
def test_one_subset_per_batch_walks_on_from_episode_to_episode(
    pool: list[CachedCase], role: str
) -> None:
    """Also through subsets that only one case has: it is then in the half that needs it."""
    few = [pool[1], *pool[3:]]
    options: dict[str, Any] = {"steps": 45, "batch_size": 2, role: OneSubsetMask()}
    data, again = episodes(few, **options), episodes(few, **options)
    part = 0 if role == "train_mask" else -1
    walk = [tuple(data.masks(t)[part][0].tolist()) for t in range(45)]
    assert [len(set(walk[k : k + 15])) for k in (0, 15, 30)] == [15] * 3
    assert len({tuple(walk[k : k + 15]) for k in (0, 15, 30)}) == 3
    for t in (31, 7, 7, 44):  # a resumed run, in any order
        assert tuple(again.masks(t)[part][0].tolist()) == walk[t]
    for other in ({"rank": 1}, {"seed": 1}):
        apart = episodes(few, **options, **other)
        assert [tuple(apart.masks(t)[part][0].tolist()) for t in range(15)] != walk[:15]
    for t in range(15):
        train, meta = data[t]
        assert not set(train.case_ids) & set(meta.case_ids)


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


def test_static_masks_show_what_there_is(pool: list[CachedCase]) -> None:
    available = {case.id: case.availability for case in pool}
    data = episodes(pool, train_mask=StaticMask(), meta_mask=SingleModalityMask())
    for t in range(6):
        train, meta = data[t]
        expected = torch.stack([available[case] for case in train.case_ids])
        assert torch.equal(train.mask, expected)
        assert torch.all(meta.mask.sum(1) == 1)


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
