"""Nets with one encoder per modality."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class MultiEncoderNet(Protocol):
    """The methods of a net with one encoder per modality, so that each encoder runs once per batch.

    ``wrap`` calls ``encode`` once and both decoders on its result. The rows that ``decode_fused`` gets are
    those of PrismNet's fused branch. In training these are the samples of the batch, followed by single
    modalities of samples that are shown several. In ``segment_subsets`` they are the samples, once for
    each subset. A row may therefore show less than was encoded, and what it does not show must not
    influence its logits.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from prism_meta.networks.wrapped import wrap
        >>> class Two(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.encoders = nn.ModuleList(nn.Conv2d(1, 4, 3, padding=1) for _ in range(2))
        ...         self.fused, self.single = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)
        ...
        ...     def encode(self, image, mask):
        ...         scans = image.split(1, dim=1)
        ...         return torch.stack([e(x) for e, x in zip(self.encoders, scans)], 1)  # (B, M, C, *S)
        ...
        ...     def decode_fused(self, encoded, sample, mask):
        ...         shown = mask[:, :, None, None, None]
        ...         return self.fused((shown * encoded[sample]).sum(1) / shown.sum(1))
        ...
        ...     def decode_unimodal(self, encoded, sample, modality):
        ...         return self.single(encoded[sample, modality])
        >>> model = wrap(Two(), modalities=("t1", "t2"))
        >>> model(torch.randn(1, 2, 8, 8), torch.ones(1, 2).bool()).unimodal.shape
        torch.Size([1, 2, 3, 8, 8])
    """

    def encode(self, image: Tensor, mask: Tensor) -> Any:
        """Return anything that the decoders need; image (B, M, *S) is 0 where mask (B, M) hides it."""

    def decode_fused(self, encoded: Any, sample: Tensor, mask: Tensor) -> Any:
        """Logits (N, K, *S) from ``encoded``; row n: ``sample[n]`` shown ``mask[n]``, bool (N, M)."""

    def decode_unimodal(self, encoded: Any, sample: Tensor, modality: Tensor) -> Tensor:
        """Logits (P, K, *S) of E6 from ``encoded``: row p is ``modality[p]`` of sample ``sample[p]``."""


def declaration_fault(net: nn.Module) -> str | None:
    """What a net lacks that has some of the methods of ``MultiEncoderNet``."""
    # ``encode`` does not count, as ordinary nets have a method of this name, too.
    methods = ("encode", "decode_fused", "decode_unimodal")
    missing = [name for name in methods if not callable(getattr(net, name, None))]
    if not missing or all(name in missing for name in methods[1:]):
        return None
    return (
        f"net: {type(net).__name__} has no {', '.join(missing)}; a net with several encoders "
        f"implements {', '.join(methods)}, see MultiEncoderNet"
    )
