"""Any net behind PrismNet's signature: what reaches it, its weights, training in both orders."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import oracles
import pytest
import torch
from helpers import F64, Problem, faults_of, prism_batch, randn, relative_error, trainable
from nets import MASK, NAMES, STRATEGIES, Giving, Spy, unet
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, torch's own convention

from prism_meta.bilevel.inner import SGD
from prism_meta.bilevel.learner import MetaLearner
from prism_meta.bilevel.strategies import FirstOrder, MetaStrategy, SecondOrder
from prism_meta.errors import PrismError
from prism_meta.modalities import BRATS
from prism_meta.networks.prediction import SegmentationModel
from prism_meta.networks.wrapped import WrappedNet, wrap
from prism_meta.objective.prism import PrismObjective


@pytest.mark.parametrize("hidden", [float("nan"), float("inf"), 7.0])
def test_hidden_modalities_reach_the_net_as_zeros(hidden: float) -> None:
    spy = Spy()
    image = randn(2, 3, 4, 4, seed=1)
    image[~MASK] = hidden
    model = wrap(spy, NAMES)
    out = model(image, MASK)
    # The batch itself, then of sample 0 only flair and only t1; sample 1 is shown only t1ce as it is.
    expected = torch.zeros(4, 3, 4, 4, dtype=F64)
    expected[0, 0] = expected[2, 0] = image[0, 0]
    expected[0, 2] = expected[3, 2] = image[0, 2]
    expected[1, 1] = image[1, 1]
    assert torch.equal(spy.seen[0], expected)
    assert torch.equal(out.fused, spy.head(expected)[:2])
    # The pairs go modality by modality: flair of 0, t1ce of 1, t1 of 0.
    assert torch.equal(out.single_modality.logits, spy.head(expected)[[2, 1, 3]])
    assert torch.equal(out.unimodal_packed, out.single_modality.logits)
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
    assert out.single_modality.logits.shape == out.unimodal_packed.shape == (0, 2, 4, 4)
    assert out.pairs.sample.shape == out.pairs.modality.shape == (0,)
    assert not out.pairs.sample.is_floating_point() and torch.equal(out.pairs.mask, MASK)
    assert torch.equal(out.unimodal, torch.zeros(2, 3, 2, 4, 4, dtype=F64))


def test_samples_of_one_modality_cost_nothing_more() -> None:
    spy = Spy()
    image = randn(2, 3, 4, 4, seed=1)
    out = wrap(spy, NAMES)(image, torch.tensor([[False, True, False], [True, False, False]]))
    assert len(spy.seen[0]) == 2
    assert torch.equal(out.single_modality.logits, out.fused[[1, 0]])


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
    assert [p.shape for p in out.single_modality.prm] == [(3, *p.shape[1:]) for p in out.prm]
    batch = prism_batch(MASK.tolist(), 8, 8, seed=51, classes=2)
    assert PrismObjective()(wrap(net, NAMES), batch).terms["prm"] > 0
    torch.testing.assert_close(wrap(net, NAMES).segment(image, MASK), out.fused)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            lambda a, b, c: {"out": a},
            "net: returned a dict, expected logits (N, K, *S) = (4, K, 8, 8), or a tuple or list of maps "
            "with the output first; wrap a module that returns only these",
        ),
        (lambda a, b, c: (a, None), "net: returned a tuple of Tensor, NoneType, expected logits "),
        (lambda a, b, c: [], "net: returned a list of nothing, expected logits "),
        (
            lambda a, b, c: b,
            "net: returned logits (4, 2, 4, 4), expected (N, K, *S) = (4, K, 8, 8) for its input; "
            "resample them to the input's grid, and return the finest first if there are several",
        ),
        (lambda a, b, c: (c, b, a), "net: returned logits (4, 2, 2, 2), expected "),
        (lambda a, b, c: a[:1], "net: returned logits (1, 2, 8, 8), expected "),
        (lambda a, b, c: a.mean((2, 3)), "net: returned logits (4, 2), expected "),
        (
            lambda a, b, c: (a, b.mean()),
            "net: returned () as map 2 of 2, expected logits (N, K, *s) with N, K = 4, 2; switch off "
            "outputs that are not logits, or wrap a module that leaves them out",
        ),
        (
            lambda a, b, c: (a, b, c[:, :1]),
            "net: returned (4, 1, 2, 2) as map 3 of 3, expected logits ",
        ),
    ],
)
def test_outputs_that_are_no_logits_are_refused(form: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        wrap(Giving(form), NAMES)(randn(2, 3, 8, 8, seed=52), MASK)


def test_all_faults_of_a_net_at_once() -> None:
    class Half(nn.Module):
        def decode_fused(self) -> None:
            pass

    assert faults_of(
        lambda: wrap(Half(), modalities=("t1", "t1"), features="layer"), PrismError
    ) == (
        "modalities: got ('t1', 't1'), expected different names, at least one",
        "features: got 'layer', which is no layer of Half; expected a name of net.named_modules(), e.g. "
        "none: it has no layers",
        "net: Half has no encode, decode_unimodal; a net with several encoders implements encode, "
        "decode_fused, decode_unimodal, see MultiEncoderNet",
    )


@pytest.mark.parametrize(
    ("net", "modalities", "fault"),
    [
        (
            nn.Conv2d(3, 2, 1),
            "flair",
            "modalities: got the string 'flair', expected a sequence of names",
        ),
        (len, NAMES, "net: got builtin_function_or_method, expected a torch.nn.Module"),
        (
            wrap(nn.Conv2d(3, 2, 1), NAMES),
            NAMES,
            "net: WrappedNet takes subsets of modalities as it is; use it without wrap, or pass the net "
            "inside it",
        ),
    ],
)
def test_what_cannot_be_wrapped(net: Any, modalities: Any, fault: str) -> None:
    assert faults_of(lambda: wrap(net, modalities), PrismError) == (fault,)


def test_batch_norm_is_warned_of_once() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    message = (
        r"^net: BatchNorm in 1 takes its statistics over samples and their single modalities together, and "
        r"MetaLearner keeps those of the meta batch \(buffers='outer'\); InstanceNorm or GroupNorm depend on "
        r'no other sample \(in MONAI\'s nets norm="instance"\)$'
    )
    with pytest.warns(UserWarning, match=message) as caught:
        model = wrap(net, NAMES)
    assert len(caught) == 1 and caught[0].filename == __file__
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    learner = MetaLearner(model, PrismObjective(), FirstOrder(SGD(0.05)), optimizer)
    data = prism_batch(MASK.tolist(), 8, 8, seed=5, classes=2)
    learner.step(replace(data, image=data.image.float()), replace(data, image=data.image.float()))
    assert int(net[1].num_batches_tracked) == 1


def test_models_fulfil_one_protocol() -> None:
    nets = [nn.Conv1d(3, 2, 1), nn.Conv2d(3, 2, 1), nn.Conv3d(3, 2, 1), nn.Linear(3, 2)]
    models = [wrap(net, NAMES) for net in nets]
    assert [model.spatial_dims for model in models] == [1, 2, 3, None]
    assert all(isinstance(model, SegmentationModel) for model in models)
    assert not isinstance(nets[0], SegmentationModel)
