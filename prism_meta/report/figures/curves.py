"""Figures of the training: losses, terms, and the weights of the modalities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prism_meta.report.figures.style import (
    INK,
    class_colour,
    data_uri,
    figure_text,
    new_figure,
    style_axes,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The points of each line of a panel, by the name of the line.
_Lines = dict[str, list[tuple[float, float]]]

#: Kinds of weights, and what a line of theirs is called in addition.
_WEIGHTS = {"last": "", "ema": ", averaged"}
#: Titles of the panels of the terms that are weights or determine them.
_WEIGHT_TITLES = {
    "preference": "relative preference RP",
    "beta": "weight of pixel distillation β",
    "delta": "weight of prototype alignment δ",
}


def training_curves(history: Sequence[Mapping[str, Any]], modalities: Sequence[str]) -> str | None:
    """Plot losses, the Dice of validation and terms against the step, a panel each.

    Returns None if there is nothing to plot.
    """
    history = _rows(history)
    losses: _Lines = {}
    for i, row in enumerate(history):
        for name in ("train", "meta"):
            _add_point(losses, name, _place(row, "step", i), row.get(f"{name}_loss"))
    panels = {"loss": losses} if losses else {}
    validation = _validation(history)
    if validation:
        panels["Dice of validation cases"] = validation
    for term, lines in _terms(history, modalities, "step").items():
        # A network without prm maps has a loss of 0 for them.
        if term not in _WEIGHT_TITLES and term != "shown" and any(map(any, _values(lines))):
            panels[term] = lines
    if not panels:
        return None
    figure = _panels(panels, "outer step", modalities)
    for axes, lines in zip(figure.axes, panels.values(), strict=True):
        if len(lines) > 2:  # lines of scores leave no place for them
            axes.legend(
                fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.22)
            )
        elif any(lines):
            axes.legend(fontsize=8, frameon=False)
    return data_uri(figure, "svg", metadata={"Date": None})


def weight_curves(history: Sequence[Mapping[str, Any]], modalities: Sequence[str]) -> str | None:
    """Plot the relative preference and the weights of E11 or E12 per modality, over epochs.

    Each point is the mean over the steps of an epoch that showed the modality. If the rows of
    ``history`` have no ``epoch``, each point is one step. Returns None if all weights were fixed.
    """
    history = _rows(history)
    over = "epoch" if any("epoch" in row for row in history) else "step"
    found = _terms([_hide_unshown(row) for row in history], modalities, over)
    panels = {
        title: {name: _mean_per_place(points) for name, points in found[term].items()}
        for term, title in _WEIGHT_TITLES.items()
        if term in found
    }
    if not panels:
        return None
    figure = _panels(panels, "epoch" if over == "epoch" else "outer step", modalities)
    if "preference" in found:
        figure.axes[0].axhline(0, color=INK, linewidth=0.8)
    # All panels have the same lines, so one legend above them is enough.
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper left", fontsize=9, frameon=False,
        ncols=len(handles),
    )  # fmt: skip
    return data_uri(figure, "svg", metadata={"Date": None})


def cosine_curve(history: Sequence[Mapping[str, Any]]) -> str | None:
    """Plot the cosine of the meta-gradient with the single-level gradient, ``cosine``, against the step.

    Returns None if no row has one.
    """
    lines: _Lines = {}
    for i, row in enumerate(_rows(history)):
        _add_point(lines, "cosine", _place(row, "step", i), row.get("cosine"))
    if not lines:
        return None
    figure = _panels({"": lines}, "outer step", ())
    (axes,) = figure.axes
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_ylim(min(-0.05, axes.get_ylim()[0]), 1.05)
    return data_uri(figure, "svg", metadata={"Date": None})


def _values(lines: _Lines) -> list[list[float]]:
    return [[y for _, y in points] for points in lines.values()]


def _validation(history: Sequence[Mapping[str, Any]]) -> _Lines:
    """The mean over subsets and the worst subset, for each kind of weights."""
    lines: _Lines = {}
    for i, row in enumerate(history):
        scores = row.get("validation")
        if not isinstance(scores, Mapping):
            continue
        for kind, name in _WEIGHTS.items():
            found = scores.get(kind)
            if isinstance(found, Mapping):
                for key, what in (("dice", "mean"), ("worst", "worst subset")):
                    _add_point(lines, f"{what}{name}", _place(row, "step", i), found.get(key))
    return lines


def _terms(
    history: Sequence[Mapping[str, Any]], modalities: Sequence[str], over: str
) -> dict[str, _Lines]:
    """The lines of each term against ``over``, a key of the rows: one line, or one per modality."""
    panels: dict[str, _Lines] = {}
    for i, row in enumerate(history):
        place, terms = _place(row, over, i), row.get("terms")
        for term, value in terms.items() if isinstance(terms, Mapping) else ():
            lines: _Lines = panels.get(str(term), {})
            if isinstance(value, (list, tuple)):
                names = modalities if len(value) == len(modalities) else range(len(value))
                for name, part in zip(names, value, strict=True):
                    _add_point(lines, str(name), place, part)
            else:
                _add_point(lines, "", place, value)
            if lines:
                panels[str(term)] = lines
    return panels


def _hide_unshown(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Set the preference and delta of modalities that the batch did not show to None.

    Example:
        >>> _hide_unshown({"terms": {"shown": [0, 2], "beta": [1.0, 1.0], "delta": [0.0, 0.5]}})["terms"]
        {'shown': [0, 2], 'beta': [1.0, 1.0], 'delta': [None, 0.5]}
    """
    terms = row.get("terms")
    if not isinstance(terms, Mapping) or not isinstance(terms.get("shown"), (list, tuple)):
        return row
    shown = terms["shown"]
    kept = {
        term: [value if n else None for value, n in zip(terms[term], shown, strict=False)]
        for term in ("preference", "delta")
        if isinstance(terms.get(term), (list, tuple))
    }
    return {**row, "terms": {**terms, **kept}}


def _rows(history: Sequence[Any]) -> list[Mapping[str, Any]]:
    """The lines that are objects; ``metrics.jsonl`` may come from elsewhere."""
    return [row for row in history if isinstance(row, Mapping)]


def _number(value: Any) -> float | None:
    """A finite number, or None.

    Example:
        >>> [_number(value) for value in (2, 0.5, 10**400, math.nan, "1", None)]
        [2.0, 0.5, None, None, None, None]
    """
    try:
        number = float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _place(row: Mapping[str, Any], over: str, index: int) -> float:
    place = _number(row.get(over))
    return index if place is None else place


def _add_point(lines: _Lines, line: str, place: float, value: Any) -> None:
    number = _number(value)
    if number is not None:
        lines.setdefault(line, []).append((place, number))


def _mean_per_place(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average the points of each place.

    Example:
        >>> _mean_per_place([(1, 2.0), (1, 4.0), (2, 5.0)])
        [(1.0, 3.0), (2.0, 5.0)]
    """
    places, values = np.array(points, dtype=np.float64).T
    unique, index = np.unique(places, return_inverse=True)
    means = np.bincount(index, values) / np.bincount(index)
    return list(zip(unique.tolist(), means.tolist(), strict=True))


def _panels(panels: Mapping[str, _Lines], x: str, modalities: Sequence[str]) -> Figure:
    """Plot one panel per title, three per row, without legends. A modality keeps its colour."""
    columns = min(3, len(panels))
    tall = math.ceil(len(panels) / columns)
    # The page scales figures to its full width, so equal widths give equal font sizes.
    figure = new_figure(10.5 if columns > 1 else 6.0, 2.5 * tall, "constrained")
    for place, (title, lines) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(tall, columns, place)
        for i, (name, points) in enumerate(lines.items()):
            places, values = np.array(points).T
            colour = class_colour(1 + (modalities.index(name) if name in modalities else i))
            if len(lines) <= 2:
                axes.plot(places, values, color=colour, alpha=0.25, linewidth=0.7)
            smooth = _smooth(values)
            axes.plot(places, smooth, color=colour, linewidth=1.6, label=figure_text(name))
        style_axes(axes, title, x, "")
    return figure


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred running mean over a twentieth of the curve. The window is shorter at the ends.

    Example:
        >>> _smooth(np.arange(4.0)).tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    half = len(values) // 40
    window = np.ones(2 * half + 1)
    count = np.convolve(np.ones(len(values)), window)
    smooth: NDArray[np.float64] = np.convolve(values, window) / count
    return smooth[half : half + len(values)]
