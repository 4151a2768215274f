"""Support episodes: batches of a few cases that all show one subset."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from helpers import faults_of
from niftis import record_slices

from prism_meta.data import cache
from prism_meta.data.augmentation import Augmentation
from prism_meta.data.cache import CachedCase
from prism_meta.data.support import SupportEpisodes
from prism_meta.errors import ConfigError

FLAIR = torch.tensor([True, False, False, False])
PAIR = torch.tensor([True, False, True, False])


def support(cases: list[CachedCase], subset: torch.Tensor, **options: Any) -> SupportEpisodes:
    return SupportEpisodes(
        cases, subset, **{"patch": (8, 9), "batch_size": 5, "steps": 20, **options}
    )


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_batch_has_every_case_as_often_as_the_others(
    pool: list[CachedCase], count: int
) -> None:
    data = support(pool[:count], PAIR)
    for t in range(len(data)):
        train, meta = data[t]
        drawn = Counter(train.case_ids)
        assert set(drawn) == {case.id for case in pool[:count]}
        assert max(drawn.values()) - min(drawn.values()) <= 1
        assert (train.mask == PAIR).all() and (meta.mask == PAIR).all()
        assert len(train.image) == 5 and len(meta.image) == 1
        assert not train.image[:, ~PAIR].any()


def test_hidden_modalities_are_not_read(
    pool: list[CachedCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = support(pool[:2], PAIR, augmentation=Augmentation(2))
    _ = data[0]  # centres are read once
    read: list[str] = []
    record_slices(monkeypatch, read)
    cache._open.cache_clear()
    _ = [data[t] for t in range(5)]
    cache._open.cache_clear()
    assert set(read) == {"image_0", "image_2", "target"}


def test_a_batch_depends_on_the_seed_and_its_number_only(pool: list[CachedCase]) -> None:
    options = {"augmentation": Augmentation(2), "seed": 3}
    first, second = (support(pool[:3], FLAIR, **options) for _ in range(2))
    _ = first[0], first[7]
    assert torch.equal(first[4][0].image, second[4][0].image)
    assert not torch.equal(
        first[4][0].image, support(pool[:3], FLAIR, **{**options, "seed": 4})[4][0].image
    )


def test_all_faults_are_told_together(pool: list[CachedCase]) -> None:
    assert faults_of(lambda: support([], FLAIR), ConfigError) == (
        "cases: got none, expected at least one labelled case; add cases",
    )
    assert faults_of(lambda: support([pool[0], pool[3], pool[5]], PAIR), ConfigError) == (
        "case p3: has no modality 0+2 of the subset, counted from 0; leave it out of the subset, or leave "
        "the case out",
        "case p5: has no modality 0 of the subset, counted from 0; leave it out of the subset, or leave "
        "the case out",
    )
