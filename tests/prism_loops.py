"""E10 by loops: a separate forward pass for each sample and each modality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import F64, prism_net
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, torch's own convention

from prism_meta.modalities import Batch
from prism_meta.networks.prism import PrismNet
from prism_meta.objective.prism import PrismObjective, losses

MASKS = {
    "M=2, B=1, one shown": [[False, True]],
    "M=2, B=1": [[True, True]],
    "M=2, B=5": [[True, True], [True, False], [False, True], [True, True], [True, False]],
    "M=3, B=1": [[True, False, True]],
    "M=3, B=5": [
        [True, True, True],
        [True, False, False],
        [False, True, True],
        [True, True, False],
        [False, True, False],
    ],
    "M=4, B=1, one shown": [[False, False, True, False]],
    "M=4, B=5": [
        [True, True, True, True],
        [True, False, False, True],
        [False, True, False, False],
        [False, True, True, True],
        [True, False, True, False],
    ],
}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
every_size = pytest.mark.parametrize("size", [(9, 8), (6, 5, 7)], ids=["2-D", "3-D"])

BETA, DELTA = (0.7, 1.9, 0.3, 0.9), (1.1, 0.2, 2.3, 0.5)


def net_for(mask: list[list[bool]], size: tuple[int, ...] = (9, 8)) -> PrismNet:
    return prism_net(num_modalities=len(mask[0]), depth=3, spatial_dims=len(size))


def weights_for(mask: list[list[bool]]) -> dict[str, Any]:
    return {"beta": BETA[: len(mask[0])], "delta": DELTA[: len(mask[0])]}


def terms_by_loops(
    net: PrismNet, batch: Batch, objective: PrismObjective
) -> dict[str, dict[tuple[int, ...], Tensor]]:
    """Each term of E10 per sample, or per sample and modality, before the weights beta and delta."""
    found: dict[str, dict[tuple[int, ...], Tensor]] = {
        name: {} for name in ("fuse", "prm", "uni", "pixel", "proto", "distance")
    }

    def segmentation(logits: Tensor, target: Tensor) -> Tensor:
        return losses.weighted_cross_entropy(
            logits, target, weighted=objective.weighted
        ) + losses.soft_dice(logits, target)

    dense = net(batch.image, batch.mask).unimodal
    for n, shown in enumerate(batch.mask.tolist()):
        image, y = batch.image[n : n + 1], batch.target[n : n + 1]
        out = net(image, batch.mask[n : n + 1])
        found["fuse"][n,] = segmentation(out.fused, y)
        found["prm"][n,] = torch.zeros(1, dtype=F64)
        for s, coarse in enumerate(out.prm):
            mode = "bilinear" if y.ndim == 3 else "trilinear"
            fine = F.interpolate(coarse, size=y.shape[1:], mode=mode, align_corners=False)
            found["prm"][n,] = found["prm"][n,] + (0.5, 0.25, 0.125)[s] * segmentation(fine, y)
        for m in [m for m, is_shown in enumerate(shown) if is_shown]:
            one = net(image, torch.eye(len(shown)).bool()[m : m + 1])
            found["uni"][n, m] = segmentation(dense[n : n + 1, m], y)
            pixel = torch.zeros(1, dtype=F64)
            levels = zip((one.fused, *one.prm), (out.fused, *out.prm), strict=True)
            for level, (z, t) in enumerate(levels):
                pixel = pixel + (0.5**level if objective.scale_decay else 1) * (
                    losses.pixel_distillation(z, t, objective.temperature, objective.direction)
                )
            found["pixel"][n, m] = pixel
            for name, loss in (
                ("proto", objective.prototype),
                ("distance", losses.prototype_distance),
            ):
                found[name][n, m] = loss(one.features, out.features, y, out.fused.shape[1])
    return found


def total_by_loops(
    found: dict[str, dict[tuple[int, ...], Tensor]], beta: Sequence[float], delta: Sequence[float]
) -> Tensor:
    """E10 from the terms of ``terms_by_loops``."""
    size = len(found["fuse"])
    total = sum(found["fuse"].values()) + sum(found["prm"].values()) + sum(found["uni"].values())
    for (n, m), pixel in found["pixel"].items():
        total = total + beta[m] * pixel + delta[m] * found["proto"][n, m]
    return total.squeeze() / size


def gradients(loss: Tensor, net: nn.Module) -> Tensor:
    params = list(net.parameters())
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, params, materialize_grads=True)]
    )
