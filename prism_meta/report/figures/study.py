"""Figures of a study: differences to the reference, and curves over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from prism_meta.report.bootstrap import Array
from prism_meta.report.figures.style import (
    FAINT,
    INK,
    class_colour,
    data_uri,
    figure_text,
    new_figure,
    style_axes,
)
from prism_meta.report.study.scores import ScoredRun
from prism_meta.report.study.table import Comparisons

#: Names of the curves as the axes say them.
_AXES = {"meta_loss": "meta loss", "cosine": "cosine", "ema dice": "validation Dice"}


def differences(found: Comparisons) -> str:
    """Differences of mean and worst-subset Dice to the reference, with 95% intervals, a line per method."""
    rows = [row for row in found.rows if row.against is not None]
    figure = new_figure(8.4, 1.2 + 0.42 * len(rows), "constrained")
    axes = figure.add_subplot()
    for i, row in enumerate(rows):
        assert row.against is not None
        parts = (row.against.averages.mean, row.against.averages.worst)
        for part, (interval, shift) in enumerate(zip(parts, (-0.13, 0.13), strict=True)):
            point = 100 * interval.mean
            # Rounding can put a point just outside of an interval without width.
            ends = [[max(0.0, point - 100 * interval.low)], [max(0.0, 100 * interval.high - point)]]
            axes.errorbar(
                [point], [i + shift], xerr=None if interval.low != interval.low else ends,
                fmt="os"[part], color=class_colour((5, 6)[part]), markersize=5, linewidth=1.6, capsize=2,
                label=("mean over subsets", "worst subset")[part] if i == 0 else None,
            )  # fmt: skip
    axes.axvline(0, color=INK, linewidth=0.9)
    style_axes(axes, "", f"Dice minus that of {figure_text(found.rows[0].method)}, points", "")
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=FAINT, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [figure_text(row.method[-48:]) for row in rows])
    axes.invert_yaxis()
    axes.legend(fontsize=8.5, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return data_uri(figure, "svg")


def curves(runs: Sequence[ScoredRun]) -> dict[str, str]:
    """Curves over training, the mean over seeds of each method: name of the curve -> figure."""
    found: dict[str, str] = {}
    methods = list(dict.fromkeys(run.method for run in runs))
    for name, axis in _AXES.items():
        lines = {}
        for method in methods:
            own = [r.curves[name] for r in runs if r.method == method and name in r.curves]
            if own:
                lines[method] = _mean(own)
        if lines:
            found[axis] = _plot(lines, axis)
    return found


def _mean(each: Sequence[Sequence[Sequence[float]]]) -> Array:
    """The mean of curves (n, 2) over those that are as long as the first."""
    whole = [np.asarray(curve, dtype=np.float64) for curve in each]
    mean: Array = np.mean([curve for curve in whole if curve.shape == whole[0].shape], 0)
    return mean


def _plot(lines: Mapping[str, Array], axis: str) -> str:
    figure = new_figure(8.4, 3.4, "constrained")
    axes = figure.add_subplot()
    for i, (method, line) in enumerate(lines.items()):
        # As shares of the training, because methods take different numbers of steps for equal gradients.
        axes.plot(
            100 * line[:, 0] / line[-1, 0], line[:, 1], color=class_colour(i + 1), linewidth=1.4,
            linestyle=("-", "--", ":")[i // 7 % 3], label=figure_text(method[-40:]),
        )  # fmt: skip
    style_axes(axes, "", "share of the training, %", axis)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return data_uri(figure, "svg")
