"""A trained network in the form that graphs can hold: no shape depends on the mask.

The networks of this package compute only the modalities that a batch shows. A graph cannot skip them, so
the exported form computes all modalities of all samples and selects by the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, torch's own convention

from prism_meta.networks.conditioned import ConditionedNet
from prism_meta.networks.fusion import Groups
from prism_meta.networks.multi_encoder import MultiEncoderNet
from prism_meta.networks.prism import PrismNet
from prism_meta.networks.wrapped import WrappedNet, hidden


class GraphNet(nn.Module):
    """The fused logits (B, K, *S) of image (B, M, *S) and mask bool (B, M), as ``model.segment`` gives them.

    What the image holds where the mask hides it, NaN included, has no influence. Each row of the mask needs
    at least one True, which a graph does not check.

    Args:
        model: a ``SegmentationModel``. One of another kind than ``PrismNet`` and ``WrappedNet`` is called
            as it is, and must not have shapes that depend on the mask.

    Example:
        >>> net = PrismNet(num_modalities=2, num_classes=3, spatial_dims=2, width=2).eval()
        >>> image, mask = torch.randn(2, 2, 16, 16), torch.tensor([[True, True], [False, True]])
        >>> bool(torch.allclose(GraphNet(net)(image, mask), net.segment(image, mask), atol=1e-5))
        True
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        if isinstance(self.model, PrismNet):
            return _prism(self.model, image, mask)
        if isinstance(self.model, WrappedNet):
            return _wrapped(self.model, image, mask)
        logits: Tensor = self.model.segment(image, mask)  # type: ignore[operator]
        return logits


@dataclass(frozen=True)
class MaskedGroups(Groups):
    """One group per sample, with a row for each of its M modalities, of which hidden ones count nothing.

    Args:
        mask: bool (B, M). The rows are ordered by sample, then by modality.

    Example:
        >>> groups = MaskedGroups.of(torch.tensor([[True, True], [False, True]]))
        >>> groups.sum(torch.tensor([1.0, 2.0, torch.nan, 3.0]))
        tensor([3., 3.])
        >>> groups.softmax(torch.zeros(4))
        tensor([0.5000, 0.5000, 0.0000, 1.0000])
    """

    mask: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> MaskedGroups:
        """The groups of a mask, bool (B, M)."""
        batch, modalities = mask.shape
        sample = torch.arange(batch, device=mask.device).repeat_interleave(modalities)
        modality = torch.arange(modalities, device=mask.device).repeat(batch)
        return cls(sample, modality, batch, mask)

    def sum(self, values: Tensor) -> Tensor:
        return self._shown(values, 0.0).sum(1)

    def broadcast(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self.mask.shape[1], 0)

    def softmax(self, scores: Tensor) -> Tensor:
        return self._shown(scores, -torch.inf).softmax(1).flatten(0, 1)

    def _shown(self, values: Tensor, otherwise: float) -> Tensor:
        """Rows (B * M, ...) as (B, M, ...), with another value where the mask hides them."""
        rows = values.unflatten(0, self.mask.shape)
        shown = self.mask.view(*self.mask.shape, *[1] * (values.ndim - 1))
        return torch.where(shown, rows, values.new_full((), otherwise))


def _prism(net: PrismNet, image: Tensor, mask: Tensor) -> Tensor:
    """``PrismNet.segment`` with a row for every modality of every sample."""
    image = hidden(image, mask)
    encoded = [encoder(image[:, m, None]) for m, encoder in enumerate(net.encoders)]
    scales = [torch.stack(scale, 1).flatten(0, 1) for scale in zip(*encoded, strict=True)]
    groups = MaskedGroups.of(mask)

    def fuse(scale: int, guide: Tensor | None) -> Tensor:
        features = scales[scale]
        size = features.shape[2:]
        if guide is None:
            shape = (mask.shape[0], net.num_classes, *size)  # len() would fix the size of the batch
            regions = features.new_full(shape, 1 / net.num_classes)
        else:
            mode = "trilinear" if features.ndim == 5 else "bilinear"
            regions = F.interpolate(guide, size=size, mode=mode).softmax(1)
        fused: Tensor = net.fusions[scale](features, groups, regions)
        return fused

    logits: Tensor = net.decoder(fuse).logits
    return logits


def _wrapped(model: WrappedNet, image: Tensor, mask: Tensor) -> Tensor:
    """``WrappedNet.segment``; of several maps it takes the output, which comes first."""
    image = hidden(image, mask)
    if isinstance(model, ConditionedNet):
        output = model.net(image, mask)
    elif isinstance(model.net, MultiEncoderNet):
        every = torch.arange(mask.shape[0], device=mask.device)
        output = model.net.decode_fused(model.net.encode(image, mask), every, mask)
    else:
        output = model.net(image)
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first[:, 0] if first.ndim > image.ndim else first  # MONAI's DynUNet stacks its maps
