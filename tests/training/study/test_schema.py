"""Study files: every fault is named with its fix, all of them together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prism_meta.errors import ConfigError
from prism_meta.training.study.schema import Study, read_study

START = '[[methods]]\nname = "one"\n'


def _faults(tmp_path: Path, text: str) -> tuple[str, ...]:
    path = tmp_path / "study.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_study(path)
    return error.value.faults


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[phantoms]\n", "methods: got none, expected at least one; add a section [[methods]]"),
        (
            START,
            "data, phantoms: got both or neither; give a folder of cases, or the section phantoms",
        ),
        (
            START + "settings.data.batch_size = 0\n[phantoms]\n",
            "methods, one: data.batch_size: got 0, expected a number >= 1; e.g. data.batch_size = 8",
        ),
        (
            START + "settings.training.steps = 5\n[phantoms]\n",
            "methods, one: training.steps is set by the study for each run; leave it out",
        ),
        (START + "[phantoms]\n" + START, "methods: 'one' occurs twice; give each its own name"),
        (
            'reference = "two"\n' + START + "[phantoms]\n",
            "reference: got 'two', expected one of one; name one of them",
        ),
        (
            'data = "cases"\n' + START,
            "folds: real cases need a number of folds, e.g. folds = 5; give it",
        ),
        (
            "folds = 3\n" + START + "[phantoms]\n",
            "folds: phantoms are tested on phantoms.test others; leave folds out",
        ),
        ("[[methods]]\n[phantoms]\n", "methods: lacks name; give it"),
        ("sedes = 3\n" + START + "[phantoms]\n", "sedes: unknown key; did you mean seeds?"),
        (
            "seeds = 0\n" + START + "[phantoms]\n",
            "seeds: got 0, expected a number >= 1; e.g. seeds = 10",
        ),
        (
            '[[methods]]\nname = "a/b"\n[phantoms]\n',
            "methods: got 'a/b', expected a short name without / \\ and |; give another",
        ),
        (
            START + '"search"."training.lr" = [1, -1]\n[phantoms]\n',
            "methods, one: training.lr: got -1, expected a number > 0; e.g. training.lr = 0.01",
        ),
        (
            START + 'baseline = "best"\n[phantoms]\n',
            "methods, one: baseline: got 'best', expected one of ",
        ),
    ],
)
def test_faults(tmp_path: Path, text: str, fault: str) -> None:
    found = _faults(tmp_path, text)
    assert any(each.startswith(fault) for each in found), found


def test_all_faults_come_together(tmp_path: Path) -> None:
    found = _faults(tmp_path, "folds = 3\n" + START + START + "[phantoms]\n")
    assert len(found) == 2


def _study(**more: Any) -> Study:
    return Study.model_validate({"phantoms": {}, "methods": [{"name": "one"}], **more})


def test_a_method_comes_after_its_condition_and_the_common_settings() -> None:
    study = _study(
        settings={"model": {"width": 4, "depth": 2}, "training": {"lr": 0.5}},
        conditions=[{"name": "wide", "settings": {"model": {"width": 16}}}],
        methods=[
            {
                "name": "one",
                "baseline": "zero_fill",
                "settings": {"model": {"depth": 3}},
                "search": {"training.lr": [0.1, 0.2]},
            }
        ],
    )
    [method], [condition] = study.methods, study.conditions
    config = study.config(method, condition, {"training.lr": 0.2}, seed=7)
    assert (config.model.network, config.model.width, config.model.depth) == ("unet", 16, 3)
    assert (config.training.lr, config.seed) == (0.2, 7)


def test_the_grid_is_the_product_of_both_searches() -> None:
    study = _study(
        search={"keys": {"training.lr": [1.0, 2.0]}},
        methods=[{"name": "one", "search": {"training.warmup": [3, 4]}}, {"name": "two"}],
    )
    assert len(study.grid(study.methods[0])) == 4 and len(study.grid(study.methods[1])) == 2
    assert _study().grid(study.methods[1]) == []


def test_the_first_method_is_the_reference() -> None:
    assert _study().first.name == "one"
