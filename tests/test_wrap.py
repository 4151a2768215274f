"""Any net behind PrismNet's signature: what reaches it, its weights, training in both orders."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from helpers import F64, Problem, prism_batch, randn, randomize, relative_error, trainable
from monai.networks.nets.unet import UNet
from niftis import write_case
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, torch's own convention
from torch.utils.checkpoint import checkpoint

from prism_meta.cases import load_cases
from prism_meta.inference import Predictor
from prism_meta.inner import SGD
from prism_meta.labels import LabelSet
from prism_meta.learner import MetaLearner
from prism_meta.modalities import BRATS, subsets
from prism_meta.objective import PrismObjective
from prism_meta.strategies import FirstOrder, MetaStrategy, SecondOrder, SingleLevel
from prism_meta.wrap import MultiEncoderNet, WrappedNet, wrap

NAMES = ("flair", "t1ce", "t1")
MASK = torch.tensor([[True, False, True], [False, True, False]])
STRATEGIES = [
    pytest.param(SingleLevel(), id="single-level"),
    pytest.param(FirstOrder(SGD(0.05)), id="first-order"),
    pytest.param(SecondOrder(SGD(0.05)), id="second-order"),
]


def unet(dims: int = 2) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet(dims, 3, 3, channels=(4, 8), strides=(2,)).double()


class Spy(nn.Module):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.head = nn.Conv2d(3, 2, 1)
        self.double()

    def forward(self, image: Tensor) -> Tensor:
        self.seen.append(image)
        out: Tensor = self.head(image)
        return out


@pytest.mark.parametrize("hidden", [float("nan"), float("inf"), 7.0])
def test_hidden_modalities_reach_the_net_as_zeros(hidden: float) -> None:
    spy = Spy()
    image = randn(2, 3, 4, 4, seed=1)
    image[~MASK] = hidden
    model = wrap(spy, NAMES)
    out = model(image, MASK)
    # The batch itself, then flair of 0 and t1 of 0 alone; 1 is shown t1ce alone as it is.
    expected = torch.zeros(4, 3, 4, 4, dtype=F64)
    expected[0, 0] = expected[2, 0] = image[0, 0]
    expected[0, 2] = expected[3, 2] = image[0, 2]
    expected[1, 1] = image[1, 1]
    assert torch.equal(spy.seen[0], expected)
    assert torch.equal(out.fused, spy.head(expected)[:2])
    # The pairs go modality by modality: flair of 0, t1ce of 1, t1 of 0.
    assert torch.equal(out.alone.logits, spy.head(expected)[[2, 1, 3]])
    assert torch.equal(out.unimodal_packed, out.alone.logits)
    model.segment(image, MASK)
    assert torch.equal(spy.seen[1], expected[:2])


def test_without_the_unimodal_outputs_the_net_sees_the_batch_alone() -> None:
    spy = Spy()
    image = randn(2, 3, 4, 4, seed=1)
    model = wrap(spy, NAMES)
    out = model(image, MASK, unimodal=False)
    (seen,) = spy.seen
    assert torch.equal(seen, torch.where(MASK[:, :, None, None], image, 0.0))
    assert torch.equal(out.fused, spy.head(seen))
    assert out.alone.logits.shape == out.unimodal_packed.shape == (0, 2, 4, 4)
    assert out.pairs.sample.shape == out.pairs.modality.shape == (0,)
    assert not out.pairs.sample.is_floating_point() and torch.equal(out.pairs.mask, MASK)
    assert torch.equal(out.unimodal, torch.zeros(2, 3, 2, 4, 4, dtype=F64))


def test_samples_of_one_modality_cost_nothing_more() -> None:
    spy = Spy()
    image = randn(2, 3, 4, 4, seed=1)
    out = wrap(spy, NAMES)(image, torch.tensor([[False, True, False], [True, False, False]]))
    assert len(spy.seen[0]) == 2
    assert torch.equal(out.alone.logits, out.fused[[1, 0]])


@pytest.mark.parametrize("dims", [2, 3])
def test_a_hidden_modality_changes_no_bit(dims: int) -> None:
    model, size = wrap(unet(dims), NAMES), (8, 8, 8)[:dims]
    rows: list[list[bool]] = MASK.tolist()
    clean, dirty = (prism_batch(rows, *size, seed=2) for _ in range(2))
    dirty.image[~MASK] = float("nan")
    for strategy in (FirstOrder(SGD(0.05)), SecondOrder(SGD(0.05))):
        one, two = (strategy.meta_gradient(model, PrismObjective(), b, b) for b in (clean, dirty))
        assert torch.equal(one.meta_loss, two.meta_loss)
        assert all(torch.equal(one.gradient[n], two.gradient[n]) for n in one.gradient)


def test_outputs_are_those_of_separate_calls() -> None:
    net, image = unet(), randn(2, 3, 8, 8, seed=3)
    out = wrap(net, NAMES)(image, MASK)
    close = {"rtol": 1e-10, "atol": 1e-12}
    for n in range(2):
        shown = MASK[n, :, None, None] * image[n]
        torch.testing.assert_close(out.fused[n], net(shown[None])[0], **close)
        for m in range(3):
            one = torch.zeros_like(image[n : n + 1])
            one[0, m] = image[n, m]
            expected = net(one)[0] if MASK[n, m] else torch.zeros(3, 8, 8, dtype=F64)
            torch.testing.assert_close(out.unimodal[n, m], expected, **close)
    assert out.prm == ()
    assert torch.equal(out.features, out.fused)
    torch.testing.assert_close(wrap(net, NAMES).segment(image, MASK), out.fused, **close)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_monai_unet_trains(strategy: MetaStrategy) -> None:
    net = unet()
    model = wrap(net, NAMES)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    learner = MetaLearner(model, PrismObjective(), strategy, optimizer)
    train = prism_batch([[True, False, True], [True, True, False]], 8, 8, seed=4)
    meta = prism_batch([[True, True, True], [False, False, True]], 8, 8, seed=6)
    before = {n: p.clone() for n, p in trainable(net).items()}
    values = [learner.step(train, meta) for _ in range(2)]
    assert all(bool(v.meta_loss.isfinite()) for v in values)
    assert values[1].train_loss < values[0].train_loss
    moved = [n for n, p in trainable(net).items() if not torch.equal(p, before[n])]
    assert moved == list(before)


@pytest.mark.parametrize("dims", [2, 3])
def test_second_order_equals_the_oracle(dims: int) -> None:
    size = (8, 8, 8)[:dims]
    train = prism_batch(MASK.tolist(), *size, seed=8)
    meta = prism_batch([[True, True, True]], *size, seed=10)
    model, objective = wrap(unet(dims), NAMES), PrismObjective()
    result = SecondOrder(SGD(0.05), 2).meta_gradient(model, objective, train, meta)
    problem = Problem("wrapped", model, objective, train, meta)
    assert relative_error(result.gradient, oracles.second_order(problem, 0.05, 2)) <= 1e-9


def test_the_state_dict_is_the_nets_own() -> None:
    net = unet()
    model = wrap(net, NAMES)
    assert isinstance(model, WrappedNet)
    state, own = model.state_dict(), net.state_dict()
    assert list(state) == list(own)
    assert all(torch.equal(state[n], own[n]) for n in own)
    fresh = unet()
    with torch.no_grad():
        for param in fresh.parameters():
            param.zero_()
    wrap(fresh, NAMES).load_state_dict(state)
    assert all(torch.equal(t, own[n]) for n, t in fresh.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})


def test_the_default_modalities_are_those_of_brats() -> None:
    assert wrap(nn.Identity()).modalities == BRATS == ("flair", "t1ce", "t1", "t2")


@pytest.mark.parametrize("call", ["forward", "segment"])
def test_wrong_inputs_are_refused(call: str) -> None:
    method: Any = getattr(wrap(Spy(), NAMES), call)
    with pytest.raises(ValueError, match=r"image: got 2 channels, expected 3 \(flair, t1ce, t1\)"):
        method(torch.zeros(1, 2, 4, 4), torch.ones(1, 2).bool())
    with pytest.raises(
        ValueError, match="mask: a sample is shown no modality; each row needs at least one True"
    ):
        method(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3).bool())


@pytest.mark.parametrize("names", [(), ("t1", "t1")])
def test_names_must_differ(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="expected different names, at least one") as caught:
        wrap(nn.Identity(), names)
    assert str(caught.value).startswith(f"modalities: got {names}")


# --- features of a layer --------------------------------------------------------------------------


def layers() -> nn.Sequential:
    """Coarse features in layer 1, which layer 2 changes in place, and fine ones in layer 4."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.InstanceNorm2d(4),
        nn.LeakyReLU(inplace=True),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(4, 5, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(5, 3, 1),
    )
    return randomize(net, seed=40)  # type: ignore[return-value]


def test_features_are_those_of_the_named_layer() -> None:
    net, image = layers(), randn(2, 3, 8, 6, seed=41)
    out = wrap(net, NAMES, features="4")(image, MASK)
    plain = wrap(net, NAMES)(image, MASK)
    assert torch.equal(out.fused, plain.fused) and out.features.shape == (2, 5, 8, 6)
    for branch in (out.branch, out.alone):
        assert torch.equal(net[6](net[5](branch.features)), branch.logits)


def test_coarse_features_are_resampled_as_they_were_before_a_change_in_place() -> None:
    net, image = layers(), randn(2, 3, 8, 6, seed=42)
    out = wrap(net, NAMES, features="1")(image, MASK)
    coarse = net[1](net[0](torch.where(MASK[:, :, None, None], image, 0.0)))
    assert coarse.shape == (2, 4, 4, 3) and (coarse < 0).any()
    expected = F.interpolate(coarse, size=(8, 6), mode="bilinear")
    torch.testing.assert_close(out.features, expected, rtol=1e-12, atol=1e-12)
    assert out.alone.features.shape == (3, 4, 8, 6)


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
            "features: tokens gave (4, 3, 16), expected (N, C, *s) with N = 4 and 2 spatial ",
        ),
        (
            "pooled",
            "features: pooled gave (12, 4, 4), expected (N, C, *s) with N = 4 and 2 spatial ",
        ),
        (
            "pair",
            "features: pair gave a tuple of Tensor, tuple, expected (N, C, *s) with N = 4 and ",
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


# --- several maps, and none -----------------------------------------------------------------------


class Giving(nn.Module):
    """Gives what ``form`` makes of logits at full, half and quarter resolution."""

    def __init__(self, form: Callable[..., Any]) -> None:
        super().__init__()
        self.form = form
        self.heads = nn.ModuleList(nn.Conv2d(3, 2, 1) for _ in range(3))
        self.double()

    def forward(self, image: Tensor) -> Any:
        return self.form(*(head(F.avg_pool2d(image, 2**k)) for k, head in enumerate(self.heads)))


def stacked(*maps: Tensor) -> Tensor:
    """As MONAI's DynUNet: every map on the finest grid."""
    return torch.stack([F.interpolate(m, size=maps[0].shape[2:]) for m in maps], 1)


@pytest.mark.parametrize("form", [lambda *m: m, lambda *m: [*m], stacked])
def test_coarser_maps_are_prm_maps(form: Callable[..., Any]) -> None:
    net, image = Giving(form), randn(2, 3, 8, 8, seed=50)
    out = wrap(net, NAMES)(image, MASK)
    shown = torch.where(MASK[:, :, None, None], image, 0.0)
    expected = [head(F.avg_pool2d(shown, 2**k)) for k, head in enumerate(net.heads)]
    if form is stacked:
        expected = list(stacked(*expected).unbind(1))
    for got, want in zip((out.fused, *out.prm), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert [p.shape for p in out.alone.prm] == [(3, *p.shape[1:]) for p in out.prm]
    batch = prism_batch(MASK.tolist(), 8, 8, seed=51, classes=2)
    assert PrismObjective()(wrap(net, NAMES), batch).terms["prm"] > 0
    torch.testing.assert_close(wrap(net, NAMES).segment(image, MASK), out.fused)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            lambda a, b, c: {"out": a},
            "net: gave a dict, expected logits (N, K, *S) = (4, K, 8, 8), or a tuple or list of maps "
            "with the output first; wrap a module that returns these alone",
        ),
        (lambda a, b, c: (a, None), "net: gave a tuple of Tensor, NoneType, expected logits "),
        (lambda a, b, c: [], "net: gave a list of nothing, expected logits "),
        (
            lambda a, b, c: b,
            "net: gave logits (4, 2, 4, 4), expected (N, K, *S) = (4, K, 8, 8) for its input; bring "
            "them to the input's grid, the finest first where there are several",
        ),
        (lambda a, b, c: (c, b, a), "net: gave logits (4, 2, 2, 2), expected "),
        (lambda a, b, c: a[:1], "net: gave logits (1, 2, 8, 8), expected "),
        (lambda a, b, c: a.mean((2, 3)), "net: gave logits (4, 2), expected "),
        (
            lambda a, b, c: (a, b.mean()),
            "net: gave () as map 2 of 2, expected logits (N, K, *s) with N, K = 4, 2; switch off "
            "outputs that are no logits, or wrap a module that leaves them out",
        ),
        (
            lambda a, b, c: (a, b, c[:, :1]),
            "net: gave (4, 1, 2, 2) as map 3 of 3, expected logits ",
        ),
    ],
)
def test_outputs_that_are_no_logits_are_refused(form: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        wrap(Giving(form), NAMES)(randn(2, 3, 8, 8, seed=52), MASK)


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


# --- nets with several encoders -------------------------------------------------------------------


class Encoders(nn.Module):
    """An encoder per modality, fused by a masked mean, and a decoder of its own for one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(nn.Conv2d(1, 4, 3, padding=1) for _ in range(3))
        self.mix, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 3, 1)
        self.coarse, self.single = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)
        self.calls: list[str] = []
        randomize(self, seed=60)

    def encode(self, image: Tensor, mask: Tensor) -> Tensor:
        self.calls.append("encode")
        scans = [e(x).tanh() for e, x in zip(self.encoders, image.split(1, 1), strict=True)]
        return torch.stack(scans, 1)

    def decode_fused(self, encoded: Tensor, sample: Tensor, mask: Tensor) -> list[Tensor]:
        self.calls.append(f"decode_fused {len(sample)}")
        shown = mask[:, :, None, None, None]
        mixed = self.mix((shown * encoded[sample]).sum(1) / shown.sum(1)).tanh()
        return [self.head(mixed), self.coarse(F.avg_pool2d(mixed, 2))]

    def decode_unimodal(self, encoded: Tensor, sample: Tensor, modality: Tensor) -> Tensor:
        self.calls.append(f"decode_unimodal {len(sample)}")
        out: Tensor = self.single(encoded[sample, modality])
        return out


def test_a_net_with_several_encoders_runs_each_part_once() -> None:
    net, image = Encoders(), randn(2, 3, 8, 8, seed=61)
    assert isinstance(net, MultiEncoderNet) and not isinstance(unet(), MultiEncoderNet)
    model = wrap(net, NAMES, features="mix")
    out = model(image, MASK)
    assert net.calls == ["encode", "decode_fused 4", "decode_unimodal 3"]
    encoded = net.encode(image, MASK)
    close = {"rtol": 1e-12, "atol": 1e-12}
    for n in range(2):
        logits, coarse = net.decode_fused(encoded, torch.tensor([n]), MASK[n : n + 1])
        torch.testing.assert_close(out.fused[n], logits[0], **close)
        torch.testing.assert_close(out.prm[0][n], coarse[0], **close)
    for p, (m, n) in enumerate([(0, 0), (1, 1), (2, 0)]):
        one = torch.arange(3)[None] == m
        logits, coarse = net.decode_fused(encoded, torch.tensor([n]), one)
        torch.testing.assert_close(out.alone.logits[p], logits[0], **close)
        torch.testing.assert_close(out.alone.prm[0][p], coarse[0], **close)
        torch.testing.assert_close(out.unimodal[n, m], net.single(encoded[n, m]), **close)
    assert out.features.shape == (2, 4, 8, 8)
    net.calls.clear()
    assert torch.equal(model.segment(image, MASK), model(image, MASK, unimodal=False).fused)
    assert net.calls == ["encode", "decode_fused 2"] * 2


def test_a_hidden_modality_of_several_encoders_changes_no_bit() -> None:
    clean, dirty = (prism_batch(MASK.tolist(), 8, 8, seed=62) for _ in range(2))
    dirty.image[~MASK] = float("nan")
    model = wrap(Encoders(), NAMES)
    for strategy in (FirstOrder(SGD(0.05)), SecondOrder(SGD(0.05))):
        one, two = (strategy.meta_gradient(model, PrismObjective(), b, b) for b in (clean, dirty))
        assert torch.equal(one.meta_loss, two.meta_loss)
        assert all(torch.equal(one.gradient[n], two.gradient[n]) for n in one.gradient)


def test_several_encoders_have_the_oracles_second_order() -> None:
    train, meta = (prism_batch(rows, 8, 8, seed=63) for rows in (MASK.tolist(), [[True] * 3]))
    problem = Problem("encoders", wrap(Encoders(), NAMES), PrismObjective(), train, meta)
    result = SecondOrder(SGD(0.05), 2).meta_gradient(
        problem.model, problem.objective, problem.train, problem.meta
    )
    assert relative_error(result.gradient, oracles.second_order(problem, 0.05, 2)) <= 1e-9


def test_a_wrong_declaration_is_refused() -> None:
    class Half(Encoders):
        decode_unimodal = None  # type: ignore[assignment]

    class Wrong(Encoders):
        def decode_unimodal(self, encoded: Tensor, sample: Tensor, modality: Tensor) -> Tensor:
            return encoded[sample, modality]

    expected = (
        "net: Half has no decode_unimodal; a net with several encoders declares encode, "
        "decode_fused, decode_unimodal, see MultiEncoderNet"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        wrap(Half(), NAMES)
    message = "net: decode_unimodal gave (3, 4, 8, 8), expected (P, K, *S) = (3, 3, 8, 8)"
    with pytest.raises(ValueError, match=re.escape(message)):
        wrap(Wrong(), NAMES)(randn(2, 3, 8, 8, seed=64), MASK)


# --- many subsets of one batch --------------------------------------------------------------------

NETS: list[Any] = [
    pytest.param(lambda: unet(2), (8, 8), id="plain 2-D"),
    pytest.param(lambda: unet(3), (8, 8, 4), id="plain 3-D"),
    pytest.param(lambda: Giving(lambda *m: m), (8, 8), id="several maps"),
    pytest.param(Encoders, (8, 8), id="several encoders"),
]


@pytest.mark.parametrize(("make", "size"), NETS)
def test_every_subset_of_a_batch_is_what_segment_gives(
    make: Callable[[], nn.Module], size: tuple[int, ...]
) -> None:
    model, image, every = wrap(make(), NAMES), randn(2, 3, *size, seed=65), subsets(3)
    some = every[torch.tensor([6, 0, 4])]
    for chosen in (every, some, every[:1]):
        together = model.segment_subsets(image, chosen)
        assert len(together) == len(chosen)
        for logits, shown in zip(together, chosen, strict=True):
            expected = model.segment(image, shown.expand(2, -1))
            torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    image[:, 1] = float("nan")  # that of no subset
    assert bool(model.segment_subsets(image, torch.tensor([[True, False, True]])).isfinite().all())


def test_subsets_share_one_encoding() -> None:
    net = Encoders()
    wrap(net, NAMES).segment_subsets(randn(2, 3, 8, 8, seed=66), subsets(3))
    assert net.calls == ["encode", *["decode_fused 2"] * 7]


def test_wrong_subsets_are_refused() -> None:
    model, image = wrap(Spy(), NAMES), randn(2, 3, 4, 4, seed=67)
    nothing = "mask: a sample is shown no modality; each row needs at least one True"
    for empty in ([[True, True, True], [False, False, False]], [[False, False, False]]):
        with pytest.raises(ValueError, match=nothing):
            model.segment_subsets(image, torch.tensor(empty))
    with pytest.raises(ValueError, match=nothing):
        model.segment_subsets(image, torch.ones(0, 3).bool())
    with pytest.raises(ValueError, match=r"mask: got \(2, 2\), expected \(B, M\) = \(2, 3\)"):
        model.segment_subsets(image, torch.ones(1, 2).bool())


@pytest.mark.parametrize("make", [lambda: unet(2), Encoders], ids=["plain", "several encoders"])
def test_a_predictor_serves_all_subsets_of_a_window_at_once(
    tmp_path: Path, make: Callable[[], nn.Module]
) -> None:
    write_case(tmp_path / "p0", modalities=NAMES, shape=(12, 12, 3))
    (case,) = load_cases(tmp_path, NAMES)
    model, every = wrap(make().float(), NAMES), subsets(3)
    counted: list[int] = []

    class Counting(nn.Module):
        def segment_subsets(self, image: Tensor, chosen: Tensor) -> Tensor:
            counted.append(len(chosen))
            return model.segment_subsets(image, chosen)

    class OneByOne(nn.Module):
        def segment(self, image: Tensor, mask: Tensor) -> Tensor:
            return model.segment(image, mask)

    labels = LabelSet({"a": 1, "b": 2})
    found = [
        Predictor(net, labels=labels, patch=(8, 8)).predict(case, every)
        for net in (model, Counting(), OneByOne())
    ]
    assert set(counted) == {7}
    for volumes in zip(*found, strict=True):
        assert all(np.array_equal(volume, volumes[0]) for volume in volumes)
    assert len({volume.tobytes() for volume in found[0]}) == 7
