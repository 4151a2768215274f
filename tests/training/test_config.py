"""The configuration: what its selectors build, and what does not go together."""

from __future__ import annotations

import re
from typing import get_args

import pytest
import torch
from broken import configs

from prism_meta.errors import ConfigError
from prism_meta.networks.fusion import AttentionFusion, Fusion, MeanFusion, RegionAwareFusion
from prism_meta.networks.prism import PrismNet
from prism_meta.training.build import build_model
from prism_meta.training.config.schema import Config, ModelConfig, load_config

SMALL = ("model.width=2", "model.depth=2")
FUSIONS: dict[str, type[Fusion]] = {
    "region_aware": RegionAwareFusion,
    "mean": MeanFusion,
    "attention": AttentionFusion,
}


def test_every_fusion_is_tried() -> None:
    assert set(get_args(ModelConfig.model_fields["fusion"].annotation)) == set(FUSIONS)


@pytest.mark.parametrize("patch", ["[8, 8]", "[8, 8, 8]"], ids=["2-D", "3-D"])
@pytest.mark.parametrize("name", FUSIONS)
def test_fusion_is_that_of_the_network(name: str, patch: str) -> None:
    config = load_config(overrides=[*SMALL, f"model.fusion={name}", f"data.patch={patch}"])
    model = build_model(config)
    assert isinstance(model, PrismNet)
    assert [type(part) for part in model.fusions] == [FUSIONS[name]] * 2
    image, mask = (
        torch.randn(2, 4, *config.data.patch),
        torch.tensor([[True] * 4, [False, True] * 2]),
    )
    assert model.segment(image, mask).shape == (2, 4, *config.data.patch)


def test_region_aware_is_the_default() -> None:
    model = build_model(load_config(overrides=SMALL))
    assert {type(part) for part in model.fusions} == {RegionAwareFusion}  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["mean", "attention"])
def test_a_unet_has_no_fusion(name: str) -> None:
    expected = (
        f"model: fusion: {name} needs network = prism, because a U-Net has no fusion; leave it out"
    )
    fusion = f"model.fusion={name}"
    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}$"):
        load_config(overrides=["model.network=unet", fusion])
    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}$"):
        load_config(overrides=[fusion], baseline="zero_fill")
    load_config(overrides=["model.fusion=region_aware"], baseline="zero_fill")


def test_every_key_has_broken_values() -> None:
    sections = {name: info.annotation for name, info in Config.model_fields.items()}
    keys = {
        f"{name}.{key}"
        for name, section in sections.items()
        for key in getattr(section, "model_fields", ())
    }
    assert {"seed", *keys} == configs.KEYS
