"""The division of the parameters between the two levels, from the configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import SMALL, errors, run, settings
from helpers import faults_of
from resuming import assert_resumed_equals

import prism_meta as pm
from prism_meta.errors import ConfigError
from prism_meta.training.build import build_model, build_owner, build_strategy
from prism_meta.training.config import load_config
from prism_meta.training.setup.check import check_configuration

DIVIDED = (
    *SMALL, "meta.strategy=first_order", "model.network=conditioned_unet",
    'meta.outer_parameters=["*films*", "*code*"]', "meta.alpha=1",
    "objective.unimodal=false",
)  # fmt: skip


def test_the_patterns_divide_the_parameters() -> None:
    config = load_config(overrides=DIVIDED)
    model = build_model(config)
    owns = build_owner(config.meta, model)
    strategy = build_strategy(config.meta, torch.tensor(0.1), weight_decay=0.0)
    assert owns is not None
    for name, _ in model.named_parameters():
        outer = name.startswith(("net.films.", "net.code."))
        assert owns(name) is outer
        assert strategy.adapt(name) is not outer  # type: ignore[attr-defined]
    assert build_owner(load_config().meta, model) is None
    one = load_config(overrides=["meta.strategy=first_order", "meta.outer_parameters=fusions.*"])
    assert one.meta.outer_parameters == ("fusions.*",)
    owns = build_owner(one.meta, build_model(one))
    assert owns is not None and owns("fusions.0.attention.weight") and not owns("decoder.head.bias")


@pytest.mark.parametrize("state", ["fresh", "carried", "shared"])
def test_a_run_with_divided_parameters_resumes(cases: Path, tmp_path: Path, state: str) -> None:
    config = load_config(
        overrides=[*DIVIDED, "meta.inner=adamw", "meta.inner_lr=0.01", f"meta.inner_state={state}"]
    )
    whole = pm.train(cases, config, out=tmp_path / "whole", progress=False)
    assert whole.run is not None
    moments = torch.load(tmp_path / "whole" / "checkpoint.pt")["optimizer"]["state"]
    names = [name for name, _ in build_model(config).named_parameters()]
    owned = {k for k, name in enumerate(names) if "films" in name or "code" in name}
    assert owned <= moments.keys() and (state == "shared" or owned == moments.keys())
    assert_resumed_equals(tmp_path / "whole", cases, config, tmp_path / "cut", calls=4 + 2)


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (
            ["meta.outer_parameters=*films*", "meta.strategy=reptile"],
            "meta: outer_parameters: reptile has no inner steps for the other parameters, or no gradient "
            "for these; use first_order or second_order, or leave it out",
        ),
        (
            ["meta.outer_parameters=*films*", "meta.strategy=joint"],
            "meta: outer_parameters: joint has no inner steps for the other parameters, or no gradient "
            "for these; use first_order or second_order, or leave it out",
        ),
        (
            ["meta.strategy=first_order", "meta.outer_parameters=*films*", "meta.alpha=0"],
            "meta: alpha, outer_parameters: with alpha 0 all parameters but these would never change; "
            "use alpha 1",
        ),
    ],
)
def test_what_does_not_go_together(overrides: list[str], fault: str) -> None:
    assert faults_of(lambda: load_config(overrides=overrides), ConfigError) == (fault,)


@pytest.mark.parametrize("pattern", ["*film*", "*"])
def test_patterns_that_divide_nothing_are_refused_before_anything_is_written(
    cases: Path, tmp_path: Path, pattern: str
) -> None:
    own = ("meta.strategy=first_order", f"meta.outer_parameters={pattern}")
    config = load_config(overrides=[*SMALL, *own])
    total = len(list(build_model(config).parameters()))
    count = total if pattern == "*" else 0
    message = (
        f"meta.outer_parameters: {pattern} fits {count} of {total} parameters of "
        "the network (encoders.0.blocks.0.0.weight, encoders.0.blocks.0.1.weight, "
        "encoders.0.blocks.0.1.bias, ...), expected some and not all; correct the patterns"
    )
    assert faults_of(lambda: check_configuration(config), ConfigError) == (message,)
    out = tmp_path / "run"
    code, output = run("train", cases, "--out", out, *settings(*own))
    assert (code, errors(output)) == (2, [message]) and not out.exists()
