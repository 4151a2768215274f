"""Sliding windows: the logits of a whole volume for many subsets of its modalities."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from prism_meta.data.restore import Box, bounding_box
from prism_meta.networks.prediction import SegmentationModel

#: Default window in voxels, by the number of spatial dimensions of the model.
PATCHES: Mapping[int, tuple[int, ...]] = MappingProxyType({2: (96, 96), 3: (64, 64, 64)})
#: Default overlap of neighbouring windows, as a share of the window.
OVERLAP = 0.5
#: Bytes of logits that are held at a time: 15 subsets of a brain at 1 mm take about 1 GiB.
LOGITS_BYTES = 2**31


def check_model(model: nn.Module) -> Any:
    """Return ``model`` if it is a ``SegmentationModel``.

    Raises:
        TypeError: it is not, e.g. a bare net that maps an image to logits.

    Example:
        >>> check_model(nn.Conv2d(4, 3, 1))
        Traceback (most recent call last):
        ...
        TypeError: model: got Conv2d, which is no SegmentationModel; give a PrismNet or pm.wrap(net)
    """
    if not isinstance(model, SegmentationModel):
        raise TypeError(
            f"model: got {type(model).__name__}, which is no SegmentationModel; give a PrismNet "
            "or pm.wrap(net)"
        )
    return model


def patch_of(model: nn.Module, patch: Sequence[int] | None = None) -> tuple[int, ...]:
    """The window to use with ``model``: ``patch`` if it is given, otherwise a default that fits.

    Args:
        model: a ``SegmentationModel``; its ``spatial_dims`` choose the default.
        patch: window in voxels, two numbers for slices, three for volumes.

    Raises:
        ValueError: the patch has another number of axes than the model, or there is no patch and the
            model does not say how many axes it works on.

    Example:
        >>> from prism_meta.networks.prism import PrismNet
        >>> patch_of(PrismNet(spatial_dims=3, width=1)), patch_of(PrismNet(spatial_dims=2), (32, 32))
        ((64, 64, 64), (32, 32))
    """
    dims: int | None = check_model(model).spatial_dims
    known = dims if dims in PATCHES else None
    if patch is None and known is None:
        choices = " or ".join(f"patch={size} for {n}-D" for n, size in PATCHES.items())
        raise ValueError(
            f"patch: {type(model).__name__} does not say whether it works on slices or volumes "
            f"(spatial_dims is {dims}); give e.g. {choices}"
        )
    if patch is None:
        return PATCHES[int(known or 0)]
    if len(patch) not in PATCHES or (known is not None and len(patch) != known):
        expected = "2 or 3 numbers" if known is None else f"{known} numbers, e.g. {PATCHES[known]}"
        raise ValueError(
            f"patch: got {tuple(patch)}, expected {expected}, one per spatial dimension of the model"
        )
    return tuple(patch)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout and batch statistics are off within the context; each module's mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class Windows:
    """A sliding window over volumes, with Gaussian weights where windows overlap.

    Args:
        model: a ``SegmentationModel``.
        patch: window in voxels; two numbers for slices, three for volumes.
        overlap: of neighbouring windows, in [0, 1).
        batch_size: windows per call of the model.
    """

    def __init__(
        self, model: nn.Module, *, patch: Sequence[int], overlap: float, batch_size: int
    ) -> None:
        self.model, self.patch = check_model(model), tuple(patch)
        self.overlap, self.batch_size = overlap, batch_size

    def at_a_time(self, image: Tensor, *, num_classes: int) -> int:
        """How many subsets of image (M, d, h, w) fit into ``LOGITS_BYTES`` together."""
        window = math.prod(self.patch) * self.batch_size
        each = (image[0].numel() + window) * num_classes * image.element_size()
        return max(1, LOGITS_BYTES // each)

    def count(self, shape: Sequence[int]) -> int:
        """How many windows an image of shape (d, h, w) is cut into.

        Example:
            >>> from prism_meta.networks.prism import PrismNet
            >>> net = PrismNet(spatial_dims=2, width=1)
            >>> Windows(net, patch=(32, 32), overlap=0.5, batch_size=4).count((48, 20, 10))
            20
        """
        slices = math.prod(shape[len(self.patch) :])
        steps = [max(1, int(size * (1 - self.overlap))) for size in self.patch]
        along = zip(shape, self.patch, steps, strict=False)
        return slices * math.prod(1 + math.ceil(max(0, n - size) / s) for n, size, s in along)

    def logits(self, image: Tensor, subsets: Tensor) -> Tensor:
        """Logits (S, K, d, h, w) of image (M, d, h, w) for subsets, bool (S, M)."""
        from monai.inferers.utils import sliding_window_inference

        def segment(windows: Tensor) -> Tensor:
            maps = self.model.segment_subsets(windows, subsets)
            # The maps of all subsets side by side as channels: windows are cut and blended once.
            return torch.cat([logits.contiguous() for logits in maps], 1)

        slices = len(self.patch) == 2
        inputs = image.movedim(-1, 0) if slices else image[None]
        outputs = sliding_window_inference(
            inputs, self.patch, self.batch_size, segment, overlap=self.overlap, mode="gaussian"
        )
        maps = torch.as_tensor(outputs)
        maps = maps.movedim(0, -1) if slices else maps[0]
        return maps.reshape(len(subsets), -1, *maps.shape[1:])


def box_or_whole(inside: Tensor) -> tuple[slice, ...]:
    """The smallest box around True voxels, bool (D, H, W); the whole volume if there is none."""
    found = bounding_box(inside) or tuple((0, n) for n in inside.shape)
    return tuple(slice(*ends) for ends in found)


def by_box(inside: Tensor, subsets: Tensor) -> dict[Box, Tensor]:
    """Group subsets by the box around the voxels that they show.

    Args:
        inside: bool (M, D, H, W), where each modality has a value.
        subsets: bool (S, M).

    Returns:
        Box -> (n,) long, the subsets with that box.
    """
    boxes = [bounding_box(channel) for channel in inside]
    rows: dict[Box, list[int]] = {}
    for row, shown in enumerate(subsets.tolist()):
        parts = [box for box, s in zip(boxes, shown, strict=True) if s and box is not None]
        ends = zip(*parts, strict=True)
        around = tuple((min(a for a, _ in axis), max(b for _, b in axis)) for axis in ends)
        rows.setdefault(around or tuple((0, n) for n in inside.shape[1:]), []).append(row)
    return {box: torch.tensor(some) for box, some in rows.items()}
