"""Figures of single slices: an image with true and predicted labels, filled or as outlines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prism_meta.report.figures.style import HIDDEN, SHOWN, class_colour, data_uri, new_figure
from prism_meta.report.overlays import Overlay

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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


def draw_outlines(overlay: Overlay) -> str:
    """Draw the image with outlines: white ones of the truth, and those of its one prediction in colours."""
    (labels,) = overlay.predictions.values()
    figure, axes = _draw_image(overlay, None)
    _outline(axes, overlay.truth, 1.3, white=True)
    _outline(axes, labels, 1.0, white=False)
    return data_uri(figure, "png", dpi=150)


def _draw_panel(overlay: Overlay, labels: NDArray[np.integer[Any]] | None) -> str:
    figure, axes = _draw_image(overlay, labels)
    if labels is not None and labels is not overlay.truth:
        _outline(axes, overlay.truth, 0.8, white=True)
    return data_uri(figure, "png", dpi=180)


def _draw_image(overlay: Overlay, labels: NDArray[np.integer[Any]] | None) -> tuple[Figure, Axes]:
    """The image in its proportions, under the colours of ``labels`` if they are given."""
    from matplotlib.colors import to_rgb

    height, width = overlay.truth.shape
    tall, wide = height * overlay.pixel[0], width * overlay.pixel[1]
    scale = 2.4 / max(tall, wide)
    # A picture of a single row or column would have no pixels.
    figure = new_figure(max(scale * wide, 0.1), max(scale * tall, 0.1), None)
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
    axes.set_autoscale_on(False)  # outlines begin outside of the image
    return figure, axes


def _outline(axes: Axes, labels: NDArray[np.integer[Any]], width: float, *, white: bool) -> None:
    """Draw the outline of each class."""
    x, y = np.arange(-1, labels.shape[1] + 1), np.arange(-1, labels.shape[0] + 1)
    for k in np.unique(labels[labels > 0]).tolist():
        # The edge is the 0.5 level of a padded 0/1 map, because outlines run between voxels.
        edge = np.pad(labels == k, 1).astype(np.float64)
        colour = "white" if white else class_colour(k)
        axes.contour(x, y, edge, levels=[0.5], colors=[colour], linewidths=width)
