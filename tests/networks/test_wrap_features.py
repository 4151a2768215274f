"""The features of a wrapped net's named layer."""

from __future__ import annotations

import copy
import re
from typing import Any

import oracles
import pytest
import torch
from helpers import Problem, prism_batch, randn, randomize, relative_error
from nets import MASK, NAMES, Spy, layers, unet
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, torch's own convention
from torch.utils.checkpoint import checkpoint

from prism_meta.bilevel.inner import SGD
from prism_meta.bilevel.strategies import FirstOrder, SecondOrder
from prism_meta.networks.wrapped import wrap
from prism_meta.objective.prism import PrismObjective


def test_features_are_those_of_the_named_layer() -> None:
    net, image = layers(), randn(2, 3, 8, 6, seed=41)
    out = wrap(net, NAMES, features="4")(image, MASK)
    plain = wrap(net, NAMES)(image, MASK)
    assert torch.equal(out.fused, plain.fused) and out.features.shape == (2, 5, 8, 6)
    for branch in (out.fused_output, out.single_modality):
        assert torch.equal(net[6](net[5](branch.features)), branch.logits)


def test_coarse_features_are_resampled_as_they_were_before_a_change_in_place() -> None:
    net, image = layers(), randn(2, 3, 8, 6, seed=42)
    out = wrap(net, NAMES, features="1")(image, MASK)
    coarse = net[1](net[0](torch.where(MASK[:, :, None, None], image, 0.0)))
    assert coarse.shape == (2, 4, 4, 3) and (coarse < 0).any()
    expected = F.interpolate(coarse, size=(8, 6), mode="bilinear")
    torch.testing.assert_close(out.features, expected, rtol=1e-12, atol=1e-12)
    assert out.single_modality.features.shape == (3, 4, 8, 6)


@pytest.mark.parametrize("dims", [1, 3])
def test_features_are_resampled_in_any_number_of_dimensions(dims: int) -> None:
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
    net = nn.Sequential(conv(3, 4, 1, stride=2), nn.Upsample(scale_factor=2), conv(4, 3, 1))
    image = randn(2, 3, *[4] * dims, seed=43)
    assert (
        wrap(net.double(), NAMES, features="0")(image, MASK).features.shape[2:] == image.shape[2:]
    )


def test_prototypes_on_features_have_the_oracles_second_order() -> None:
    train, meta = (prism_batch(rows, 8, 6, seed=44) for rows in (MASK.tolist(), [[True] * 3]))
    model = wrap(layers(), NAMES, features="4")
    objective = PrismObjective(delta=0.5)
    result = SecondOrder(SGD(0.05), 2).meta_gradient(model, objective, train, meta)
    problem = Problem("features", model, objective, train, meta)
    assert relative_error(result.gradient, oracles.second_order(problem, 0.05, 2)) <= 1e-9
    on_logits = wrap(layers(), NAMES)
    other = SecondOrder(SGD(0.05), 2).meta_gradient(on_logits, objective, train, meta)
    assert relative_error(other.gradient, result.gradient) > 1e-3


def test_features_leave_nothing_on_the_net() -> None:
    net = layers()
    model = wrap(net, NAMES, features="4")
    twin = copy.deepcopy(model)
    image = randn(2, 3, 8, 6, seed=45)
    assert torch.equal(twin(image, MASK).features, model(image, MASK).features)
    with pytest.raises(RuntimeError):
        model(randn(2, 3, 8, 6, seed=45).float(), MASK)
    assert not any(module._forward_hooks for module in model.modules())
    assert list(model.state_dict()) == list(net.state_dict())


def test_an_unknown_layer_is_refused_with_near_names() -> None:
    expected = (
        "features: got 'model.1.sub', which is no layer of UNet; expected a name of "
        "net.named_modules(), e.g. "
    )
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        wrap(unet(), NAMES, features="model.1.sub")
    near = str(caught.value).removeprefix(expected).split(", ")
    assert len(near) == 3 and set(near) <= {name for name, _ in unet().named_modules()}
    with pytest.raises(ValueError, match=r"features: got '', .* e\.g\. head$"):
        wrap(Spy(), NAMES, features="")
    with pytest.raises(ValueError, match=r"e\.g\. none: it has no layers$"):
        wrap(nn.Identity(), NAMES, features="head")


class Awkward(nn.Module):
    """Layers whose outputs are no feature maps: tokens, a tuple, one that runs twice or never."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.pair, self.idle = nn.Flatten(2), nn.LSTM(3, 3), nn.Identity()
        self.twice, self.pooled = nn.Conv2d(3, 3, 1), nn.Flatten(0, 1)
        self.double()

    def forward(self, image: Tensor) -> Tensor:
        self.tokens(image), self.pooled(image), self.pair(image.mean((2, 3))[None])
        out: Tensor = self.twice(self.twice(image))
        return out


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            "tokens",
            "features: tokens returned (4, 3, 16), expected (N, C, *s) with N = 4 and 2 spatial ",
        ),
        (
            "pooled",
            "features: pooled returned (12, 4, 4), expected (N, C, *s) with N = 4 and 2 spatial ",
        ),
        (
            "pair",
            "features: pair returned a tuple of Tensor, tuple, expected (N, C, *s) with N = 4 and ",
        ),
        (
            "twice",
            "features: twice ran 2 times in one pass of the net; name a layer that runs once",
        ),
        ("idle", "features: idle ran 0 times in one pass of the net; name a layer that runs once"),
    ],
)
def test_a_layer_without_feature_maps_is_refused(layer: str, message: str) -> None:
    model = wrap(Awkward(), NAMES, features=layer)
    with pytest.raises(ValueError, match=re.escape(message)):
        model(randn(2, 3, 4, 4, seed=46), MASK)


class Checkpointed(nn.Module):
    """A net whose layers run again in the backward pass, where that is switched on."""

    def __init__(self, on: bool) -> None:
        super().__init__()
        self.layers, self.head, self.on = layers(), nn.Conv2d(3, 3, 1), on
        randomize(self.head, seed=41)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.layers, x, use_reentrant=False) if self.on else self.layers(x)
        out: Tensor = self.head(x)
        return out


@pytest.mark.parametrize("features", [None, "layers.1", "layers"])
@pytest.mark.parametrize(
    "strategy", [FirstOrder(SGD(0.1), 2), SecondOrder(SGD(0.1), 2)], ids=["first", "second"]
)
def test_checkpointed_layers_change_no_gradient(strategy: Any, features: str | None) -> None:
    """Also where the features are taken within them."""
    results = [
        strategy.meta_gradient(
            wrap(Checkpointed(on), NAMES, features=features),
            PrismObjective(),
            prism_batch([[True, True, False]], 8, 8, seed=80),
            prism_batch([[True, False, True]], 8, 8, seed=82),
        )
        for on in (False, True)
    ]
    assert relative_error(results[1].gradient, results[0].gradient) <= 1e-12
