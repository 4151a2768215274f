"""The methods to compare with: what each configuration is, and that the command trains it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from commands import errors, run, settings
from monai.networks.nets.unet import UNet

import prism_meta
from prism_meta.bilevel.strategies import FirstOrder, MetaStrategy, SecondOrder, SingleLevel
from prism_meta.data.masking import DynamicMask, MaskPolicy, StaticMask
from prism_meta.errors import ConfigError
from prism_meta.networks.conditioned import ConditionedNet
from prism_meta.networks.prism import PrismNet
from prism_meta.networks.wrapped import WrappedNet
from prism_meta.objective import losses
from prism_meta.objective.weighting import RelativePreference
from prism_meta.training.build import build_masks, build_model, build_objective, build_strategy
from prism_meta.training.config import Config, load_config
from prism_meta.training.config.baselines import BASELINES, read_baseline

RATES = (0.2, 0.4, 0.6, 0.8)
#: Name: network, masks, whether the unimodal branches are trained, strategy.
EXPECTED: dict[str, tuple[type[torch.nn.Module], type[MaskPolicy], bool, type[MetaStrategy]]] = {
    "zero_fill": (WrappedNet, StaticMask, False, SingleLevel),
    "modality_dropout": (WrappedNet, DynamicMask, False, SingleLevel),
    "conditioned_unet": (ConditionedNet, DynamicMask, False, SingleLevel),
    "passion": (PrismNet, StaticMask, True, SingleLevel),
    "prism": (PrismNet, DynamicMask, True, SingleLevel),
    "meta_drop_first_order": (PrismNet, DynamicMask, True, FirstOrder),
    "meta_drop_second_order": (PrismNet, DynamicMask, True, SecondOrder),
    "brats2020": (PrismNet, DynamicMask, True, FirstOrder),
}


def test_every_file_of_the_package_is_a_baseline() -> None:
    folder = Path(prism_meta.__file__).parent / "training" / "config" / "baselines"
    assert {path.stem for path in folder.glob("*.toml")} == set(BASELINES) == set(EXPECTED)


#: Three cases are too few for the rates of the protocol.
FEW = {"brats2020": ("data.missing_rates=[0.0, 0.3, 0.3, 0.3]",)}


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_what_it_says(name: str) -> None:
    config = load_config(baseline=name)
    network, masks, unimodal, strategy = EXPECTED[name]
    assert type(build_model(config)) is network
    assert [type(policy) for policy in build_masks(config.masks, RATES)] == [masks] * 2
    assert build_objective(config.objective, RATES).unimodal is unimodal
    assert type(build_strategy(config.meta, torch.tensor(0.05), weight_decay=0.0)) is strategy
    assert load_config(baseline=name) == Config.model_validate(read_baseline(name))


def test_meta_drop_differs_in_the_strategy_alone() -> None:
    first, second, single = (
        read_baseline(name) for name in ("meta_drop_first_order", "meta_drop_second_order", "prism")
    )
    assert first.pop("meta") == {"strategy": "first_order"}
    assert second.pop("meta") == {"strategy": "second_order"}
    assert single.pop("meta") == {"strategy": "single_level"}
    assert first == second == single


@pytest.mark.parametrize("patch", [(32, 32), (16, 16, 16)])
def test_the_unet_has_the_size_and_the_norm_of_the_config(patch: tuple[int, ...]) -> None:
    sizes = [f"data.patch={list(patch)}", "model.width=2", "model.depth=3"]
    model = build_model(load_config(overrides=sizes, baseline="zero_fill"))
    assert isinstance(model, WrappedNet) and isinstance(model.net, UNet)
    assert model.modalities == ("flair", "t1ce", "t1", "t2")
    assert (model.net.channels, model.net.dimensions) == ([2, 4, 8], len(patch))
    kinds = {type(module).__name__ for module in model.modules()}
    assert f"InstanceNorm{len(patch)}d" in kinds and not any("BatchNorm" in k for k in kinds)
    image, mask = torch.randn(2, 4, *patch), torch.tensor([[True] * 4, [False, True] * 2])
    assert model(image, mask, unimodal=False).fused.shape == (2, 4, *patch)


def test_a_patch_that_the_unet_cannot_halve_is_refused() -> None:
    expected = (
        "data.patch: the U-Net halves it 3 times; give multiples of 8, one of them larger, or a "
        "smaller model.depth"
    )
    for patch in ("[96, 92]", "[8, 8]"):  # the second leaves InstanceNorm a single voxel
        with pytest.raises(ConfigError, match=f"^{re.escape(expected)}$"):
            load_config(overrides=[f"data.patch={patch}"], baseline="zero_fill")
        load_config(overrides=[f"data.patch={patch}", "model.depth=3"], baseline="zero_fill")
        load_config(overrides=[f"data.patch={patch}"], baseline="prism")


def test_the_file_and_then_the_overrides_come_after_the_baseline(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[model]\nwidth = 3\n[masks]\nmeta = "balanced"\n[training]\nsteps = 5\n')
    config = load_config(path, ["model.width=4", "data.batch_size=2"], baseline="zero_fill")
    assert (config.model.network, config.model.width) == ("unet", 4)
    assert (config.masks.train, config.masks.meta) == ("static", "balanced")
    assert (config.training.steps, config.data.batch_size) == (5, 2)
    path.write_text("model = 3\n")
    with pytest.raises(ConfigError, match=r"^model: got 3, expected a section of keys; "):
        load_config(path, baseline="zero_fill")


@pytest.mark.parametrize("name", BASELINES)
def test_the_command_trains_and_evaluates_a_baseline(
    cases: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "run"
    options = settings("training.steps=2", 'data.test_cases=["p3"]', *FEW.get(name, ()))
    assert run("train", cases, "--out", out, "--baseline", name, *options)[0] == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    unimodal = EXPECTED[name][2]
    assert ("uni" in lines[0]["terms"]) is unimodal
    written = load_config(out / "config.toml")
    assert written == load_config(None, [o for o in options if o != "--set"], baseline=name)
    assert run("evaluate", out)[0] == 0


def test_a_baseline_on_volumes(cases: Path, tmp_path: Path) -> None:
    options = settings("training.steps=1", "data.patch=[16,16,8]")
    assert run("train", cases, "-o", tmp_path / "run", "-b", "zero_fill", *options)[0] == 0


def test_passion_has_the_weights_of_the_published_script() -> None:
    config = load_config(baseline="passion")
    objective = build_objective(config.objective, RATES)
    assert isinstance(objective.weighting, RelativePreference)
    assert objective.weighting.factor.tolist() == pytest.approx([1.25, 1 / 0.6, 2.5, 5.0])
    # 0.5 times the mean over four classes is this times their sum.
    assert (objective.beta, objective.delta, objective.temperature) == (0.5 / 4, 0.1, 4.0)
    assert (objective.direction, objective.scale_decay) == ("teacher_student", True)
    assert objective.prototype is losses.prototype_similarity and objective.weighted


def test_the_protocol_of_brats_2020_takes_rates_or_a_table(tmp_path: Path) -> None:
    config = load_config(baseline="brats2020")
    assert config.data.missing_rates == RATES and config.data.patch == (80, 80, 80)
    assert config.training.steps == 300 * 219
    (tmp_path / "c.toml").write_text('[data]\navailability = "table.csv"\n')
    for path, overrides in ((tmp_path / "c.toml", []), (None, ["data.availability=table.csv"])):
        config = load_config(path, overrides, baseline="brats2020")
        assert config.data.missing_rates is None and config.data.availability is not None
    with pytest.raises(
        ConfigError, match=r"^data: missing_rates, availability: got both; leave out"
    ):
        load_config(
            None,
            ["data.availability=table.csv", "data.missing_rates=[0.1, 0.1, 0.1, 0.1]"],
            baseline="brats2020",
        )


def test_an_unknown_baseline_lists_the_known_ones(cases: Path, tmp_path: Path) -> None:
    code, output = run("train", cases, "--out", tmp_path / "run", "--baseline", "unet")
    assert (code, errors(output)) == (
        2,
        [
            "baseline: got 'unet', expected one of zero_fill, modality_dropout, conditioned_unet, passion, "
            "prism, meta_drop_first_order, meta_drop_second_order, brats2020; choose one of them"
        ],
    )
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_its_own_baseline(tmp_path: Path) -> None:
    code, output = run("train", "--resume", tmp_path, "--baseline", "prism")
    assert (code, errors(output)) == (
        2,
        [
            "train --resume: uses the run's own folder and config; leave --out, --config, --baseline, "
            "--set, --init, --fold and --folds out"
        ],
    )


def test_help_names_the_baselines() -> None:
    code, output = run("train", "--help")
    plain = re.sub(r"\x1b\[[0-9;]*m|[│\s]+", " ", output)
    assert code == 0 and all(re.search(rf"\b{name}\b", plain) for name in BASELINES)
