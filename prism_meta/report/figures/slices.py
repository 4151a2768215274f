"""Figures of single slices: an image with true and predicted labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_meta.report.figures.style import HIDDEN, SHOWN, class_colour, data_uri, new_figure
from prism_meta.report.overlays import Overlay


def draw_overlay(overlay: Overlay, modalities: Sequence[str]) -> list[tuple[str, str, str]]:
    """Draw the image, the truth, and each prediction with the truth as outlines.

    Returns:
        (name, marks of the shown modalities, picture) per panel.
    """
    panels = [(f"image, {overlay.background_name}", "", _draw_panel(overlay, None))]
    panels.append(("truth", "", _draw_panel(overlay, overlay.truth)))
    for name, labels in overlay.predictions.items():
        parts = name.split("+")
        marks = "".join(SHOWN if modality in parts else HIDDEN for modality in modalities)
        known = set(parts) <= set(modalities)
        panels.append((name, marks if known else "", _draw_panel(overlay, labels)))
    return panels


def _draw_panel(overlay: Overlay, labels: NDArray[np.integer[Any]] | None) -> str:
    from matplotlib.colors import to_rgb

    height, width = overlay.truth.shape
    scale = 2.4 / max(height, width)
    figure = new_figure(scale * width, scale * height, None)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    image = np.nan_to_num(np.asarray(overlay.background, dtype=np.float64))
    low, high = np.percentile(image, (0.5, 99.5))
    grey = np.clip((image - low) / ((high - low) or 1.0), 0, 1)
    colour = np.repeat(grey[..., None], 3, axis=2)
    if labels is not None:
        for k in range(1, int(labels.max(initial=0)) + 1):
            colour[labels == k] = 0.4 * colour[labels == k] + 0.6 * np.array(
                to_rgb(class_colour(k))
            )
    axes.imshow(colour, interpolation="nearest", aspect="auto")
    if labels is not None and labels is not overlay.truth:
        for k in np.unique(overlay.truth[overlay.truth > 0]).tolist():
            # The edge is the 0.5 level of a padded 0/1 map, because outlines run between voxels.
            edge = np.pad(overlay.truth == k, 1).astype(np.float64)
            x, y = np.arange(-1, width + 1), np.arange(-1, height + 1)
            axes.contour(x, y, edge, levels=[0.5], colors=["white"], linewidths=0.8)
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    return data_uri(figure, "png", dpi=180)
