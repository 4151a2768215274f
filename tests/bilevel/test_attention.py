"""Attention and recurrent layers under second derivatives, without a word from the user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from helpers import EXACT, LR, Problem, meta_gradient, mse, randn, randomize, relative_error
from monai.networks.nets.swin_unetr import SwinUNETR
from monai.networks.nets.unetr import UNETR
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from prism_meta.bilevel.functional import kernels
from prism_meta.bilevel.functional.checks import graph_nodes
from prism_meta.bilevel.functional.model import FunctionalModel
from prism_meta.bilevel.inner import SGD
from prism_meta.bilevel.strategies import (
    FirstOrder,
    ImplicitMAML,
    MetaStrategy,
    SecondOrder,
    SingleLevel,
)

UNETR_SIZE: dict[str, Any] = {
    "in_channels": 2, "out_channels": 2, "img_size": 16, "feature_size": 4, "hidden_size": 16,
    "mlp_dim": 16, "num_heads": 2,
}  # fmt: skip
SWIN_SIZE: dict[str, Any] = {
    "in_channels": 2, "out_channels": 2, "feature_size": 12, "depths": (1, 1, 1, 1),
    "num_heads": (1, 1, 1, 1), "window_size": 2, "norm_name": ("group", {"num_groups": 4}),
}  # fmt: skip


class Tokens(nn.Module):
    """``nn.MultiheadAttention`` between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 8), nn.Linear(8, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0])
        return out


class Layer(nn.Module):
    """A transformer's encoder layer, with its dropout off."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 8), nn.Linear(8, 2)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(self.stem(x)))
        return out


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.memory(x)[0])
        return out


def swin(dims: int) -> nn.Module:
    return SwinUNETR(**SWIN_SIZE, spatial_dims=dims)


#: How to build each net, and the shape of its input.
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MultiheadAttention": (Tokens, (2, 5, 3)),
    "TransformerEncoderLayer": (Layer, (2, 5, 3)),
    "LSTM": (Recurrent, (2, 5, 3)),
    "UNETR 2-D": (lambda: UNETR(**UNETR_SIZE, spatial_dims=2), (2, 2, 16, 16)),
    "UNETR 3-D": (lambda: UNETR(**UNETR_SIZE), (1, 2, 16, 16, 16)),
    "SwinUNETR 2-D": (lambda: swin(2), (2, 2, 32, 32)),
    "SwinUNETR 3-D": (lambda: swin(3), (1, 2, 32, 32, 32)),
}


def problem(name: str) -> Problem:
    """One episode in float64; the target of a volume has the input's shape."""
    build, shape = NETS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build().double()
    if len(shape) == 3:
        randomize(net, seed=1, scale=0.2)
    target = (*shape[:2], 2) if len(shape) == 3 else shape
    batches = [(randn(*shape, seed=s), randn(*target, seed=s + 1)) for s in (2, 4)]
    return Problem(name, net, mse, *batches)


@pytest.mark.parametrize("name", NETS)
def test_second_order_equals_the_oracle(name: str) -> None:
    episode = problem(name)
    result = meta_gradient(SecondOrder(SGD(LR)), episode)
    with sdpa_kernel(SDPBackend.MATH):
        expected = oracles.second_order(episode, LR, 1)
    assert relative_error(result.gradient, expected) <= EXACT


@pytest.mark.parametrize("name", ["MultiheadAttention", "TransformerEncoderLayer", "UNETR 2-D"])
@pytest.mark.parametrize(
    "strategy",
    [SecondOrder(SGD(LR), 3, graph="stored"), SecondOrder(SGD(LR), 3, graph="recomputed")],
    ids=["stored", "recomputed"],
)
def test_several_steps(name: str, strategy: MetaStrategy) -> None:
    episode = problem(name)
    result = meta_gradient(strategy, episode)
    with sdpa_kernel(SDPBackend.MATH):
        expected = oracles.second_order(episode, LR, 3)
    assert relative_error(result.gradient, expected) <= EXACT


def test_the_implicit_gradient() -> None:
    episode = problem("MultiheadAttention")
    result = meta_gradient(ImplicitMAML(SGD(LR), 2, proximal=20.0, cg_steps=60), episode)
    with sdpa_kernel(SDPBackend.MATH):
        expected = oracles.implicit(episode, result.adapted, 20.0)
    assert relative_error(result.gradient, expected) <= EXACT


@pytest.mark.parametrize("twice", [False, True])
def test_only_second_derivatives_give_up_the_fast_kernel(twice: bool) -> None:
    episode = problem("MultiheadAttention")
    model = FunctionalModel(episode.model, episode.objective)
    value = model.evaluate(model.leaves(), episode.train, twice=twice)
    fast = any("ScaledDotProduct" in node.name() for node in graph_nodes(value.loss))
    assert fast is not twice


@pytest.mark.parametrize(
    "strategy", [SingleLevel(), FirstOrder(SGD(LR), 2)], ids=["single", "first"]
)
def test_first_order_never_asks_for_the_math_backend(
    strategy: MetaStrategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(backend: Any) -> Any:
        raise AssertionError(backend)

    monkeypatch.setattr(kernels, "sdpa_kernel", refused)
    meta_gradient(strategy, problem("MultiheadAttention"))


def test_the_users_choice_of_kernels_is_restored() -> None:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        meta_gradient(SecondOrder(SGD(LR)), problem("MultiheadAttention"))
        assert (
            torch.backends.cuda.flash_sdp_enabled() and not torch.backends.cuda.math_sdp_enabled()
        )


class Spy(TorchFunctionMode):
    """Notes for each torch function whether cuDNN was on when it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Any, bool] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        self.seen[func] = torch.backends.cudnn.enabled
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("twice", [False, True])
def test_recurrent_layers_run_without_cudnn_and_others_with_it(
    twice: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "has_cudnn", lambda: True)
    episode = problem("LSTM")
    model = FunctionalModel(episode.model, episode.objective)
    with Spy() as spy:
        model.evaluate(model.leaves(), episode.train, twice=twice)
    assert spy.seen[torch._VF.lstm] is not twice
    assert spy.seen[nn.functional.linear] is True
