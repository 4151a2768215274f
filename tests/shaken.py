"""Runs with random weights, which take no training, and a network of fixed size."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from prism_meta.training.config import load_config
from prism_meta.training.folder.weights import save_weights
from prism_meta.training.networks import build_model
from prism_meta.training.run import Run

#: Settings of tiny networks, by name.
NETS: dict[str, tuple[str, ...]] = {
    "region_aware": ("model.width=2", "model.depth=2"),
    "mean": ("model.width=2", "model.depth=2", "model.fusion=mean"),
    "attention": ("model.width=2", "model.depth=2", "model.fusion=attention"),
    "unet": ("model.width=2", "model.depth=2", "model.network=unet"),
    "conditioned_unet": ("model.width=2", "model.depth=2", "model.network=conditioned_unet"),
    "SegResNet": (
        "model.network=monai:SegResNet",
        "model.arguments={init_filters = 8, blocks_down = [1, 1], blocks_up = [1]}",
    ),
}


def shaken_run(folder: Path, *settings: str, seed: int = 0) -> Run:
    """A run whose weights are far from those that a network starts with, so that parts at 0 matter."""
    torch.manual_seed(seed)
    config = load_config(overrides=["training.ema=0", *settings])
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    run = Run.create(folder, config, root=None, train=[], test=[])
    for kind in run.kinds:
        save_weights(run.weights(kind), model)
    return run


class Fixed(nn.Module):
    """A network with a weight per voxel of its patch, as transformers have for their tokens."""

    def __init__(self, num_modalities: int, num_classes: int, spatial_dims: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_modalities, num_classes, 1)
        self.position = nn.Parameter(torch.zeros(num_classes, 16, 16))

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.conv(image) + self.position
        return logits


class Choosing(nn.Module):
    """A network that looks at its input to choose what it does, which no graph can hold."""

    def __init__(self, num_modalities: int, num_classes: int, spatial_dims: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_modalities, num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.conv(image)
        return -logits if image.mean().item() > 3 else logits
