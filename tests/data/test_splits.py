"""Splits: no patient in two sets, every availability in each, and folds that a file names."""

from __future__ import annotations

import json
from pathlib import Path

import layouts
import niftis
import pytest
import torch
from commands import SMALL, errors, run, settings
from helpers import faults_of

import prism_meta as pm
from prism_meta.data.availability import draw_availability
from prism_meta.data.cases import Case
from prism_meta.data.splits import draw_folds, draw_holdout, read_folds
from prism_meta.errors import ConfigError
from prism_meta.training.build import build_episodes, build_fabric
from prism_meta.training.processes.agreement import Processes
from prism_meta.training.setup.cases import load_configured, prepare_configured
from prism_meta.training.setup.splitting import split

NAMES = ("flair", "t1ce", "t1", "t2")


def made(
    count: int, *, each: int = 1, sites: int = 0, rates: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
) -> list[Case]:
    """Cases with missing files; a patient has ``each``, and the sites take turns by patient."""
    rows = draw_availability(count, rates).tolist()
    return [
        Case(
            f"c{k:03d}",
            NAMES,
            files={n: Path(n) for n, there in zip(NAMES, rows[k], strict=True) if there},
            patient=f"p{k // each}",
            site=f"s{k // each % sites}" if sites else None,
        )
        for k in range(count)
    ]


def sets_of(cases: list[Case], folds: list[list[str]], key: str) -> list[set[str]]:
    by_id = {case.id: getattr(case, key) for case in cases}
    return [{by_id[name] for name in fold} for fold in folds]


def shares(cases: list[Case], names: list[str]) -> torch.Tensor:
    chosen = [case.availability.double() for case in cases if case.id in names]
    return torch.stack(chosen).mean(0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("each", "sites"), [(1, 0), (3, 0), (2, 12)])
@pytest.mark.parametrize("count", [2, 5])
def test_folds_are_a_partition_without_shared_groups(
    count: int, each: int, sites: int, seed: int
) -> None:
    cases = made(120, each=each, sites=sites)
    by = "site" if sites else "patient"
    folds = draw_folds(cases, count, by=by, seed=seed)  # type: ignore[arg-type]
    assert sorted(name for fold in folds for name in fold) == [case.id for case in cases]
    for key in ("patient", by):
        groups = sets_of(cases, folds, key)
        assert sum(map(len, groups)) == len(set().union(*groups))
    sizes = [len(fold) for fold in folds]
    assert max(sizes) - min(sizes) <= (120 // sites if sites else 0)
    assert draw_folds(cases, count, by=by, seed=seed) == folds  # type: ignore[arg-type]
    assert draw_folds(cases, count, by=by, seed=seed + 9) != folds  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 7])
def test_sizes_differ_by_one_at_most(count: int) -> None:
    sizes = [len(fold) for fold in draw_folds(made(23), count)]
    assert max(sizes) - min(sizes) <= 1


def test_folds_and_holdouts_have_every_availability() -> None:
    cases = made(100)
    rates = torch.tensor([0.8, 0.6, 0.4, 0.2], dtype=torch.float64)
    for fold in draw_folds(cases, 5):
        assert len(fold) == 20
        assert (shares(cases, fold) - rates).abs().max() <= 0.051  # one case in 20
    held = draw_holdout(cases, 20)
    assert (shares(cases, held) - rates).abs().max() <= 0.051
    random = [
        (shares(cases, draw_holdout(made(100, rates=(0.0,) * 4), 20, seed=s)) - rates).abs().max()
        for s in range(20)
    ]
    assert max(random) > 0.1, "the bound would fail if the draw did not look at availability"


def test_the_table_can_stand_for_the_files() -> None:
    cases = made(40, rates=(0.0,) * 4)
    table = {case.id: (True, k % 4 == 0, True, True) for k, case in enumerate(cases)}
    for fold in draw_folds(cases, 5, availability=table):
        assert sum(table[name][1] for name in fold) == 2


def test_held_out_cases_are_whole_patients_and_sites() -> None:
    cases = made(30, each=3, sites=5)
    held = draw_holdout(cases, 6)
    (patients,) = sets_of(cases, [held], "patient")
    assert len(held) == 6 and len(patients) == 2
    assert len(draw_holdout(cases, 7)) == 9, "a patient is not divided"
    held = draw_holdout(cases, 4, by="site")
    assert len(held) == 6 and sets_of(cases, [held], "site") == [{cases[int(held[0][1:])].site}]
    assert draw_holdout(cases, 0) == []
    with pytest.raises(ConfigError, match=r"^leaves no patient of 6 cases to train on; hold fewer"):
        draw_holdout(made(6, each=6), 2)


def test_patients_of_two_sites_join_them() -> None:
    cases = [
        Case(name, ("t1",), files={"t1": Path("x")}, patient=patient, site=site)
        for name, patient, site in (
            ("a", "x", "A"),
            ("b", "x", "B"),
            ("c", "y", "B"),
            ("d", "z", "C"),
        )
    ]
    folds = draw_folds(cases, 2, by="site")
    assert sorted(folds) == [["a", "b", "c"], ["d"]]
    with pytest.raises(
        ConfigError, match=r"^got 3 folds for 2 sites, expected at most one for each"
    ):
        draw_folds(cases, 3, by="site")


@pytest.mark.parametrize("seed", range(5))
def test_every_fold_has_cases_whatever_the_sizes(seed: int) -> None:
    sizes = (9, 1, 1, 1)
    cases = [
        Case(f"{p}{k}", ("t1",), files={"t1": Path("x")}, patient=str(p))
        for p, size in enumerate(sizes)
        for k in range(size)
    ]
    assert sorted(map(len, draw_folds(cases, 4, seed=seed))) == [1, 1, 1, 9]
    assert sorted(map(len, draw_folds(cases, 2, seed=seed))) == [3, 9]


def test_folds_of_a_file(tmp_path: Path) -> None:
    cases = made(6, each=2)
    path = tmp_path / "folds.json"
    path.write_text(json.dumps([["c000", "c001"], ["c002", "c003", "c004", "c005"]]))
    assert read_folds(path, cases)[0] == ["c000", "c001"]
    path.write_text(json.dumps({"folds": [["c000", "c001", "c002"], ["c003", "c000", "c009"]]}))
    assert faults_of(lambda: read_folds(path, cases)) == (
        f"case c000: is 2 times in {path}; keep one",
        f"case c009: is in {path}, but there is no such case; remove it there, or add the case",
        f"case c004: is in no fold of {path}; add it to one",
        f"case c005: is in no fold of {path}; add it to one",
        f"patient p0: has cases in the folds 0, 1 of {path}, expected one fold; move them together",
        f"patient p1: has cases in the folds 0, 1 of {path}, expected one fold; move them together",
    )
    for wrong in ("3", "[]", "[[]]", '[["a"]]', '[["a"], [1]]', '{"folds": {}}'):
        path.write_text(wrong)
        (fault,) = faults_of(lambda: read_folds(path, cases))
        assert fault.startswith(f"{path}: has no list of folds, expected at least two")


# Through the command


def trained(folder: Path, root: Path, out: str, *options: str) -> tuple[int, str]:
    names = 'data.modalities=["flair", "t1ce"]'
    return run("train", root, "--out", folder / out, *settings("training.steps=2", names, *options))


def test_a_run_writes_its_folds_and_another_can_use_them(tmp_path: Path) -> None:
    root = layouts.LAYOUTS["BraTS 2018-2021"].write(tmp_path / "data")
    code, output = trained(tmp_path, root, "a", "data.folds=3", "data.fold=1", "seed=4")
    assert code == 0, output
    written = json.loads((tmp_path / "a" / "folds.json").read_text())
    assert (written["by"], written["seed"], written["fold"]) == ("patient", 4, 1)
    assert sorted(name for fold in written["folds"] for name in fold) == ["p0", "p1", "p2"]
    facts = json.loads((tmp_path / "a" / "run.json").read_text())
    assert facts["test"] == written["folds"][1]
    assert set(facts["train"]) == {*written["folds"][0], *written["folds"][2]}
    path = f"data.folds='{tmp_path / 'a' / 'folds.json'}'"
    assert trained(tmp_path, root, "b", path, "data.fold=2")[0] == 0
    again = json.loads((tmp_path / "b" / "folds.json").read_text())
    assert (again["folds"], again["fold"]) == (written["folds"], 2)
    code, output = run("train", "--resume", tmp_path / "a", "--extend", 1)
    assert code == 0, output
    code, output = trained(tmp_path, root, "c", path, "data.fold=3")
    assert code == 2 and errors(output) == [
        "got fold 3, expected at most 2, because there are 3 folds; give another (set data.fold)"
    ]


def test_a_patient_is_never_in_both_sets(tmp_path: Path) -> None:
    root = layouts.LAYOUTS["CSV"].write(tmp_path / "data")  # p0 and p1 are of patient x, at site A
    for by in ("patient", "site"):
        config = pm.load_config(
            overrides=[
                'data.modalities=["flair", "t1ce"]',
                "data.holdout=1",
                f"data.split={by}",
            ]
        )
        made = split(config, load_configured(config, root))
        assert [case.id for case in made.test] == ["p2"]
        assert [case.id for case in made.training] == ["p0", "p1"]
    # A patient is never in both batches of an episode either.
    code, output = trained(tmp_path, root, "a", "data.holdout=1")
    assert code == 2 and errors(output) == [
        "2 training cases of one patient: an episode needs at least 2, because its train and meta batch "
        "come from different patients; add cases or hold fewer out (set data.holdout)"
    ]
    code, output = trained(tmp_path, root, "b", 'data.test_cases=["p0"]')
    assert code == 2 and errors(output) == [
        "data.test_cases: patient x has cases in both sets (p1, p0); hold out all cases of the patient, "
        "or none"
    ]


def test_the_two_batches_have_rates_of_their_own(tmp_path: Path) -> None:
    root = niftis.write_cases(tmp_path / "data", 4)
    options = ["data.missing_rates=[0,0,0.5,0.5]", "data.meta_missing_rates=[0.5,0.5,0,0]"]
    masks = ["masks.train=static", "masks.meta=static", "training.augment=false"]
    config = pm.load_config(overrides=[*SMALL, *options, *masks])
    split_cases = split(config, pm.load_cases(root))
    assert split_cases.meta is not None
    train = {case.id: case.availability for case in split_cases.training}
    meta = {case.id: case.availability for case in split_cases.meta}
    assert torch.stack(list(train.values())).sum(0).tolist() == [4, 4, 2, 2]
    assert torch.stack(list(meta.values())).sum(0).tolist() == [2, 2, 4, 4]
    processes = Processes(build_fabric(config.fabric))
    cached = prepare_configured(
        config,
        split_cases.training,
        tmp_path / "cache",
        meta=split_cases.meta,
        processes=processes,
        on_case=lambda done, total, name: None,
    )
    episodes = build_episodes(config, cached)
    for step in range(4):
        for batch, rows in zip(episodes[step], (train, meta), strict=True):
            expected = torch.stack([rows[name] for name in batch.case_ids])
            assert torch.equal(batch.mask, expected)
            shown = batch.image.flatten(2).abs().sum(2) > 0
            assert torch.equal(shown, expected), "what is shown was read"
    assert run("train", root, "--out", tmp_path / "run", *settings(*options, *masks))[0] == 0
