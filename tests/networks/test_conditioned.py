"""The U-Net that is conditioned on the mask."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from commands import SMALL
from helpers import prism, randn, relative_error
from torch import Tensor, nn

import prism_meta as pm
from prism_meta.bilevel.inner import SGD
from prism_meta.bilevel.strategies import SecondOrder
from prism_meta.networks.conditioned import ConditionedNet, ConditionedUNet, FiLM, unet
from prism_meta.networks.prediction import SegmentationModel
from prism_meta.networks.wrapped import wrap
from prism_meta.training.build import build_model
from prism_meta.training.config import load_config

NAMES = ("flair", "t1ce", "t1")
MASK = torch.tensor([[True, False, True], [False, True, False]])


def net(dims: int = 2, depth: int = 3, *, trained: bool = True) -> ConditionedUNet:
    """In float64; a trained one has films that change something."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = ConditionedUNet(
            num_modalities=3, num_classes=3, spatial_dims=dims, width=2, depth=depth
        ).double()
        if trained:
            for film in made.films:
                nn.init.normal_(film.linear.weight, std=0.3)
    return made


def test_film_is_a_scale_and_a_shift_of_channels() -> None:
    film = FiLM(4, 2).double()
    nn.init.normal_(film.linear.weight)
    nn.init.normal_(film.linear.bias)
    features, code = randn(3, 2, 5, 6, seed=1), randn(3, 4, seed=2)
    values = code @ film.linear.weight.T + film.linear.bias
    for n in range(3):
        for c in range(2):
            expected = (1 + values[n, c]) * features[n, c] + values[n, 2 + c]
            torch.testing.assert_close(film(features, code)[n, c], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("dims", "depth"), [(2, 2), (2, 4), (3, 3)])
def test_with_fresh_films_it_is_the_unet_with_its_weights(dims: int, depth: int) -> None:
    made = net(dims, depth, trained=False)
    plain = unet(3, 3, dims, [2 * 2**scale for scale in range(depth)]).double()
    own = [p for name, p in made.named_parameters() if not name.startswith(("films", "code"))]
    by_scale = [*made.downs.parameters(), *made.ups.parameters(), *made.bottom.parameters()]
    assert len(own) == len(by_scale) == len(list(plain.parameters()))
    # The nested blocks of MONAI list their parts in another order: down, next scale, up.
    block = plain.get_submodule("model")
    for scale in range(depth - 1):
        down, skip, up = block.children()
        down.load_state_dict(made.downs[scale].state_dict())
        up.load_state_dict(made.ups[scale].state_dict())
        block = skip.get_submodule("submodule")
    block.load_state_dict(made.bottom.state_dict())
    image = randn(2, 3, *[16] * dims, seed=4)
    torch.testing.assert_close(made(image, MASK), plain(image), rtol=1e-12, atol=1e-12)


def test_the_mask_matters_even_where_the_image_is_zero() -> None:
    made, image = net(), torch.zeros(2, 3, 16, 16, dtype=torch.float64)
    logits = made(image, MASK)
    assert not torch.allclose(logits[0], logits[1])
    torch.testing.assert_close(made(image, MASK[[0, 0]])[1], logits[0])


def model() -> ConditionedNet:
    return ConditionedNet(net(), NAMES)


def test_it_has_the_signature_of_prism_net() -> None:
    made, image = model(), randn(2, 3, 16, 16, seed=5)
    assert isinstance(made, SegmentationModel) and made.spatial_dims == 2
    prediction = made(image, MASK)
    rows = torch.tensor([[True, False, False], [False, False, True], [False, True, False]])
    hidden = torch.where(MASK[:, :, None, None], image, 0.0)
    torch.testing.assert_close(prediction.fused, made.net(hidden, MASK))
    # A pair is the net that is shown, and told, one modality; pairs are ordered by modality.
    sample, shown = torch.tensor([0, 1, 0]), rows[[0, 2, 1]]
    alone = made.net(torch.where(shown[:, :, None, None], image[sample], 0.0), shown)
    torch.testing.assert_close(prediction.single_modality.logits, alone)
    assert torch.equal(made.segment(image, MASK), made(image, MASK, unimodal=False).fused)
    several = made.segment_subsets(image, MASK)
    for row, logits in zip(MASK, several, strict=True):
        torch.testing.assert_close(logits, made.segment(image, row.expand(2, -1)))


def test_hidden_channels_change_nothing_whatever_they_hold() -> None:
    made, image = model(), randn(2, 3, 16, 16, seed=6)
    other = torch.where(MASK[:, :, None, None], image, torch.nan)
    assert torch.equal(made.segment(image, MASK), made.segment(other, MASK))


def test_its_second_order_gradient_is_exact() -> None:
    problem = replace(prism(), model=net_of_problem())
    strategy = SecondOrder(SGD(0.1))
    result = strategy.meta_gradient(problem.model, problem.objective, problem.train, problem.meta)
    expected = oracles.second_order(problem, 0.1, 1)
    assert relative_error(result.gradient, expected) <= 1e-9
    assert all(result.gradient[f"net.films.{k}.linear.weight"].any() for k in range(2))


def net_of_problem() -> ConditionedNet:
    class Padded(ConditionedUNet):
        """The images of the problem have 7 x 6 pixels, which the U-Net cannot halve."""

        def forward(self, image: Tensor, mask: Tensor) -> Tensor:
            padded = nn.functional.pad(image, (0, 2, 0, 1))
            return super().forward(padded, mask)[..., :7, :6]

    torch.manual_seed(7)
    made = Padded(num_modalities=3, num_classes=3, spatial_dims=2, width=2, depth=2).double()
    for film in made.films:
        nn.init.normal_(film.linear.weight, std=0.3)
    return ConditionedNet(made, NAMES)


@pytest.mark.parametrize("patch", ["[16, 16]", "[16, 16, 16]"], ids=["2-D", "3-D"])
def test_the_config_builds_it(patch: str) -> None:
    sizes = [f"data.patch={patch}", "model.width=2", "model.depth=3"]
    config = load_config(overrides=["model.network=conditioned_unet", *sizes])
    made = build_model(config)
    assert isinstance(made, ConditionedNet) and isinstance(made.net, ConditionedUNet)
    plain = build_model(load_config(overrides=["model.network=unet", *sizes]))
    names = {name for name in made.state_dict() if not name.startswith(("films", "code"))}
    assert len(names) == len(plain.state_dict()), "all else is that of the U-Net"
    image = torch.randn(2, 4, *config.data.patch)
    assert made.segment(image, torch.ones(2, 4).bool()).shape == (2, 4, *config.data.patch)


def test_wrap_does_not_take_it_twice() -> None:
    with pytest.raises(pm.PrismError, match=r"^net: ConditionedNet takes subsets of modalities"):
        wrap(model(), NAMES)


def test_it_trains_evaluates_and_starts_a_run_with_other_modalities(
    cases: Path, tmp_path: Path, without_drawing: Any
) -> None:
    settings = [*SMALL, "model.network=conditioned_unet", "data.holdout=1", "training.steps=2"]
    first = pm.train(cases, load_config(overrides=settings), out=tmp_path / "a", progress=False)
    assert first.predictor.evaluate(first.test)
    fewer = [*settings, 'data.modalities=["t1", "flair"]', f"training.init={tmp_path / 'a'}"]
    second = pm.train(cases, load_config(overrides=fewer), out=tmp_path / "b", progress=False)
    assert len(second.history) == 2
