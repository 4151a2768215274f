"""MONAI's nets, wrapped: their outputs, and training in both orders."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import randn, relative_error
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.segresnet import SegResNet
from monai.networks.nets.segresnet_ds import SegResNetDS
from monai.networks.nets.swin_unetr import SwinUNETR
from monai.networks.nets.unet import UNet
from monai.networks.nets.unetr import UNETR
from torch import Tensor, nn

from prism_meta.bilevel.inner import SGD
from prism_meta.bilevel.learner import MetaLearner
from prism_meta.bilevel.preflight import preflight
from prism_meta.bilevel.strategies import FirstOrder, MetaStrategy, SecondOrder
from prism_meta.modalities import Batch
from prism_meta.networks.wrapped import WrappedNet, wrap
from prism_meta.objective.prism import PrismObjective

NAMES = ("flair", "t1ce", "t1")
MASK = torch.tensor([[True, False, True], [False, True, False]])
CHANNELS: dict[str, Any] = {"in_channels": 3, "out_channels": 3}
#: Instance norm has nothing to normalise at the single voxel of its coarsest scale.
SWIN: dict[str, Any] = {
    **CHANNELS, "feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 2,
    "norm_name": ("group", {"num_groups": 4}), "spatial_dims": 2,
}  # fmt: skip
UNETR_SIZE: dict[str, Any] = {
    **CHANNELS, "img_size": 16, "feature_size": 4, "hidden_size": 16, "mlp_dim": 16, "num_heads": 2,
}  # fmt: skip


def plain() -> nn.Module:
    """No net of MONAI's."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1)
    )


def dynunet(**options: Any) -> nn.Module:
    scales = {"kernel_size": (3,) * 4, "strides": (1, 2, 2, 2), "upsample_kernel_size": (2,) * 3}
    return DynUNet(3, **CHANNELS, **scales, filters=(4, 8, 8, 8), **options)


#: Name: how to build it, the layer before its last, and the image's size.
NETS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "plain": (plain, "2", (16, 16)),
    "UNet": (lambda: UNet(3, 3, 3, channels=(4, 8), strides=(2,)), "model.1", (16, 16, 16)),
    "DynUNet": (dynunet, "upsamples.2", (16, 16, 16)),
    "DynUNet with deep supervision": (
        lambda: dynunet(deep_supervision=True, deep_supr_num=2), "upsamples.2", (16, 16, 16),
    ),
    "SegResNet": (
        lambda: SegResNet(3, 8, **CHANNELS, blocks_down=(1, 1), blocks_up=(1,)), "up_layers.0",
        (16, 16, 16),
    ),
    "SegResNetDS": (
        lambda: SegResNetDS(2, 8, **CHANNELS, blocks_down=(1, 1, 1), norm="INSTANCE", dsdepth=2),
        "up_layers.1.blocks", (16, 16),
    ),
    "UNETR": (lambda: UNETR(**UNETR_SIZE), "decoder2", (16, 16, 16)),
    "SwinUNETR": (lambda: SwinUNETR(**SWIN), "decoder1", (32, 32)),
}  # fmt: skip
STRATEGIES = [
    pytest.param(FirstOrder(SGD(0.05)), id="first-order"),
    pytest.param(SecondOrder(SGD(0.05)), id="second-order"),
]


def built(name: str, *, features: bool = False) -> WrappedNet:
    build, layer, _ = NETS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return wrap(build(), NAMES, features=layer if features else None)


def batch(name: str, rows: list[list[bool]], *, seed: int) -> Batch:
    """Labels that the images of the batch tell: whether the sum of the modalities is above 0."""
    image = randn(len(rows), 3, *NETS[name][2], seed=seed).float()
    return Batch(image, torch.tensor(rows), (image.sum(1) > 0).long())


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_net_trains_with_the_whole_objective(name: str, strategy: MetaStrategy) -> None:
    """A few steps on one episode: both losses fall, and every term is there."""
    train = batch(name, [[True, False, True], [True, True, False]], seed=1)
    meta = batch(name, [[True, True, False], [False, False, True]], seed=2)
    model = built(name, features=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    learner = MetaLearner(model, PrismObjective(delta=0.1), strategy, optimizer)
    values = [learner.step(train, meta) for _ in range(3)]
    for kind in ("train_loss", "meta_loss"):
        course = [float(getattr(value, kind)) for value in values]
        assert course == sorted(course, reverse=True), (kind, course)
    terms = values[0].terms
    assert all(bool((terms[name] > 0).any()) for name in ("fuse", "uni", "pixel", "proto"))


@pytest.mark.parametrize("name", NETS)
def test_outputs_are_the_nets_own(name: str) -> None:
    model = built(name).eval()
    image = randn(2, 3, *NETS[name][2], seed=4).float()
    dirty = image.masked_fill(~MASK.view(2, 3, *[1] * (image.ndim - 2)), float("nan"))
    with torch.no_grad():
        out = model(dirty, MASK)

        def shown_only(n: int, shown: Tensor) -> Tensor:
            logits: Tensor = model.net(image[n : n + 1] * shown.view(1, 3, *[1] * (image.ndim - 2)))
            return (logits[0] if isinstance(logits, (tuple, list)) else logits)[0]

        for n in range(2):
            torch.testing.assert_close(out.fused[n], shown_only(n, MASK[n]), rtol=1e-3, atol=1e-4)
            for m in MASK[n].nonzero()[:, 0].tolist():
                one = torch.arange(3) == m
                torch.testing.assert_close(
                    out.unimodal[n, m], shown_only(n, one), rtol=1e-3, atol=1e-4
                )


@pytest.mark.parametrize(
    ("name", "scales"),
    [("DynUNet with deep supervision", [16, 16]), ("SegResNetDS", [8]), ("UNet", [])],
)
def test_deep_supervision_gives_prm_maps_in_training(name: str, scales: list[int]) -> None:
    model, data = built(name), batch(name, MASK.tolist(), seed=5)
    out = model(data.image, data.mask)
    dims = data.image.ndim - 2
    assert [p.shape for p in out.prm] == [(2, 3, *[s] * dims) for s in scales]
    assert model.eval()(data.image, data.mask).prm == ()


def test_a_layer_of_tokens_is_refused() -> None:
    model = wrap(UNETR(**UNETR_SIZE), NAMES, features="vit.norm")
    message = (
        "features: vit.norm returned (3, 1, 16), expected (N, C, *s) with N = 3 and 3 spatial "
    )
    data = batch("UNETR", [[True, True, False]], seed=6)
    with pytest.raises(ValueError, match=re.escape(message)):
        model(data.image, data.mask)


@pytest.mark.parametrize(
    "strategy", [FirstOrder(SGD(0.05)), SecondOrder(SGD(0.05), graph="recomputed")]
)
def test_checkpointing_changes_no_gradient(strategy: MetaStrategy) -> None:
    results = []
    for on in (False, True):
        torch.manual_seed(0)
        model = wrap(SwinUNETR(**SWIN, use_checkpoint=on), NAMES).double()
        data = [batch("SwinUNETR", [[True, False, True]], seed=seed) for seed in (8, 9)]
        train, meta = (replace(b, image=b.image.double()) for b in data)
        results.append(strategy.meta_gradient(model, PrismObjective(), train, meta))
    plain, checkpointed = (r.gradient for r in results)
    assert relative_error(checkpointed, plain) <= 1e-12


@pytest.mark.parametrize("name", NETS)
def test_preflight_finds_no_error(name: str) -> None:
    report = preflight(built(name), PrismObjective(), batch(name, MASK.tolist(), seed=7))
    assert report.ok
    # The transformer blocks of MONAI have parts for cross attention, whether they are used or not.
    unused = [f.where for f in report.findings if "cross_attn" not in f.where]
    assert unused == []


def test_what_preflight_says_about_flash_attention_is_so() -> None:
    torch.manual_seed(0)
    net = UNETR(**UNETR_SIZE)
    for module in net.modules():
        if hasattr(module, "use_flash_attention"):
            module.use_flash_attention = True
        if hasattr(module, "inplace"):
            module.inplace = False
    model, data = wrap(net, NAMES), batch("UNETR", MASK.tolist(), seed=8)
    report = preflight(model, PrismObjective(), data)
    assert report.ok
    notes = [f.what for f in report.findings if f.where == "SecondOrder"]
    assert len(notes) == 1 and notes[0].startswith("attention runs its math backend")
    first = FirstOrder(SGD(0.05)).meta_gradient(model, PrismObjective(), data, data)
    second = SecondOrder(SGD(0.05)).meta_gradient(model, PrismObjective(), data, data)
    torch.testing.assert_close(second.meta_loss, first.meta_loss)
