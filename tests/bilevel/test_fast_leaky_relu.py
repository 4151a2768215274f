"""LeakyReLU keeps its output for its derivatives: the same numbers to the bit, and its input is free."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F  # noqa: N812, torch's own convention
from torch.utils.checkpoint import checkpoint

from prism_meta.bilevel.functional.fast_derivatives import Interception


def block() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.LeakyReLU(0.1),
        nn.Conv2d(4, 2, 3, padding=1),
        nn.LeakyReLU(0.1),
    )


def derivatives(net: nn.Module, *, lean: bool) -> list[Tensor]:
    """Gradient and the gradient of its square."""
    image = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    params = list(net.parameters())
    with Interception() if lean else nullcontext():
        loss = net(image).square().mean()
    first = torch.autograd.grad(loss, params, create_graph=True)
    second = torch.autograd.grad([g.square().sum() for g in first], params)
    return [*first, *second]


def test_both_derivatives_are_the_same_to_the_bit() -> None:
    net = block()
    for ours, own in zip(derivatives(net, lean=True), derivatives(net, lean=False), strict=True):
        assert torch.equal(ours, own)


def freed(follow: Callable[[Tensor], Tensor], *, lean: bool) -> bool:
    """Whether a LeakyReLU's input is free while what ``follow`` makes of its output is alive."""
    weight = torch.randn(2, 2, 3, 3, requires_grad=True)
    with Interception() if lean else nullcontext():
        x = F.conv2d(torch.randn(1, 2, 6, 6), weight)
        memory = StorageWeakRef(x.untyped_storage())
        result = follow(F.leaky_relu(x, 0.1))
        del x
    free: bool = memory.expired()
    assert result.requires_grad
    return free


@pytest.mark.parametrize("follow", [lambda y: F.conv2d(y, y), lambda y: 2 * y])
def test_input_is_free_after_the_forward_pass(follow: Callable[[Tensor], Tensor]) -> None:
    assert freed(follow, lean=True)
    assert not freed(follow, lean=False)


def test_input_is_free_in_the_graph_of_the_gradient() -> None:
    weight = torch.randn(2, 2, 3, 3, requires_grad=True)
    with Interception():
        x = F.conv2d(torch.randn(1, 2, 6, 6), weight)
        memory = StorageWeakRef(x.untyped_storage())
        loss = F.leaky_relu(x, 0.1).square().sum()
        del x
    (gradient,) = torch.autograd.grad(loss, [weight], create_graph=True)
    assert memory.expired()
    assert gradient.requires_grad


def test_output_is_free_after_the_backward_pass() -> None:
    weight = torch.randn(2, 2, 3, 3, requires_grad=True)
    with Interception():
        y = F.leaky_relu(F.conv2d(torch.randn(1, 2, 6, 6), weight), 0.1)
        memory = StorageWeakRef(y.untyped_storage())
        loss = y.square().sum()
        del y
    torch.autograd.grad(loss, [weight])
    assert memory.expired()
    assert loss.requires_grad  # the graph itself is alive


def slope_of(function: Callable[[Tensor], Tensor]) -> Tensor:
    x = torch.tensor([-2.0, 3.0], requires_grad=True)
    with Interception():
        y = function(2 * x)
    (slope,) = torch.autograd.grad(y.sum(), [x])
    return slope


def test_output_changed_in_place_before_a_convolution_took_it() -> None:
    assert slope_of(lambda x: F.leaky_relu(x, 0.1).add_(1e3)).tolist() == [
        pytest.approx(0.2),
        pytest.approx(2.0),
    ]


def test_output_changed_in_place_afterwards() -> None:
    x = torch.ones(3, requires_grad=True)
    with Interception():
        y = F.leaky_relu(2 * x)
    with torch.no_grad():
        y.zero_()
    with pytest.raises(RuntimeError, match=r"inplace operation: .* a LeakyReLU, of shape \(3,\)"):
        y.sum().backward()


def test_negative_slope_keeps_the_input() -> None:
    assert slope_of(lambda x: F.leaky_relu(x, -0.5)).tolist() == [-1.0, 2.0]


def test_other_hooks_keep_their_charge() -> None:
    image = torch.randn(1, 2, 6, 6)
    net = block()
    own = torch.autograd.grad(net(image).sum(), list(net.parameters()))
    with Interception():
        recomputed = checkpoint(net, image, use_reentrant=False).sum()
    with torch.autograd.graph.save_on_cpu(), Interception():
        offloaded = net(image).sum()
    for loss in (recomputed, offloaded):
        grads = torch.autograd.grad(loss, list(net.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(grads, own, strict=True))
