"""Any segmentation net, trained and used with missing modalities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prism_meta.modalities import BRATS
from prism_meta.network import Branch, Pairs, Prediction


class WrappedNet(nn.Module):
    """A net of image -> logits behind PrismNet's signature; see ``wrap``."""

    def __init__(self, net: nn.Module, modalities: Sequence[str]) -> None:
        super().__init__()
        self.net = net
        self.modalities = tuple(modalities)
        # The wrapper's state is the net's own, also where the wrapper is part of another module.
        self.register_state_dict_post_hook(_without_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_prefix)  # type: ignore[no-untyped-call]

    def forward(self, image: Tensor, mask: Tensor) -> Prediction:
        pairs = self._pairs(image, mask)
        # The net sees the batch and, packed behind it, each shown modality alone.
        alone = torch.zeros(len(pairs.sample), mask.shape[1], dtype=torch.bool, device=mask.device)
        alone[torch.arange(len(alone), device=mask.device), pairs.modality] = True
        images = torch.cat((image, image[pairs.sample]))
        logits = self.net(_hide(images, torch.cat((mask, alone))))
        fused, single = logits[: len(image)], logits[len(image) :]
        return Prediction(Branch(fused, fused), Branch(single, single), single, pairs)

    def segment(self, image: Tensor, mask: Tensor) -> Tensor:
        """The fused logits (B, K, *S) alone, for inference."""
        self._pairs(image, mask)
        logits: Tensor = self.net(_hide(image, mask))
        return logits

    def _pairs(self, image: Tensor, mask: Tensor) -> Pairs:
        if image.shape[1] != len(self.modalities):
            raise ValueError(
                f"image: got {image.shape[1]} channels, expected {len(self.modalities)} "
                f"({', '.join(self.modalities)})"
            )
        if mask.shape != image.shape[:2]:
            raise ValueError(
                f"mask: got {tuple(mask.shape)}, expected (B, M) = {tuple(image.shape[:2])}"
            )
        return Pairs.of(mask)


def wrap(net: nn.Module, modalities: Sequence[str] = BRATS) -> WrappedNet:
    """Let ``net`` be trained by ``MetaLearner`` and ``PrismObjective`` with missing modalities.

    Modalities that are not shown reach the net as zeros, whatever the image holds there (NaN
    included). Its unimodal outputs are the net on one modality at a time; distillation and
    prototypes work on its logits.

    Args:
        net: maps an image (B, M, *S) to logits (B, K, *S); any ``nn.Module``.
        modalities: names of the M channels, in order.

    Returns:
        A module with PrismNet's signature, ``model(image, mask) -> Prediction``.

    Raises:
        ValueError: no modality, or a name twice.

    Example:
        >>> model = wrap(nn.Conv2d(2, 3, 1), modalities=("t1", "t2"))
        >>> model(torch.randn(1, 2, 8, 8), torch.tensor([[True, False]])).fused.shape
        torch.Size([1, 3, 8, 8])
        >>> sorted(model.state_dict())
        ['bias', 'weight']
    """
    if not modalities or len(set(modalities)) != len(modalities):
        raise ValueError(
            f"modalities: got {tuple(modalities)}, expected different names, at least one"
        )
    return WrappedNet(net, modalities)


def _hide(image: Tensor, mask: Tensor) -> Tensor:
    """``where``, not a product: NaN * 0 is NaN."""
    shown = mask.view(*mask.shape, *[1] * (image.ndim - 2))
    return torch.where(shown, image, image.new_zeros(()))


def _without_prefix(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    inner = f"{prefix}net."
    for name in [name for name in state if name.startswith(inner)]:
        state[prefix + name[len(inner) :]] = state.pop(name)


def _with_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}net.{name[len(prefix) :]}"] = state.pop(name)
