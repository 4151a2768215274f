"""The convolution in two slabs equals torch's, with its derivatives."""

from __future__ import annotations

import pytest
import torch
from helpers import F64, randn
from torch import Tensor
from torch.nn import functional as F  # noqa: N812, torch's own convention

from prism_meta.networks import blocks
from prism_meta.networks.blocks import Conv3d, Encoder


def convolutions(size: tuple[int, ...], stride: int, bias: bool) -> tuple[Conv3d, Tensor]:
    layer = Conv3d(3, 4, stride=stride, bias=bias).double()
    with torch.no_grad():
        layer.weight.copy_(randn(*layer.weight.shape, seed=1))
    return layer, randn(1, 3, *size, seed=2).requires_grad_()


def derivatives(out: Tensor, layer: Conv3d, x: Tensor) -> list[Tensor]:
    """The output, its gradients, and the second derivative along those."""
    inputs = [x, *layer.parameters()]
    first = torch.autograd.grad(out.square().sum() + out.sum(), inputs, create_graph=True)
    total = torch.stack([g.square().sum() for g in first]).sum()
    return [out, *first, *torch.autograd.grad(total, inputs)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("planes", range(1, 10))
def test_two_slabs_are_one_convolution(planes: int, stride: int, bias: bool) -> None:
    layer, x = convolutions((planes, 5, 4), stride, bias)
    plain = F.conv3d(x, layer.weight, layer.bias, stride=stride, padding=1)
    for mine, torchs in zip(
        derivatives(layer(x), layer, x), derivatives(plain, layer, x), strict=True
    ):
        torch.testing.assert_close(mine, torchs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("batch", "planes", "cut"), [(1, 8, True), (2, 8, False), (1, 1, False)])
def test_a_batch_of_one_is_cut(
    batch: int, planes: int, cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def spy(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        seen.append(len(x))
        return torch.conv3d(x, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(blocks.F, "conv3d", spy)
    Conv3d(3, 4)(torch.zeros(batch, 3, planes, 5, 4))
    assert seen == [2 if cut else batch]


def test_a_large_batch_of_one_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = torch.nn.Conv3d.forward

    def spy(self: torch.nn.Conv3d, x: Tensor) -> Tensor:
        seen.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Conv3d, "forward", spy)
    Conv3d(1, 1)(torch.zeros(1, 1, 160, 129, 2))
    assert seen == [1]


def test_the_encoder_halves_and_doubles() -> None:
    encoder = Encoder([2, 4, 8], 3).double()
    scales = encoder(torch.zeros(2, 1, 9, 8, 7, dtype=F64))
    assert [tuple(s.shape) for s in scales] == [
        (2, 2, 9, 8, 7),
        (2, 4, 5, 4, 4),
        (2, 8, 3, 2, 2),
    ]
