"""Which runs a study asks for: searches first, then equal gradients, then equal time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prism_meta.training.study.jobs import Job, Plan
from prism_meta.training.study.results import Result, Results
from prism_meta.training.study.schema import Study

SINGLE = {"meta": {"strategy": "single_level"}}
SECOND = {"meta": {"strategy": "second_order"}}


def _study(**more: Any) -> Study:
    methods = [{"name": "one", "settings": SINGLE}, {"name": "two", "settings": SECOND}]
    return Study.model_validate(
        {
            "phantoms": {"train": 4, "test": 2},
            "methods": methods,
            "seeds": 2,
            "evaluations": 40,
            **more,
        }
    )


def _made(results: Results, job: Job, *, seconds: float = 1.0, validation: float = 0.5) -> None:
    scores = {"p1": {"t1": 0.5}}
    results.append(
        Result(job.key, job.title, job.config.training.steps, 1, seconds, 0, scores, validation)
    )


def test_equal_gradients_are_fewer_steps_of_a_dearer_strategy(tmp_path: Path) -> None:
    jobs = Plan(_study(), Results(tmp_path)).jobs()
    steps = {(job.method, job.seed): job.config.training.steps for job in jobs}
    assert steps == {("one", 0): 40, ("one", 1): 40, ("two", 0): 10, ("two", 1): 10}
    assert {job.evaluations for job in jobs} == {40}


def test_a_batch_of_twice_the_size_counts_twice(tmp_path: Path) -> None:
    double = {"name": "joint", "settings": {**SINGLE, "data": {"batch_size": 16}}}
    study = _study(methods=[{"name": "one", "settings": SINGLE}, double])
    steps = {job.method: job.config.training.steps for job in Plan(study, Results(tmp_path)).jobs()}
    assert steps == {"one": 40, "joint": 20}


def test_equal_time_follows_the_pairs_of_the_first_three_seeds(tmp_path: Path) -> None:
    results = Results(tmp_path)
    plan = Plan(_study(seeds=4), results)
    # The second seed ran while the machine was busy, and the fourth does not count.
    own, reference = (5.0, 90.0, 4.0, 900.0), (2.0, 3.0, 2.0, 1.0)
    for job in plan.due():
        known = any(each.stage == "time" for each in plan.jobs())
        assert known == (job.seed == 3)
        _made(results, job, seconds=(reference if job.method == "one" else own)[job.seed])
    [first, *others] = plan.due()
    assert (first.method, first.stage, first.seed) == ("two", "time", 0)
    assert [job.seed for job in others] == [1, 2, 3]
    assert first.config.training.steps == 4  # 10 steps took 2.5 times as long
    for job in plan.due():
        _made(results, job)
    assert plan.due() == []


def test_runs_of_nearly_the_same_time_are_one(tmp_path: Path) -> None:
    results = Results(tmp_path)
    plan = Plan(_study(), results)
    for job in plan.due():
        _made(results, job, seconds={"one": 2.0, "two": 2.08}[job.method])
    assert plan.due() == []
    assert [(job.seed, job.stage) for job in plan.compared() if job.method == "two"] == [
        (0, "evaluations"), (0, "time"), (1, "evaluations"), (1, "time"),
    ]  # fmt: skip


def test_a_search_comes_first_and_its_best_point_is_used(tmp_path: Path) -> None:
    study = _study(
        search={"keys": {"training.lr": [0.01, 0.001]}, "validation": 1, "evaluations": 8},
        equal_time=False,
    )
    results = Results(tmp_path)
    plan = Plan(study, results)
    searches = plan.due()
    assert [job.stage for job in searches] == ["search"] * 4
    assert {job.config.validation.cases for job in searches} == {1}
    assert min(job.seed for job in searches) >= 10_000
    assert {job.config.training.steps for job in searches} == {8, 2}
    _made(results, searches[0], validation=0.2)
    assert all(job.stage == "search" for job in plan.due())
    for job in searches[1:]:
        _made(results, job, validation=0.9 if job.point["training.lr"] == 0.001 else 0.1)
    due = plan.due()
    assert {job.config.training.lr for job in due} == {0.001}
    assert len(due) == 4 and {job.config.validation.cases for job in due} == {0}
    # No run of the comparison is one of the search, even if all its settings are.
    assert not {job.key for job in due} & {job.key for job in searches}


def test_folds_test_every_case_once_per_seed(tmp_path: Path) -> None:
    study = _study(phantoms=None, data=str(tmp_path), folds=3, seeds=1)
    found = [
        (job.config.data.fold, job.config.data.folds)
        for job in Plan(study, Results(tmp_path)).jobs()
    ]
    assert sorted(found) == [(0, 3), (0, 3), (1, 3), (1, 3), (2, 3), (2, 3)]


def test_equal_configurations_are_one_run(tmp_path: Path) -> None:
    study = _study(methods=[{"name": "a", "settings": SINGLE}, {"name": "b", "settings": SINGLE}])
    plan = Plan(study, Results(tmp_path))
    assert len(plan.jobs()) == 2 and len(plan.compared()) == 4


def test_a_key_at_its_default_changes_no_result(tmp_path: Path) -> None:
    explicit = {"name": "one", "settings": {**SINGLE, "training": {"weight_decay": 1e-4}}}
    keys = [
        {job.key for job in Plan(_study(methods=[method]), Results(tmp_path)).jobs()}
        for method in ({"name": "one", "settings": SINGLE}, explicit)
    ]
    assert keys[0] == keys[1]


@pytest.mark.parametrize(
    ("strategy", "options", "count"),
    [
        ("single_level", {}, 1),
        ("joint", {}, 2),
        ("first_order", {"inner_steps": 3}, 4),
        ("second_order", {"inner_steps": 3}, 10),
        ("finite_difference", {"inner_steps": 3}, 10),
        ("reptile", {"inner_steps": 3}, 3),
        ("implicit", {"inner_steps": 2, "cg_steps": 4}, 25),
        ("first_order", {"episodes": 2}, 4),
    ],
)
def test_gradients_of_a_step(
    tmp_path: Path, strategy: str, options: dict[str, int], count: int
) -> None:
    method = {"name": "one", "settings": {"meta": {"strategy": strategy, **options}}}
    [job, *_] = Plan(_study(methods=[method], evaluations=count * 7), Results(tmp_path)).jobs()
    assert (job.config.training.steps, job.evaluations) == (7, 7 * count)
