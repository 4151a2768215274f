"""Any net behind PrismNet's signature: what reaches it, its weights, training in both orders."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from helpers import F64, Problem, prism_batch, randn, relative_error, trainable
from monai.networks.nets.unet import UNet
from torch import Tensor, nn

from prism_meta.inner import SGD
from prism_meta.learner import MetaLearner
from prism_meta.modalities import BRATS
from prism_meta.objective import PrismObjective
from prism_meta.strategies import FirstOrder, MetaStrategy, SecondOrder, SingleLevel
from prism_meta.wrap import WrappedNet, wrap

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
    # The batch itself, then each shown modality alone: flair of 0, t1ce of 1, t1 of 0.
    expected = torch.zeros(5, 3, 4, 4, dtype=F64)
    expected[0, 0] = expected[2, 0] = image[0, 0]
    expected[0, 2] = expected[4, 2] = image[0, 2]
    expected[1, 1] = expected[3, 1] = image[1, 1]
    assert torch.equal(spy.seen[0], expected)
    assert torch.equal(out.fused, spy.head(expected)[:2])
    assert torch.equal(out.alone.logits, spy.head(expected)[2:])
    model.segment(image, MASK)
    assert torch.equal(spy.seen[1], expected[:2])


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
