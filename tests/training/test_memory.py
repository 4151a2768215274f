"""The memory of a step as it is estimated on the meta device, and as real tensors need it."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from monai.networks.nets import UNet
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prism_meta.networks.wrapped import wrap
from prism_meta.training.build import build_model, build_objective, build_strategy
from prism_meta.training.config import load_config
from prism_meta.training.profiling.memory import step_memory
from prism_meta.training.profiling.trial import random_batch

SMALL = (
    "data.patch=[32, 32]", "data.batch_size=2", "model.width=4", "model.depth=2",
    "meta.strategy=first_order", "training.ema=0",
)  # fmt: skip


class Alive(TorchDispatchMode):
    """Follows the bytes of the real tensors that are made within the context."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, key, size)

    def remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize(
    ("strategy", "network", "shown"),
    [
        ("single_level", "prism", "all"),
        ("first_order", "prism", "some"),
        ("first_order", "unet", "all"),
        ("second_order", "prism", "some"),
        ("second_order", "unet", "all"),
        ("reptile", "prism", "some"),
        ("implicit", "unet", "some"),
    ],
)
def test_it_is_what_real_tensors_need(strategy: str, network: str, shown: str) -> None:
    config = load_config(
        overrides=[*SMALL, f"meta.strategy={strategy}", f"model.network={network}"]
    )
    masks = [torch.ones(2, 4).bool()] * 2
    if shown == "some":
        masks = [torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]]).bool(), masks[0]]
    estimated = step_memory(config, masks)
    model, objective = build_model(config), build_objective(config.objective, [0.0] * 4)
    method = build_strategy(config.meta, torch.tensor(0.05), weight_decay=0.0)
    train, meta = (random_batch(config, mask) for mask in masks)
    method.meta_gradient(model, objective, train, meta)  # what is made once is there
    with Alive() as alive:
        method.meta_gradient(model, objective, train, meta)
    assert estimated.graphs == pytest.approx(alive.peak, rel=0.03)


def test_its_parts() -> None:
    config = load_config(overrides=SMALL)
    memory = step_memory(config)
    parameters = sum(p.numel() for p in build_model(config).parameters())
    assert memory.model == 3 * 4 * parameters  # the weights and AdamW's two moments, in float32
    # Two batches of two patches: four modalities in float32 and a label in int64 per voxel.
    assert memory.batches == 2 * 2 * 32 * 32 * (4 * 4 + 8)
    assert memory.total == memory.model + memory.batches + memory.graphs


def test_it_grows_with_the_batch_and_the_order() -> None:
    def graphs(*options: str) -> int:
        return step_memory(load_config(overrides=[*SMALL, *options])).graphs

    unet = "model.network=unet"
    first, second = graphs(unet), graphs(unet, "meta.strategy=second_order")
    assert 1.8 < graphs(unet, "data.batch_size=4") / first < 2.05
    assert 2 < second / first < 4
    # Recomputed graphs need a copy of the parameters per inner step, and no second graph.
    more = graphs(unet, "meta.strategy=second_order", "meta.inner_steps=3")
    assert more < 1.3 * second


def test_another_model_and_the_episodes_of_a_step() -> None:
    config = load_config(overrides=SMALL)
    net = UNet(spatial_dims=2, in_channels=4, out_channels=4, channels=(4, 8), strides=(2,))
    before = [p.clone() for p in net.parameters()]
    memory = step_memory(config, model=wrap(net))
    parameters = 4 * sum(p.numel() for p in net.parameters())
    assert memory.model == 3 * parameters
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    twice = step_memory(load_config(overrides=[*SMALL, "meta.episodes=2"]), model=wrap(net))
    assert twice.graphs == memory.graphs + 2 * parameters


def test_no_random_number_is_drawn() -> None:
    state = torch.get_rng_state()
    step_memory(load_config(overrides=SMALL))
    assert torch.equal(torch.get_rng_state(), state)
