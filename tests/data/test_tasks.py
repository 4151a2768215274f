"""Task episodes: one site, one static subset, and other patients in the query."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import faults_of
from niftis import write_cases

from prism_meta.data.cache import CachedCase, prepare
from prism_meta.data.labels import BRATS_LABELS
from prism_meta.data.layouts.folders import load_cases
from prism_meta.data.preprocessing import Preprocessing
from prism_meta.data.tasks import TaskEpisodes
from prism_meta.errors import ConfigError
from prism_meta.step_batches import StepBatches

#: Site, patient and modalities of each case.
TABLE = [
    ("oslo", "a", "1111"),
    ("oslo", "b", "1101"),
    ("oslo", "c", "1011"),
    ("oslo", "c", "1011"),
    ("rome", "d", "0110"),
    ("rome", "e", "0111"),
    ("bern", "f", "1000"),
    ("bern", "g", "0100"),
]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list[CachedCase]:
    root = tmp_path_factory.mktemp("tasks")
    cases = load_cases(write_cases(root / "cases", len(TABLE)))
    shown = [
        replace(case.restrict([c == "1" for c in row]), site=site, patient=patient)
        for case, (site, patient, row) in zip(cases, TABLE, strict=True)
    ]
    return prepare(
        shown, root / "cache", preprocessing=Preprocessing((1.0,) * 3), labels=BRATS_LABELS
    )


def tasks(pool: list[CachedCase], **options: Any) -> TaskEpisodes:
    return TaskEpisodes(pool, **{"patch": (8, 9), "batch_size": 4, "steps": 60, **options})


def test_the_cache_keeps_site_and_patient(pool: list[CachedCase]) -> None:
    assert [(case.site, case.patient) for case in pool] == [row[:2] for row in TABLE]


@pytest.mark.parametrize(("support", "inner_steps"), [(1, 1), (1, 3), (2, 2)])
def test_a_task_has_one_site_one_subset_and_disjoint_patients(
    pool: list[CachedCase], support: int, inner_steps: int
) -> None:
    by_id = {case.id: case for case in pool}
    data = tasks(pool, support=support, inner_steps=inner_steps)
    seen = set()
    for t in range(len(data)):
        train, meta = data[t]
        batches = list(train) if isinstance(train, StepBatches) else [train]
        assert len(batches) == inner_steps
        shown = meta.mask[0]
        supporting = {by_id[name] for batch in batches for name in batch.case_ids}
        querying = {by_id[name] for name in meta.case_ids}
        (site,) = {case.site for case in supporting | querying}
        for batch in (*batches, meta):
            assert (batch.mask == shown).all()
        assert all(not (shown & ~case.availability).any() for case in supporting | querying)
        patients = {case.patient for case in supporting}
        assert len(supporting) == len(patients) == support
        assert not patients & {case.patient for case in querying}
        # All others of the site that have the subset.
        others = {
            case for case in pool
            if case.site == site
            and case.patient not in patients
            and not (shown & ~case.availability).any()
        }  # fmt: skip
        assert querying == others
        seen.add((site, tuple(shown.tolist())))
    sites = {"oslo", "rome"} if support == 1 else {"oslo"}
    assert {site for site, _ in seen} == sites, "bern's patients have nothing in common"
    if (support, inner_steps) == (1, 1):
        # Subsets that two patients of the site have.
        oslo = {
            row for row in product((False, True), repeat=4) if any(row) and not (row[1] and row[2])
        }
        rome = {
            (False, True, True, False),
            (False, True, False, False),
            (False, False, True, False),
        }
        assert seen <= {("oslo", row) for row in oslo} | {("rome", row) for row in rome}
        assert len(seen) > 8


def test_tasks_depend_on_their_number_only(pool: list[CachedCase]) -> None:
    data, again = tasks(pool, inner_steps=2, seed=5), tasks(pool, inner_steps=2, seed=5)
    for t in (7, 0, 7):
        (first, second), meta = data[t]
        assert not torch.equal(first.image, second.image)
        assert torch.equal(first.image, again[t][0][0].image)
        assert torch.equal(meta.image, again[t][1].image)
    assert data[0][1].case_ids != data[1][1].case_ids or not torch.equal(
        data[0][1].image, data[1][1].image
    )


def test_without_sites_each_patient_is_one(pool: list[CachedCase]) -> None:
    by_id = {case.id: case for case in pool}
    data = tasks([replace(case, site=None) for case in pool], steps=40)
    mixed = 0
    for t in range(len(data)):
        train, meta = data[t]
        (patient,) = {by_id[name].patient for name in train.case_ids}
        assert patient not in {by_id[name].patient for name in meta.case_ids}
        mixed += len({by_id[name].site for name in (*train.case_ids, *meta.case_ids)}) > 1
    assert mixed > 10


def test_faults(pool: list[CachedCase]) -> None:
    assert faults_of(partial(tasks, pool, support=3), ConfigError) == (
        "no task can be drawn: 3 support cases need 4 patients of one site with the same modality, but "
        "there are at most 3; use fewer support cases",
    )
    some = [*pool[:6], replace(pool[6], site=None), pool[7]]
    (fault,) = faults_of(partial(tasks, some), ConfigError)
    assert fault == (
        "site: 1 of 8 cases name no site (p6), and task episodes need all or none; complete the column "
        "site of the manifest, or leave it out"
    )
    (fault,) = faults_of(partial(tasks, pool[:1]), ConfigError)
    assert fault.startswith("1 training case: an episode needs at least 2")


def test_paths(tmp_path: Path) -> None:
    """A case without a patient is a patient of its own."""
    case = CachedCase("p1", torch.ones(4).bool(), (1, 1, 1), tmp_path)
    assert case.patient == "p1" and case.site is None
