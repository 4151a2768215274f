"""Convolutions, blocks and the encoder of PrismNet, in 2-D and 3-D."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, torch's own convention

#: With at most this many values in (C, D, H) and a batch of one, torch's CPU convolution does not use oneDNN.
_SLOW_BELOW = 20_480


class Conv3d(nn.Conv3d):
    """A 3 x 3 x 3 convolution, padded by 1, that stays fast on a CPU for a batch of one.

    For a batch of one with few channels, torch selects a kernel that is up to 15 times slower than
    oneDNN's. This layer cuts the volume into two overlapping slabs and runs them as a batch of two. The
    result is the same up to rounding, at half the cost of a real batch of two.

    Args:
        ins: C of the input.
        outs: C of the output.
        stride: 1, or 2 to halve the grid. Defaults to 1.
        bias: True adds a learned constant per channel. Defaults to True.

    Example:
        >>> conv = Conv3d(2, 3)
        >>> x = torch.randn(1, 2, 7, 4, 4)
        >>> plain = F.conv3d(x, conv.weight, conv.bias, padding=1)
        >>> bool(torch.allclose(conv(x), plain, atol=1e-5))
        True
    """

    def __init__(self, ins: int, outs: int, *, stride: int = 1, bias: bool = True) -> None:
        super().__init__(ins, outs, 3, stride=stride, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape  # read once: in a second-order step each access to a tensor costs a call
        planes = (shape[2] - 1) // self.stride[0] + 1
        slow = shape[0] == 1 and prod(shape[:-1]) <= _SLOW_BELOW and x.device.type == "cpu"
        if not slow or planes < 2:
            return super().forward(x)
        # If the number of planes is odd, both slabs compute the middle one.
        half = (planes + 1) // 2
        slab = (half - 1) * self.stride[0] + 3
        second = (planes - half) * self.stride[0]
        padded = F.pad(x, (0, 0, 0, 0, 1, 1))
        slabs = torch.cat((padded[:, :, :slab], padded[:, :, second : second + slab]))
        out = F.conv3d(slabs, self.weight, self.bias, self.stride, padding=(0, 1, 1))
        return torch.cat((out[:1, :, : planes - half], out[1:]), 2)


class Conv2d(nn.Conv2d):
    """A 3 x 3 convolution, padded by 1; see ``Conv3d`` for the arguments.

    Example:
        >>> Conv2d(2, 3, stride=2)(torch.randn(1, 2, 7, 4)).shape
        torch.Size([1, 3, 4, 2])
    """

    def __init__(self, ins: int, outs: int, *, stride: int = 1, bias: bool = True) -> None:
        super().__init__(ins, outs, 3, stride=stride, padding=1, bias=bias)


def conv(
    ins: int, outs: int, spatial_dims: int, *, stride: int = 1, bias: bool = True
) -> nn.Module:
    """A convolution over the 3 x 3 (x 3) neighbourhood of each voxel."""
    kind = Conv3d if spatial_dims == 3 else Conv2d
    return kind(ins, outs, stride=stride, bias=bias)


def pointwise(
    ins: int, outs: int, spatial_dims: int, *, bias: bool = True
) -> nn.Conv2d | nn.Conv3d:
    """A linear map of each voxel's channels."""
    kind = nn.Conv3d if spatial_dims == 3 else nn.Conv2d
    return kind(ins, outs, 1, bias=bias)


def block(ins: int, outs: int, spatial_dims: int, *, stride: int = 1) -> nn.Sequential:
    """Two times (convolution, instance normalisation, LeakyReLU)."""
    return nn.Sequential(
        conv(ins, outs, spatial_dims, stride=stride, bias=False),
        _norm(outs),
        nn.LeakyReLU(0.01),
        conv(outs, outs, spatial_dims, bias=False),
        _norm(outs),
        nn.LeakyReLU(0.01),
    )


class Encoder(nn.Module):
    """Maps images (N, 1, *S) to features at every scale, finest first.

    Args:
        channels: C at each scale, finest first.
        spatial_dims: 2 or 3.

    Example:
        >>> [tuple(scale.shape) for scale in Encoder([2, 4], 2)(torch.randn(3, 1, 8, 8))]
        [(3, 2, 8, 8), (3, 4, 4, 4)]
    """

    def __init__(self, channels: Sequence[int], spatial_dims: int) -> None:
        super().__init__()
        ins = [1, *channels[:-1]]
        self.blocks = nn.ModuleList(
            block(i, o, spatial_dims, stride=1 if scale == 0 else 2)
            for scale, (i, o) in enumerate(zip(ins, channels, strict=True))
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        scales = []
        for part in self.blocks:
            x = part(x)
            scales.append(x)
        return scales


def _norm(channels: int) -> nn.Module:
    """Instance normalisation. On a CPU, GroupNorm takes a third of the time of torch's InstanceNorm."""
    return nn.GroupNorm(channels, channels)
