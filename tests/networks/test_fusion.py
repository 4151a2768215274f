"""Fusions against loops over samples, and the rules that all of them keep."""

from __future__ import annotations

import higher
import pytest
import torch
from helpers import F64, prism_batch, prism_net, randn, randomize
from torch import Tensor

from prism_meta.bilevel.inner import SGD
from prism_meta.bilevel.strategies import SecondOrder
from prism_meta.networks.fusion import (
    AttentionFusion,
    Fusion,
    Groups,
    MeanFusion,
    RegionAwareFusion,
)
from prism_meta.objective.prism import PrismObjective

ALL = (RegionAwareFusion, MeanFusion, AttentionFusion)
every_fusion = pytest.mark.parametrize("kind", ALL)
every_size = pytest.mark.parametrize("size", [(3, 4), (3, 2, 4)], ids=["2-D", "3-D"])

#: Sample 0 shows modalities 0, 1 and 2; sample 1 shows 1; sample 2 shows 0 and 2.
GROUPS = Groups(torch.tensor([0, 2, 0, 1, 0, 2]), torch.tensor([0, 0, 1, 1, 2, 2]), 3)
MEMBERS = ([0, 2, 4], [3], [1, 5])
CHANNELS, CLASSES = 4, 3


def make(kind: type[Fusion], dims: int) -> Fusion:
    fusion = kind(CHANNELS, num_modalities=3, num_classes=CLASSES, spatial_dims=dims)
    randomize(fusion, seed=3)
    return fusion


def inputs(size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    features = randn(6, CHANNELS, *size, seed=4)
    return features, randn(3, CLASSES, *size, seed=5).softmax(1)


def weights_by_loops(fusion: Fusion, n: int, features: Tensor, regions: Tensor) -> Tensor:
    """(m, C, *s) for the m modalities of sample n, voxel by voxel where the rule is by voxel."""
    own, modality = features[MEMBERS[n]], GROUPS.modality[MEMBERS[n]]
    count, voxels = len(own), own[0, 0].numel()
    flat, maps = own.flatten(2), regions[n].flatten(1)
    scores = torch.zeros(count, CHANNELS, voxels, dtype=F64)
    if isinstance(fusion, RegionAwareFusion):
        linear = fusion.score.weight.flatten(1)
        for i, m in enumerate(modality.tolist()):
            scores[i] = linear @ flat[i]
            for k in range(CLASSES):
                mean = (maps[k] * flat[i]).sum(1) / (maps[k].sum() + 1e-6)
                worth = mean @ fusion.by_region[k] + fusion.by_modality[m, k]
                scores[i] += maps[k] * worth[:, None]
    elif isinstance(fusion, AttentionFusion):
        width = CHANNELS // fusion.heads
        tokens = flat + fusion.embedding[modality][:, :, None]
        assert fusion.query.bias is not None
        query = fusion.query.weight.flatten(1) @ tokens.mean(0) + fusion.query.bias[:, None]
        for i in range(count):
            key = fusion.key.weight.flatten(1) @ tokens[i]
            for h in range(fusion.heads):
                part = slice(h * width, (h + 1) * width)
                scores[i, part] = (query[part] * key[part]).sum(0) / width**0.5
    return scores.softmax(0).view_as(own)


@every_size
@every_fusion
def test_mean_and_variance_under_the_weights(kind: type[Fusion], size: tuple[int, ...]) -> None:
    fusion = make(kind, len(size))
    features, regions = inputs(size)
    weight, bias = fusion.mix.weight.flatten(1), fusion.mix.bias
    assert bias is not None
    out = fusion(features, GROUPS, regions)
    for n, members in enumerate(MEMBERS):
        share, own = weights_by_loops(fusion, n, features, regions), features[members]
        mean = (share * own).sum(0)
        moments = torch.cat((mean, (share * (own - mean) ** 2).sum(0)))
        expected = torch.einsum("oc,c...->o...", weight, moments) + bias.view(-1, *[1] * len(size))
        torch.testing.assert_close(out[n], expected, rtol=1e-10, atol=1e-10)


def test_equal_weights_are_hemis() -> None:
    fusion = make(MeanFusion, 2)
    features, regions = inputs((3, 4))
    own = features[MEMBERS[0]]
    moments = torch.cat((own.mean(0), own.var(0, unbiased=False)))
    torch.testing.assert_close(fusion(features, GROUPS, regions)[0], fusion.mix(moments[None])[0])


@every_size
@every_fusion
def test_a_single_row_is_a_group_of_one(kind: type[Fusion], size: tuple[int, ...]) -> None:
    fusion = make(kind, len(size))
    features, regions = inputs(size)
    one = Groups(torch.arange(6), GROUPS.modality, 6)
    torch.testing.assert_close(
        fusion.fuse_single(features),
        fusion(features, one, regions.repeat(2, *[1] * (1 + len(size)))),
    )


@every_fusion
def test_the_order_of_the_rows_does_not_matter(kind: type[Fusion]) -> None:
    fusion, order = make(kind, 2), torch.tensor([3, 5, 0, 1, 4, 2])
    features, regions = inputs((3, 4))
    shuffled = Groups(GROUPS.sample[order], GROUPS.modality[order], 3)
    torch.testing.assert_close(
        fusion(features[order], shuffled, regions), fusion(features, GROUPS, regions)
    )


def test_an_empty_region_is_finite_to_the_second_derivative() -> None:
    fusion = make(RegionAwareFusion, 2)
    features, regions = inputs((3, 4))
    regions = torch.zeros_like(regions).index_fill_(1, torch.tensor([0]), 1.0)
    leaf = features.requires_grad_()
    (first,) = torch.autograd.grad(
        fusion(leaf, GROUPS, regions).square().sum(), leaf, create_graph=True
    )
    (second,) = torch.autograd.grad(first.square().sum(), leaf)
    assert bool(first.isfinite().all()) and bool(second.isfinite().all())


def test_softmax_of_large_scores_is_finite() -> None:
    scores = torch.tensor([1e4, -1e4, 1e4, 7.0, 0.0, -1e4])
    shares = GROUPS.softmax(scores)
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.5, 0.5, 1.0, 0.0, 0.5]))


def test_heads_divide_the_channels() -> None:
    sizes = {c: AttentionFusion(c, num_modalities=2, num_classes=2, spatial_dims=2).heads
             for c in (1, 6, 8, 10)}  # fmt: skip
    assert sizes == {1: 1, 6: 3, 8: 4, 10: 2}


@every_fusion
def test_prm_maps_guide_and_are_not_taught(kind: type[Fusion]) -> None:
    """L_fuse on its own gives no gradient to a prm head, but for RegionAwareFusion a prm head changes it."""
    net = prism_net(fusion=kind, depth=3)
    randomize(net, seed=6, scale=0.3)
    batch = prism_batch([[True, True, False], [True, True, True]], 8, 8, seed=7)
    heads = list(net.decoder.prm_heads.parameters())
    fused = net(batch.image, batch.mask).fused
    grads = torch.autograd.grad(fused.square().sum(), heads, allow_unused=True)
    assert all(g is None for g in grads)
    with torch.no_grad():
        for head in heads:
            head.mul_(-2)
    moved = (net(batch.image, batch.mask).fused - fused).abs().max()
    assert bool(moved > 1e-6) == (kind is RegionAwareFusion)


@every_fusion
def test_every_fusion_trains_in_second_order(kind: type[Fusion]) -> None:
    net, batch = prism_net(fusion=kind), prism_batch([[True, True, True]] * 2, 6, 6, seed=8)
    result = SecondOrder(SGD(0.05)).meta_gradient(net, PrismObjective(), batch, batch)
    assert all(bool(result.gradient[n].any()) for n, _ in net.named_parameters())


@every_fusion
def test_higher_can_patch_a_net_with_it(kind: type[Fusion]) -> None:
    """As users of higher do; it cannot subclass a module that has ABC among its bases."""
    net, batch = prism_net(fusion=kind), prism_batch([[True, True, True]], 6, 6, seed=9)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    with higher.innerloop_ctx(net, optimizer) as (patched, _):
        torch.testing.assert_close(
            patched(batch.image, batch.mask).fused, net(batch.image, batch.mask).fused
        )
