"""Group and instance normalisation with fast derivatives: torch's numbers, and a graph that keeps less."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F  # noqa: N812, torch's own convention
from torch.utils.checkpoint import checkpoint

from prism_meta.bilevel.functional.fast_derivatives import Interception, normalization

SPACE = {1: (7,), 2: (5, 4), 3: (4, 3, 2)}
LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def by_hand(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> Tensor:
    """The definition."""
    grouped = x.reshape(len(x), groups, -1)
    mean = grouped.mean(2, keepdim=True)
    variance = (grouped - mean).square().mean(2, keepdim=True)
    y = ((grouped - mean) / (variance + eps).sqrt()).reshape(x.shape)
    channels = (-1, *[1] * (x.ndim - 2))
    if weight is not None:
        y = y * weight.reshape(channels)
    return y if bias is None else y + bias.reshape(channels)


def tensors(
    dims: int, *, last: bool = False, affine: bool = True, dtype: torch.dtype = torch.float64
) -> list[Tensor | None]:
    """x, weight and bias: 2 samples, 6 channels."""
    generator = torch.Generator().manual_seed(dims)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    x = 3 * draw(2, 6, *SPACE[dims]) + 2
    if last:
        x = x.contiguous(memory_format=LAST[dims])
    return [x, *([draw(6), draw(6)] if affine else [None, None])]


def curved(values: tuple[Tensor, ...]) -> Tensor:
    """A function of all entries, which have different weights."""
    parts = [v * torch.linspace(1, 2, v.numel(), dtype=v.dtype).view(v.shape) for v in values]
    return torch.stack([part.sin().sum() for part in parts]).sum()


def derivatives(
    function: Callable[..., Tensor],
    given: list[Tensor | None],
    variables: tuple[int, ...],
    *,
    orders: int,
    node: str | None = "_GroupNormBackward",
) -> list[Tensor]:
    """The result, and its derivatives with respect to some of x, weight and bias. With ``node`` None it
    is computed by torch."""
    given = [
        None if t is None else t.clone().requires_grad_(i in variables) for i, t in enumerate(given)
    ]
    inputs = [t for t in given if t is not None and t.requires_grad]
    with nullcontext() if node is None else Interception():
        y = function(*given)
    assert y.grad_fn is not None
    assert node in (None, y.grad_fn.name())
    results, current = [y], (y,)
    for _ in range(orders):
        current = torch.autograd.grad(curved(current), inputs, create_graph=True)
        results += current
    return results


def error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).detach().norm() / exact.detach().norm())


@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize(
    ("dims", "last"), [(1, False), (2, False), (2, True), (3, False), (3, True)]
)
def test_three_derivatives_are_those_of_the_definition(dims: int, last: bool, groups: int) -> None:
    given = tensors(dims, last=last)
    ours = derivatives(lambda x, w, b: F.group_norm(x, groups, w, b), given, (0, 1, 2), orders=3)
    exact = derivatives(
        lambda x, w, b: by_hand(x, groups, w, b), given, (0, 1, 2), orders=3, node=None
    )
    for value, expected in zip(ours, exact, strict=True):
        assert error(value, expected) < 1e-10


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_instances_are_groups_of_one_channel(last: bool, affine: bool) -> None:
    given = tensors(3, last=last, affine=affine)
    variables = (0, 1, 2) if affine else (0,)
    ours = derivatives(
        lambda x, w, b: F.instance_norm(x, weight=w, bias=b, eps=1e-3), given, variables, orders=3
    )
    exact = derivatives(
        lambda x, w, b: by_hand(x, 6, w, b, 1e-3), given, variables, orders=3, node=None
    )
    for value, expected in zip(ours, exact, strict=True):
        assert error(value, expected) < 1e-10


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("variables", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_what_is_no_variable_is_a_constant(variables: tuple[int, ...], last: bool) -> None:
    given = tensors(2, last=last)
    # dx is a function of neither bias nor, where only they are variables, of anything.
    orders = 2 if 0 in variables else 1
    ours = derivatives(lambda x, w, b: F.group_norm(x, 2, w, b), given, variables, orders=orders)
    exact = derivatives(
        lambda x, w, b: by_hand(x, 2, w, b), given, variables, orders=orders, node=None
    )
    for value, expected in zip(ours, exact, strict=True):
        assert error(value, expected) < 1e-10


def test_the_weights_derivative_of_a_constant_image_can_be_differentiated() -> None:
    """As in a net that begins with a normalisation: g varies, x does not, and dx is never computed."""

    def mixed(function: Callable[..., Tensor]) -> Tensor:
        x, weight, bias = tensors(2)
        assert weight is not None
        weight.requires_grad_()
        with Interception():
            y = function(x, weight, bias)
        (dw,) = torch.autograd.grad(y.sin().sum(), weight, create_graph=True)
        return torch.autograd.grad(dw.square().sum(), weight)[0]

    ours = mixed(lambda x, w, b: F.group_norm(x, 2, w, b))
    assert error(ours, mixed(lambda x, w, b: by_hand(x, 2, w, b))) < 1e-12


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_in_float32_it_is_as_exact_as_torch(last: bool, offset: float) -> None:
    x, weight, bias = tensors(3, last=last, dtype=torch.float32)
    assert x is not None
    given = [x + offset, weight, bias]

    def errors(node: str | None) -> list[float]:
        single = derivatives(
            lambda x, w, b: F.group_norm(x, 2, w, b), given, (0, 1, 2), orders=2, node=node
        )
        double = derivatives(
            lambda x, w, b: by_hand(x, 2, w, b),
            [None if t is None else t.double() for t in given],
            (0, 1, 2),
            orders=2,
            node=None,
        )
        return [error(a, b) for a, b in zip(single, double, strict=True)]

    for ours, own in zip(errors("_GroupNormBackward"), errors(None), strict=True):
        assert ours < 4 * own + 1e-6


def test_the_graph_of_the_gradient_keeps_its_two_arguments() -> None:
    x = torch.randn(2, 4, 16, 16, requires_grad=True)
    weight, bias = torch.ones(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with Interception():
        y = F.group_norm(x, 4, weight, bias)
    cotangent = torch.ones_like(y, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        torch.autograd.grad(y, (x, weight, bias), cotangent, create_graph=True)
    both = {t.untyped_storage().data_ptr() for t in (x, cotangent)}
    assert both <= kept.keys()
    assert sum(size for pointer, size in kept.items() if pointer not in both) < 200


def test_the_memory_format_is_kept() -> None:
    x = torch.randn(2, 4, 3, 4, 5).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    with Interception():
        y = F.instance_norm(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    for tensor in (y, gradient):
        assert tensor.is_contiguous(memory_format=torch.channels_last_3d)


def test_an_activation_may_work_in_place() -> None:
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)

    def second(*, lean: bool) -> Tensor:
        leaf = x.clone().requires_grad_()
        with Interception() if lean else nullcontext():
            loss = F.relu_(F.group_norm(leaf, 2)).pow(3).sum()
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaf)[0]

    assert error(second(lean=True), second(lean=False)) < 1e-12


def test_an_input_changed_in_place_is_refused() -> None:
    x = torch.randn(2, 4, 5, requires_grad=True)
    with Interception():
        z = 2 * x
        y = F.group_norm(z, 2)
    with torch.no_grad():
        z.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_checkpoint_changes_nothing() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.InstanceNorm2d(4))
    net.double()
    image = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    params = list(net.parameters())

    def second(evaluate: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        with Interception():
            loss = evaluate(image).sin().sum()
        first = torch.autograd.grad(loss, params, create_graph=True)
        return torch.autograd.grad([g.square().sum() for g in first], params)

    for ours, own in zip(
        second(lambda x: checkpoint(net, x, use_reentrant=False)), second(net), strict=True
    ):
        assert error(ours, own) < 1e-12


# ---------------------------------------------------------------- what is left to torch


def node(function: Callable[[], Tensor]) -> str:
    with Interception():
        grad_fn: Any = function().grad_fn
    return str(grad_fn.name())


def test_other_types_are_torchs() -> None:
    x = torch.randn(2, 4, 5, requires_grad=True)
    assert node(lambda: F.group_norm(x, 2)) == "_GroupNormBackward"
    half = x.bfloat16()
    assert node(lambda: F.group_norm(half, 2)) == "NativeGroupNormBackward0"
    mixed = torch.ones(4)
    assert node(lambda: F.group_norm(half, 2, mixed, mixed)) == "NativeGroupNormBackward0"
    with torch.autocast("cpu", torch.bfloat16):
        assert node(lambda: F.group_norm(x, 2)) == "NativeGroupNormBackward0"


def test_an_older_torch_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalization, "_top_hooks", None)
    x = torch.randn(2, 4, 5, requires_grad=True)
    assert node(lambda: F.group_norm(x, 2)) == "NativeGroupNormBackward0"


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device, on which memory is estimated, counts as a CPU; one without kernels is torch's."""
    x = torch.randn(2, 4, 5, device="meta", requires_grad=True)
    assert node(lambda: F.group_norm(x, 2)) == "_GroupNormBackward"
    monkeypatch.setattr(normalization, "DEVICES", ("cpu", "cuda"))
    assert node(lambda: F.group_norm(x, 2)) == "NativeGroupNormBackward0"


def test_running_statistics_are_torchs() -> None:
    x = torch.randn(2, 4, 5, requires_grad=True)
    norm = nn.InstanceNorm1d(4, track_running_stats=True)
    assert node(lambda: norm(x)) != "_GroupNormBackward"
    assert norm.running_mean is not None and norm.running_mean.abs().sum() > 0
    norm.eval()
    assert node(lambda: norm(x)) != "_GroupNormBackward"


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:FutureWarning"
)  # torch's own call
def test_tangents_and_transforms_are_torchs() -> None:
    x, direction = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    with forward_ad.dual_level(), Interception():
        dual = F.group_norm(forward_ad.make_dual(x, direction), 2)
        tangent = forward_ad.unpack_dual(dual).tangent
    _, exact = torch.func.jvp(lambda x: by_hand(x, 2, None, None), (x,), (direction,))
    assert tangent is not None
    assert error(tangent, exact) < 1e-12
    with Interception():
        mapped = torch.func.vmap(lambda x: F.group_norm(x, 2))(torch.stack([x, direction]))
    assert torch.equal(mapped[1], F.group_norm(direction, 2))


class _Named(Tensor):
    """A tensor with more than its values, as MONAI's are."""


def test_subclasses_stay_what_they_are() -> None:
    x = torch.randn(2, 4, 5).as_subclass(_Named)
    with Interception():
        assert type(F.group_norm(x, 2)) is _Named


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: F.group_norm(torch.ones(2, 4, 5), 3), "divisible by num_groups"),
        (lambda: F.group_norm(torch.ones(1, 4, 1), 4), "more than 1 value per channel"),
        (lambda: F.instance_norm(torch.ones(2, 4, 1)), "more than 1 spatial element"),
    ],
)
def test_torchs_errors_are_torchs(function: Callable[[], Tensor], message: str) -> None:
    with Interception(), pytest.raises((RuntimeError, ValueError), match=message):
        function()
