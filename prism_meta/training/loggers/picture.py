"""A picture of a slice: the image with the outlines of the true and the predicted classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

#: Pixels of the longer side, at least; each voxel becomes a square of several.
_SIDE = 384
#: Brightness of the brightest voxels, so that white outlines show on them.
_WHITEST = 0.75


def draw_outlines(image: Tensor, truth: Tensor, prediction: Tensor) -> NDArray[np.uint8]:
    """Draw the true classes as white outlines, and the predicted ones in colours inside of them.

    A white line runs around the voxels of a class, and a coloured one along their inner edge, so that a
    right prediction hides nothing.

    Args:
        image: (H, W) float, in any unit; 0 is outside of the body and black.
        truth: (H, W) long, class indices.
        prediction: (H, W) long, class indices.

    Returns:
        uint8 (h, w, 3), seen as radiologists do if the axes point right or forwards, and forwards or
        upwards: the first axis runs to the left, the second one upwards.

    Example:
        >>> import torch
        >>> labels = torch.zeros(4, 8).long()
        >>> draw_outlines(torch.zeros(4, 8), labels, labels).shape
        (384, 192, 3)
    """
    from matplotlib import colormaps
    from scipy.ndimage import binary_dilation, binary_erosion

    grey, true, predicted = (_turned(part) for part in (image.double(), truth, prediction))
    inside = grey != 0
    low, high = np.percentile(grey[inside], (0.5, 99.5)) if inside.any() else (0.0, 1.0)
    grey = np.where(inside, np.clip((grey - low) / ((high - low) or 1.0), 0, 1), 0)
    picture = np.repeat(_WHITEST * grey[..., None], 3, axis=2)
    for k in range(1, int(true.max()) + 1):
        picture[binary_dilation(true == k) & (true != k)] = 1.0
    colours = colormaps["tab10"].colors  # type: ignore[attr-defined]
    for k in range(1, int(predicted.max()) + 1):
        inside = predicted == k
        edge = inside & ~binary_erosion(inside, iterations=2, border_value=1)
        picture[edge] = colours[(k - 1) % len(colours)]
    return np.asarray((picture * 255).round(), dtype=np.uint8)


def _turned(plane: Tensor) -> NDArray[Any]:
    values = np.asarray(plane.cpu().numpy().T[::-1, ::-1])
    factor = -(-_SIDE // max(values.shape))
    return values.repeat(factor, axis=0).repeat(factor, axis=1)
