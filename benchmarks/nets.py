"""Nets for the benchmarks of strategies, each with an objective and the batches of an episode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import prism_meta as pm

LR = 0.01
Params = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """One measurement: a net, the size of its patches, and the number of inner steps."""

    net: str
    steps: int
    size: int
    batch: int
    threads: int
    seed: int


class UNet(nn.Module):
    """A plain 3-D U-Net with three scales and 0.33 M parameters."""

    def __init__(self, ins: int = 4, outs: int = 4, width: int = 16) -> None:
        super().__init__()

        def block(a: int, b: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv3d(a, b, 3, stride, padding=1, bias=False),
                nn.InstanceNorm3d(b, affine=True),
                nn.LeakyReLU(0.01),
                nn.Conv3d(b, b, 3, padding=1, bias=False),
                nn.InstanceNorm3d(b, affine=True),
                nn.LeakyReLU(0.01),
            )

        w = width
        self.down = nn.ModuleList([block(ins, w), block(w, 2 * w, 2), block(2 * w, 4 * w, 2)])
        self.up = nn.ModuleList([block(6 * w, 2 * w), block(3 * w, w)])
        self.head = nn.Conv3d(w, outs, 1)

    def forward(self, x: Tensor) -> Tensor:
        scales = []
        for block in self.down:
            x = block(x)
            scales.append(x)
        for block, skip in zip(self.up, scales[-2::-1], strict=True):
            x = nn.functional.interpolate(x, size=skip.shape[2:], mode="trilinear")
            x = block(torch.cat((x, skip), 1))
        out: Tensor = self.head(x)
        return out


def segmentation(forward: Callable[..., Any], batch: pm.Batch) -> Tensor:
    """CE + Dice of a net that maps an image to logits."""
    logits = forward(batch.image)
    return pm.losses.segmentation(logits, batch.target, weighted=False).mean()


def build(setting: Setting) -> tuple[nn.Module, Callable[..., Any], pm.Batch, pm.Batch]:
    """A net, its objective, and the train and meta batches of an episode."""
    torch.manual_seed(setting.seed)
    shape = (setting.size,) * 3

    def draw(mask: list[list[bool]]) -> pm.Batch:
        rows = [mask[i % len(mask)] for i in range(setting.batch)]
        image = torch.randn(setting.batch, 4, *shape)
        # Labels are blobs, not noise: a smooth field cut at three levels.
        field = nn.functional.interpolate(
            torch.randn(setting.batch, 1, 6, 6, 6), size=shape, mode="trilinear"
        )[:, 0]
        target = torch.bucketize(field, torch.tensor([0.5, 0.8, 1.1]))
        return pm.Batch(image + field[:, None], torch.tensor(rows), target)

    full = [[True] * 4]
    if setting.net == "unet":
        net: nn.Module = UNet().to(memory_format=torch.channels_last_3d)
        return net, segmentation, draw(full), draw(full)
    if setting.net == "segresnet":
        from monai.networks.nets import SegResNet

        net = SegResNet(spatial_dims=3, init_filters=8, in_channels=4, out_channels=4)
        net = net.to(memory_format=torch.channels_last_3d)  # like the other nets
        return net, segmentation, draw(full), draw(full)
    half = [[True, True, False, False], [True, False, True, False]]
    return pm.PrismNet(4, 4, 3, 8), pm.PrismObjective(weighted=False), draw(half), draw(half)


def loss_of(value: Any) -> Tensor:
    loss: Tensor = value if isinstance(value, Tensor) else value.loss
    return loss


def flat(params: Params) -> Tensor:
    return torch.cat([p.detach().double().flatten() for _, p in sorted(params.items())])
