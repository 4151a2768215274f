"""Small nets to wrap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import randomize
from monai.networks.nets.unet import UNet
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, torch's own convention

from prism_meta.bilevel.inner import SGD
from prism_meta.bilevel.strategies import FirstOrder, SecondOrder, SingleLevel

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
    """A net that records its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.head = nn.Conv2d(3, 2, 1)
        self.double()

    def forward(self, image: Tensor) -> Tensor:
        self.seen.append(image)
        out: Tensor = self.head(image)
        return out


def layers() -> nn.Sequential:
    """A net with coarse features in layer 1, which layer 2 changes in place, and fine ones in layer 4."""
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


class Giving(nn.Module):
    """A net that returns ``form(...)`` of its logits at full, half and quarter resolution."""

    def __init__(self, form: Callable[..., Any]) -> None:
        super().__init__()
        self.form = form
        self.heads = nn.ModuleList(nn.Conv2d(3, 2, 1) for _ in range(3))
        self.double()

    def forward(self, image: Tensor) -> Any:
        return self.form(*(head(F.avg_pool2d(image, 2**k)) for k, head in enumerate(self.heads)))


class Encoders(nn.Module):
    """A net with an encoder per modality, a masked mean as fusion, and a separate unimodal decoder."""

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
