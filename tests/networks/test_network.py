"""PrismNet: shapes, and that what is not shown can change nothing."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from helpers import F64, Problem, labels, prism_batch, prism_net, randn, relative_error
from torch import Tensor

from prism_meta.bilevel.inner import SGD
from prism_meta.bilevel.strategies import FirstOrder, SecondOrder
from prism_meta.modalities import Batch, subsets
from prism_meta.networks.prediction import Prediction, ShownPairs
from prism_meta.networks.prism import PrismNet
from prism_meta.objective.prism import PrismObjective

MASK = torch.tensor(
    [[True, False, True], [False, True, False], [True, True, True], [True, True, False]]
)
SIZES = {
    "2-D": (16, 16),
    "2-D odd": (17, 19),
    "3-D": (16, 16, 16),
    "3-D odd": (9, 11, 10),
}


def outputs(prediction: Prediction) -> dict[str, Tensor]:
    prm = {f"prm{i}": p for i, p in enumerate(prediction.prm)}
    single_prm = {f"single prm{i}": p for i, p in enumerate(prediction.single_modality.prm)}
    return {
        "fused": prediction.fused,
        "features": prediction.features,
        **prm,
        **single_prm,
        "unimodal": prediction.unimodal,
        "single": prediction.single_modality.logits,
        "single features": prediction.single_modality.features,
    }


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_shapes(size: tuple[int, ...]) -> None:
    net = prism_net(spatial_dims=len(size), num_classes=4, depth=4)
    image = randn(4, 3, *size, seed=1)
    out = net(image, MASK)
    pairs = int(MASK.sum())
    assert out.fused.shape == (4, 4, *size)
    assert out.features.shape == (4, 2, *size)
    assert out.unimodal.shape == (4, 3, 4, *size)
    assert out.unimodal_packed.shape == out.single_modality.logits.shape == (pairs, 4, *size)
    halved = [tuple(-(-n // 2**scale) for n in size) for scale in (1, 2, 3)]
    assert [p.shape for p in out.prm] == [(4, 4, *s) for s in halved]
    assert [p.shape for p in out.single_modality.prm] == [(pairs, 4, *s) for s in halved]
    assert all(bool(t.isfinite().all()) for t in outputs(out).values())


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_segment_is_fused(size: tuple[int, ...]) -> None:
    net, image = prism_net(spatial_dims=len(size), depth=4), randn(4, 3, *size, seed=2)
    close(net.segment(image, MASK), net(image, MASK).fused)


def test_unimodal_is_zero_where_not_shown_and_only_there() -> None:
    out = prism_net()(randn(4, 3, 8, 8, seed=3), MASK)
    assert torch.equal(out.unimodal.flatten(2).abs().sum(2) > 0, MASK)


def test_every_subset_runs() -> None:
    net, mask = prism_net(num_modalities=4), subsets(4)
    assert bool(net.segment(randn(15, 4, 6, 6, seed=4), mask).isfinite().all())


def test_one_modality_only() -> None:
    out = prism_net(num_modalities=1)(randn(2, 1, 6, 6, seed=5), torch.ones(2, 1).bool())
    close(out.single_modality.logits, out.fused)


# ---------------------------------------------------------------- what is hidden


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300, "random"])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_hidden_modality_changes_no_bit(dims: int, value: float | str) -> None:
    net, objective = prism_net(spatial_dims=dims), PrismObjective()
    size = (6, 7, 5)[:dims]
    image, target = randn(4, 3, *size, seed=6), labels(4, *size, classes=3, seed=7)
    other = randn(*image.shape, seed=8) if value == "random" else torch.full_like(image, value)
    hidden = ~MASK.view(4, 3, *[1] * dims)
    batches = [Batch(i, MASK, target) for i in (image, torch.where(hidden, other, image))]
    assert not torch.equal(batches[0].image, batches[1].image)
    mine, changed = (outputs(net(b.image, MASK)) for b in batches)
    assert all(torch.equal(mine[name], changed[name]) for name in mine)
    grads = [torch.autograd.grad(objective(net, b).loss, list(net.parameters())) for b in batches]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    metas = [SecondOrder(SGD(0.1)).meta_gradient(net, objective, b, b).gradient for b in batches]
    assert all(torch.equal(metas[0][n], metas[1][n]) for n in metas[0])


@pytest.mark.parametrize("strategy", [FirstOrder(SGD(0.1)), SecondOrder(SGD(0.1), 2)])
def test_the_encoder_of_a_modality_never_shown_gets_no_gradient(strategy: Any) -> None:
    net = prism_net()
    train = prism_batch([[True, False, True], [True, False, False]], 6, 6, seed=9)
    meta = prism_batch([[False, False, True]], 6, 6, seed=10)
    result = strategy.meta_gradient(net, PrismObjective(), train, meta)
    for name, param in net.named_parameters():
        if name.startswith("encoders.1."):
            assert torch.equal(result.gradient[name], torch.zeros_like(param)), name
            assert torch.equal(result.adapted[name], param), name
    assert result.gradient["encoders.2.blocks.0.0.weight"].abs().sum() > 0


def test_no_gradient_reaches_hidden_voxels() -> None:
    image = randn(4, 3, 6, 6, seed=11).requires_grad_()
    (gradient,) = torch.autograd.grad(prism_net()(image, MASK).fused.square().sum(), image)
    assert torch.equal(gradient.flatten(2).abs().sum(2) > 0, MASK)


# ---------------------------------------------------------------- one pass for many


@pytest.mark.parametrize("dims", [2, 3])
def test_alone_and_unimodal_equal_a_separate_forward(dims: int) -> None:
    net, image = prism_net(spatial_dims=dims), randn(4, 3, *(6, 7, 5)[:dims], seed=12)
    out = net(image, MASK)
    for p, (n, m) in enumerate(
        zip(out.pairs.sample.tolist(), out.pairs.modality.tolist(), strict=True)
    ):
        one = net(image[n : n + 1], torch.eye(3).bool()[m : m + 1])
        close(out.single_modality.logits[p], one.fused[0])
        close(out.single_modality.features[p], one.features[0])
        close(out.unimodal[n, m], one.unimodal[0, m])
        for coarse, expected in zip(out.single_modality.prm, one.prm, strict=True):
            close(coarse[p], expected[0])


def test_a_sample_does_not_depend_on_its_batch_mates() -> None:
    net, image = prism_net(), randn(4, 3, 6, 7, seed=13)
    out = net(image, MASK)
    for n in range(4):
        single = net(image[n : n + 1], MASK[n : n + 1])
        close(out.fused[n], single.fused[0])
        close(out.unimodal[n], single.unimodal[0])
        for coarse, expected in zip(out.prm, single.prm, strict=True):
            close(coarse[n], expected[0])


def test_a_permuted_batch_is_permuted() -> None:
    net, image, order = prism_net(), randn(4, 3, 6, 7, seed=14), torch.tensor([2, 0, 3, 1])
    mine, permuted = outputs(net(image, MASK)), outputs(net(image[order], MASK[order]))
    for name in ("fused", "unimodal", "features", "prm0"):
        close(permuted[name], mine[name][order])


def test_more_modalities_change_the_fused_output() -> None:
    net, image = prism_net(), randn(1, 3, 6, 7, seed=15)
    results = [net.segment(image, subset[None]) for subset in subsets(3)]
    for i, one in enumerate(results):
        for other in results[:i]:
            assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("dims", [2, 3])
def test_subsets_of_one_encoding_equal_one_at_a_time(dims: int) -> None:
    net, image = prism_net(spatial_dims=dims), randn(2, 3, *(6, 7, 5)[:dims], seed=22)
    some = subsets(3)[torch.tensor([6, 0, 4])]
    together = net.segment_subsets(image, some)
    for logits, subset in zip(together, some, strict=True):
        close(logits, net.segment(image, subset.expand(2, -1)))


def test_a_modality_of_no_subset_is_not_encoded() -> None:
    net, image = prism_net(), randn(1, 3, 6, 7, seed=23)
    image[:, 1] = float("nan")
    assert bool(net.segment_subsets(image, torch.tensor([[True, False, True]])).isfinite().all())


def test_without_unimodal_outputs_there_is_no_pair() -> None:
    net, image = prism_net(), randn(4, 3, 6, 7, seed=24)
    fused, full = net(image, MASK, unimodal=False), net(image, MASK)
    assert (
        len(fused.pairs.sample)
        == len(fused.unimodal_packed)
        == len(fused.single_modality.logits)
        == 0
    )
    assert fused.unimodal.shape == full.unimodal.shape
    close(fused.fused, full.fused)
    for mine, other in zip(fused.prm, full.prm, strict=True):
        close(mine, other)


# ---------------------------------------------------------------- twice differentiable


@pytest.mark.parametrize("size", [(6, 5), (4, 5, 4)], ids=["2-D", "3-D"])
def test_second_order_equals_the_oracle(size: tuple[int, ...]) -> None:
    train = prism_batch([[True, False, True], [False, True, False]], *size, seed=16)
    meta = prism_batch([[True, True, True]], *size, seed=18)
    net, objective = prism_net(spatial_dims=len(size)), PrismObjective()
    result = SecondOrder(SGD(0.05), 2).meta_gradient(net, objective, train, meta)
    expected = oracles.second_order(Problem("prism", net, objective, train, meta), 0.05, 2)
    assert relative_error(result.gradient, expected) <= 1e-9


# ---------------------------------------------------------------- the parts


def test_pairs_run_modality_by_modality() -> None:
    pairs = ShownPairs.from_mask(torch.tensor([[True, False, True], [True, True, False]]))
    assert pairs.modality.tolist() == [0, 0, 1, 2]
    assert pairs.sample.tolist() == [0, 1, 1, 0]
    dense = pairs.unpack(torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    assert dense[..., 0].tolist() == [[1.0, 0.0, 4.0], [2.0, 3.0, 0.0]]


def test_weights_survive_a_state_dict() -> None:
    one, two, image = prism_net(), prism_net(), randn(4, 3, 6, 6, seed=20)
    with torch.no_grad():
        for param in two.parameters():
            param.add_(0.3)
    assert not torch.equal(one.segment(image, MASK), two.segment(image, MASK))
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.segment(image, MASK), two.segment(image, MASK))


def test_the_3d_net_is_laid_out_for_the_fast_convolution() -> None:
    weight = PrismNet(spatial_dims=3, width=2).encoders[0].blocks[1][0].weight  # type: ignore
    assert weight.is_contiguous(memory_format=torch.channels_last_3d)


# ---------------------------------------------------------------- messages


def test_a_sample_that_is_shown_nothing_is_refused() -> None:
    mask = torch.tensor([[True, True, True], [False, False, False]])
    message = "mask: a sample is shown no modality; each row needs at least one True"
    image = torch.zeros(2, 3, 8, 8, dtype=F64)
    for call in (prism_net(), prism_net().segment):
        with pytest.raises(ValueError, match=message):
            call(image, mask)


@pytest.mark.parametrize(
    ("image", "mask", "got"),
    [
        ((1, 2, 8, 8), (1, 2), r"\(1, 2, 8, 8\), \(1, 2\)"),
        ((1, 3, 8, 8), (1, 2), r"\(1, 3, 8, 8\), \(1, 2\)"),
        ((2, 3, 8, 8), (1, 3), r"\(2, 3, 8, 8\), \(1, 3\)"),
    ],
)
def test_a_wrong_number_of_modalities_is_refused(
    image: tuple[int, ...], mask: tuple[int, ...], got: str
) -> None:
    message = (
        rf"image, mask: got {got}; expected \(B, 3, \*S\) and \(B, 3\) for this model's modalities"
    )
    for call in (prism_net(), prism_net().segment):
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(image, dtype=F64), torch.ones(mask).bool())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_modalities": 0}, "num_modalities: got 0, expected at least 1"),
        ({"num_classes": 1}, "num_classes: got 1, expected at least 2"),
        ({"width": 0}, "width: got 0, expected at least 1"),
        ({"depth": 1}, "depth: got 1, expected at least 2"),
        ({"spatial_dims": 4}, "spatial_dims: got 4, expected 2 or 3"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrismNet(**options)
