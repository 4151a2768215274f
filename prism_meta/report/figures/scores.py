"""Figures of the scores: the heat map, and Dice by number of shown modalities."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from prism_meta.report.averages import Summary
from prism_meta.report.figures.style import (
    class_colour,
    data_uri,
    figure_text,
    new_figure,
    style_axes,
)


def heat_map(summary: Summary, value: str) -> dict[str, Any]:
    """Colours of the heat map per (subset, region), from the cividis map. Yellow is better."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    numbers = {key: float(getattr(cell, value)) for key, cell in summary.cells.items()}
    known = [x for x in numbers.values() if not math.isnan(x)] or [0.0]
    low, high = (min(known), max(known)) if value == "dice" else (max(known), min(known))
    colours = {}
    for key, x in numbers.items():
        if not math.isnan(x):
            rgba = colormaps["cividis"]((x - low) / ((high - low) or 1.0))
            colours[key] = (to_hex(rgba), text_colour(rgba[:3]))
    stops = [to_hex(colormaps["cividis"](x / 8)) for x in range(9)]
    return {"colours": colours, "low": low, "high": high, "stops": ", ".join(stops)}


def text_colour(background: tuple[float, float, float]) -> str:
    """Black or white, whichever has more contrast with ``background``; it is at least 4.58.

    Args:
        background: red, green and blue of sRGB, in [0, 1].

    Example:
        >>> text_colour((0.9, 0.9, 0.2)), text_colour((0.0, 0.1, 0.4))
        ('#000000', '#ffffff')

    Source: W3C, Web Content Accessibility Guidelines 2.2, definitions of luminance and contrast.
    """
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in background]
    luminance = float(np.dot((0.2126, 0.7152, 0.0722), linear))
    return "#ffffff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#000000"


def dice_by_count(summary: Summary, shown: Mapping[str, tuple[bool, ...]]) -> str:
    """Plot Dice against the number of shown modalities: a dot per subset, a line through the means."""
    figure = new_figure(7.6, 3.4, "constrained")
    axes = figure.add_subplot()
    counts = sorted({sum(flags) for flags in shown.values()})
    for i, region in enumerate(summary.regions, 1):
        shift = 0.09 * (i - (len(summary.regions) + 1) / 2)
        dots = [
            (sum(shown[subset]), 100 * cell.dice)
            for (subset, name), cell in summary.cells.items()
            if name == region and not math.isnan(cell.dice)
        ]
        places = sorted({count for count, _ in dots})
        line = [float(np.mean([y for x, y in dots if x == count])) for count in places]
        axes.scatter(
            [x + shift for x, _ in dots], [y for _, y in dots], s=20, color=class_colour(i), alpha=0.45,
            linewidths=0,
        )  # fmt: skip
        axes.plot(
            [x + shift for x in places], line, color=class_colour(i), linewidth=1.8, marker="o",
            markersize=6, markeredgecolor="white", label=figure_text(region),
        )  # fmt: skip
    style_axes(axes, "", "number of shown modalities", "Dice, %")
    axes.set_xticks(counts)
    axes.set_xlim(counts[0] - 0.4, counts[-1] + 0.4)
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]), top=min(100.0, axes.get_ylim()[1] + 2))
    axes.legend(fontsize=9, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return data_uri(figure, "svg", metadata={"Date": None})


def runs_by_count(summaries: Mapping[str, Summary], shown: Mapping[str, tuple[bool, ...]]) -> str:
    """Plot the mean Dice of subsets against the number of shown modalities, a line per run."""
    figure = new_figure(7.6, 3.4, "constrained")
    axes = figure.add_subplot()
    counts = sorted({sum(flags) for flags in shown.values()})
    markers = "osD^vPX"
    for i, (name, summary) in enumerate(summaries.items()):
        line = []
        for count in counts:
            found = [
                100 * cell.dice
                for subset, cell in summary.by_subset.items()
                if sum(shown[subset]) == count and not math.isnan(cell.dice)
            ]
            line.append(float(np.mean(found)) if found else math.nan)
        axes.plot(
            counts, line, color=class_colour(i + 1), linewidth=1.8, marker=markers[i % len(markers)],
            markersize=6, markeredgecolor="white", label=figure_text(name[-40:]),
        )  # fmt: skip
    style_axes(axes, "", "number of shown modalities", "mean Dice, %")
    axes.set_xticks(counts)
    axes.set_xlim(counts[0] - 0.4, counts[-1] + 0.4)
    axes.legend(fontsize=9, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return data_uri(figure, "svg")
