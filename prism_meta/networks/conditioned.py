"""A U-Net that is told which modalities are there, by a scale and a shift of its features."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from prism_meta.networks.outputs import logit_maps
from prism_meta.networks.wrapped import WrappedNet, hidden

#: Number of features of a mask, from which the scales and shifts are made.
_CODE = 32


class FiLM(nn.Module):
    """Scale and shift of features by a code: x_c <- (1 + gamma_c) x_c + beta_c, both linear in the code.

    gamma and beta start at 0, so that nothing is changed before training.

    Args:
        code: size of the code.
        channels: C.

    Source: FiLM, Perez et al., AAAI 2018.

    Example:
        >>> FiLM(4, 2)(torch.ones(1, 2, 3), torch.randn(1, 4)).tolist()
        [[[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]]
    """

    def __init__(self, code: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(code, 2 * channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor, code: Tensor) -> Tensor:
        """Features (N, C, *S) and codes (N, code) to (N, C, *S)."""
        scale, shift = (
            part.view(*part.shape, *[1] * (features.ndim - 2))
            for part in self.linear(code).chunk(2, 1)
        )
        changed: Tensor = (1 + scale) * features + shift
        return changed


class ConditionedUNet(nn.Module):
    """MONAI's U-Net, with FiLM from the mask after each of its encoder's scales.

    A linear layer and LeakyReLU turn the mask into a code, and each scale has a ``FiLM`` of its own. Their
    parameters are named ``code.*`` and ``films.*``. With fresh weights the net is the U-Net itself.

    Args:
        num_modalities: M.
        num_classes: K, including the background.
        spatial_dims: 2 or 3.
        width: number of channels at full resolution; it doubles at each coarser scale.
        depth: number of scales, at least 2.

    Shapes: ``net(image, mask)`` takes image (N, M, *S) and mask bool (N, M) and returns logits (N, K, *S).

    Source: Ronneberger et al., MICCAI 2015; FiLM, Perez et al., AAAI 2018.

    Example:
        >>> net = ConditionedUNet(num_modalities=2, num_classes=3, spatial_dims=2, width=2, depth=2)
        >>> net(torch.randn(1, 2, 8, 8), torch.tensor([[True, False]])).shape
        torch.Size([1, 3, 8, 8])
    """

    def __init__(
        self, *, num_modalities: int, num_classes: int, spatial_dims: int, width: int, depth: int
    ) -> None:
        super().__init__()
        channels = [width * 2**scale for scale in range(depth)]
        block = unet(num_modalities, num_classes, spatial_dims, channels).get_submodule("model")
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for _ in pairwise(channels):
            # MONAI nests a scale as (down, skip connection around the next scale, up).
            down, skip, up = block.children()
            self.downs.append(down)
            self.ups.append(up)
            block = skip.get_submodule("submodule")
        self.bottom = block
        self.code = nn.Sequential(nn.Linear(num_modalities, _CODE), nn.LeakyReLU())
        self.films = nn.ModuleList(FiLM(_CODE, c) for c in channels)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        code = self.code(mask.to(image.dtype))
        x: Tensor = image
        skips: list[Tensor] = []
        *films, last = self.films
        for down, film in zip(self.downs, films, strict=True):
            x = film(down(x), code)
            skips.append(x)
        x = last(self.bottom(x), code)
        for up, skip in zip(reversed(self.ups), reversed(skips), strict=True):
            x = up(torch.cat((skip, x), 1))
        return x


class ConditionedNet(WrappedNet):
    """A net that takes an image and a mask, with PrismNet's signature; see ``wrap`` for what it does.

    Args:
        net: maps an image (N, M, *S), zero where it is hidden, and a mask bool (N, M) to logits (N, K, *S).
        modalities: names of the M channels, in order.

    Example:
        >>> net = ConditionedUNet(num_modalities=2, num_classes=3, spatial_dims=2, width=2, depth=2)
        >>> model = ConditionedNet(net, ("t1", "t2"))
        >>> model(torch.randn(1, 2, 8, 8), torch.tensor([[True, False]])).fused.shape
        torch.Size([1, 3, 8, 8])
    """

    def _decode(
        self, encoded: Tensor, sample: Tensor, mask: Tensor, *, size: torch.Size
    ) -> tuple[Tensor, ...]:
        return logit_maps(self.net(hidden(encoded[sample], mask), mask), len(sample), size)


def unet(
    num_modalities: int, num_classes: int, spatial_dims: int, channels: list[int]
) -> nn.Module:
    """MONAI's U-Net with residual units and InstanceNorm."""
    from monai.networks.nets.unet import UNet

    net: nn.Module = UNet(
        spatial_dims=spatial_dims,
        in_channels=num_modalities,
        out_channels=num_classes,
        channels=channels,
        strides=[2] * (len(channels) - 1),
        num_res_units=2,
        norm="instance",
    )
    return net
