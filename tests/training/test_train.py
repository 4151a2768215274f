"""``train``: the command's twin in Python, with objects of the user's own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import SMALL, errors, run
from monai.networks.nets.unet import UNet
from torch import nn

import prism_meta as pm
from prism_meta.bilevel.strategies import ALL_STRATEGIES
from prism_meta.bilevel.strategies.registry import register_strategy
from prism_meta.data.cache import prepare
from prism_meta.errors import ConfigError
from prism_meta.training.build import build_strategy
from prism_meta.training.config.meta import MetaConfig


def small(*more: str) -> pm.Config:
    return pm.load_config(overrides=[*SMALL, *more])


def unet() -> nn.Module:
    torch.manual_seed(1)
    return pm.wrap(UNet(2, 4, 4, channels=(4, 8), strides=(2,)))


def test_it_writes_what_the_command_writes(cases: Path, tmp_path: Path) -> None:
    settings = (*SMALL, 'data.test_cases=["p3"]', "meta.strategy=second_order")
    options = [part for setting in settings for part in ("--set", setting)]
    assert run("train", cases, "--out", tmp_path / "a", *options)[0] == 0
    trained = pm.train(
        cases, pm.load_config(overrides=settings), out=tmp_path / "b", progress=False
    )
    for name in ("weights/last.safetensors", "metrics.jsonl", "config.toml"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert trained.run is not None and trained.run.history() == trained.history
    assert [case.id for case in trained.test] == ["p3"]
    # The run's predictor and the command agree.
    records = trained.run.predictor("cpu").evaluate(trained.test)
    assert records == trained.predictor.evaluate(trained.test) and len(records) == 45
    assert run("evaluate", tmp_path / "b")[0] == 0
    rows = (tmp_path / "b" / "evaluation" / "records.csv").read_text().splitlines()
    assert len(rows) == 1 + len(records)


def test_objects_of_ones_own_replace_the_configured_ones(cases: Path, tmp_path: Path) -> None:
    model = unet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inner = pm.PrismObjective(unimodal=False)
    seen: list[tuple[str, ...]] = []

    def objective(forward: Any, batch: pm.Batch) -> Any:
        seen.append(batch.case_ids)
        return inner(forward, batch)

    listed = pm.load_cases(cases)
    trained = pm.train(
        listed,
        small("data.holdout=1"),
        out=tmp_path / "run",
        model=model,
        objective=objective,
        strategy=pm.SecondOrder(pm.SGD(0.1), steps=2),
        progress=False,
    )
    assert trained.model is model and seen and set(trained.history[0]["terms"]) == {"fuse", "prm"}
    assert any(not torch.equal(value, before[n]) for n, value in model.state_dict().items())
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["own"] == {
        "model": "WrappedNet", "objective": "function", "strategy": "SecondOrder"
    }  # fmt: skip
    # Another process has the weights, and gives the net.
    opened = pm.Run.open(tmp_path / "run")
    with pytest.raises(pm.PrismError, match=r"a model of its own \(WrappedNet\)"):
        opened.predictor()
    (case,) = trained.test
    again = opened.predictor("cpu", model=unet()).predict(case, subset="flair+t1")
    np.testing.assert_array_equal(again, trained.predictor.predict(case, subset="flair+t1"))
    code, output = run("train", "--resume", tmp_path / "run")
    assert code == 2 and "resume it there with prism_meta.train" in errors(output)[0]


def test_prepared_cases_and_datasets_train_too(cases: Path, tmp_path: Path) -> None:
    cached = prepare(
        pm.load_cases(cases),
        tmp_path,
        preprocessing=pm.Preprocessing((1.0, 1.0, 1.0)),
        labels=pm.BRATS_LABELS,
    )
    first = pm.train(cached, small(), progress=False)
    whole = pm.train(cases, small(), progress=False)
    assert first.history == whole.history and first.run is None and first.test == ()
    episodes = pm.Episodes(cached, patch=(16, 16), batch_size=2, steps=3)
    assert len(pm.train(episodes, small(), progress=False).history) == 3
    pairs = [episodes[t] for t in range(2)]
    assert len(pm.train(pairs, small(), progress=False).history) == 2  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^objective.weighting: preference depends on the cases"):
        pm.train(pairs, small("objective.weighting=preference"), progress=False)  # type: ignore[arg-type]


def test_a_run_resumes_in_python(cases: Path, tmp_path: Path) -> None:
    trained = pm.train(cases, small(), out=tmp_path / "run", model=unet(), progress=False)
    assert trained.run is not None
    weights = trained.run.weights().read_bytes()
    trained.run.weights().unlink()
    again = pm.train(cases, out=tmp_path / "run", model=unet(), resume=True, progress=False)
    assert again.history == [] and trained.run.weights().read_bytes() == weights
    with pytest.raises(ConfigError, match=r"^config: differs from that of the run in"):
        pm.train(cases, small("seed=3"), out=tmp_path / "run", resume=True)
    with pytest.raises(pm.PrismError, match="holds a run already"):
        pm.train(cases, small(), out=tmp_path / "run")
    with pytest.raises(pm.PrismError, match=r"^resume: needs out"):
        pm.train(cases, small(), resume=True)


def test_what_does_not_fit_is_refused_before_any_work(cases: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^model: got Conv2d, .* pm\.wrap\(net\)$"):
        pm.train(cases, small(), out=tmp_path / "a", model=nn.Conv2d(4, 4, 1))
    with pytest.raises(ValueError, match=r"^patch: got \(16, 16\), expected 3 numbers"):
        pm.train(cases, small(), out=tmp_path / "a", model=pm.PrismNet(width=1))
    with pytest.raises(ConfigError, match=r"^cases: case p0 has the modalities flair, t1, but"):
        pm.train(pm.load_cases(cases, ("flair", "t1")), small(), out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_bars_are_on_standard_error_and_have_a_switch(
    cases: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pm.train(cases, small(), progress=False)
    assert capsys.readouterr() == ("", "")
    pm.train(cases, small())
    shown = capsys.readouterr()
    assert shown.out == "" and "train" in shown.err


# ---------------------------------------------------------------- strategies from the registry


@pytest.fixture
def toy() -> Iterator[type[pm.MetaStrategy]]:
    class Toy(pm.FirstOrder):
        """First order with an option that a configuration has."""

        name = "toy_strategy"
        options = ("proximal",)

        def __init__(self, inner: Any, steps: int = 1, *, proximal: float = 0.0) -> None:
            super().__init__(inner, steps)
            self.proximal = proximal

    register_strategy(Toy)
    yield Toy
    ALL_STRATEGIES.remove(Toy)


def test_a_registered_class_is_chosen_by_its_name(
    cases: Path, toy: type[pm.MetaStrategy], tmp_path: Path
) -> None:
    config = small("meta.strategy=toy_strategy", "meta.proximal=2.5", "meta.inner_steps=3")
    built: Any = build_strategy(config.meta, torch.tensor(0.1), weight_decay=0.0)
    assert (type(built), built.proximal, built.steps) == (toy, 2.5, 3)
    options = [part for s in (*SMALL, "meta.strategy=toy_strategy") for part in ("--set", s)]
    assert run("train", cases, "--out", tmp_path / "run", *options)[0] == 0


def test_an_option_that_a_configuration_lacks_is_named(toy: Any) -> None:
    toy.options = ("radius",)
    with pytest.raises(ConfigError) as caught:
        small("meta.strategy=toy_strategy")
    assert caught.value.faults == (
        "meta: strategy: toy_strategy has the options radius, which are no keys of a configuration; "
        "pass the strategy as an object to prism_meta.train",
    )


def test_an_unknown_strategy_lists_the_known_ones_with_a_guess() -> None:
    names = ", ".join(kind.name for kind in ALL_STRATEGIES)
    message = (
        f"meta.strategy: got 'secondorder', expected one of {names}; did you mean second_order?"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        small("meta.strategy=secondorder")


@pytest.mark.parametrize("kind", ALL_STRATEGIES, ids=lambda kind: kind.name)
def test_every_strategy_is_built_with_its_options(kind: type[pm.MetaStrategy]) -> None:
    config = MetaConfig(
        strategy=kind.name, inner_steps=2 if kind.adapts else 1, proximal=3.0, cg_steps=4
    )
    built: Any = build_strategy(config, torch.tensor(0.1), weight_decay=0.0)
    assert type(built) is kind
    assert {name: getattr(built, name) for name in kind.options} == {
        name: getattr(config, name) for name in kind.options
    }
    if kind.adapts:
        assert (built.steps, float(built.inner.lr)) == (2, pytest.approx(0.1))


def test_library_and_configuration_have_the_same_defaults() -> None:
    data, config = pm.Config().data, pm.Config()
    assert pm.Preprocessing().spacing == data.spacing == (2.0, 2.0, 2.0)
    predictor = pm.Predictor(pm.PrismNet(spatial_dims=2, width=1))
    assert predictor.windows.patch == data.patch
    assert predictor.windows.overlap == config.evaluation.overlap
