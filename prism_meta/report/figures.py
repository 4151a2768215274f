"""Pictures of a report, as addresses that hold all of their data: plots, heat map, overlays."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from prism_meta.errors import PrismError, raise_faults
from prism_meta.report import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colours that the colour-blind tell apart. Source: Okabe and Ito, Color Universal Design, 2008.
OKABE_ITO: tuple[str, ...] = (
    "#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#0072b2", "#d55e00", "#f0e442",
)  # fmt: skip

#: Marks of a modality that a subset has, or lacks.
SHOWN, HIDDEN = "●", "○"

#: Of a panel, per name of a line: its points.
_Lines = dict[str, list[tuple[float, float]]]

#: Terms that are weights or make them, and the titles of their panels.
_WEIGHTS = {
    "preference": "relative preference RP",
    "beta": "weight of pixel distillation β",
    "delta": "weight of prototype alignment δ",
}

_INK, _FAINT = "#334155", "#e2e8f0"


@dataclass(frozen=True)
class Overlay:
    """One slice of one case: its image, its labels, and what was predicted from each subset.

    Args:
        case: name of the case.
        background: (H, W) float, the image to draw on; any unit, NaN is black.
        truth: (H, W) int, class indices.
        predictions: subset name -> (H, W) int, class indices.
        background_name: what the image is, e.g. ``flair``.

    Raises:
        PrismError: the shapes differ.

    Example:
        >>> labels = np.zeros((4, 4), dtype=np.int64)
        >>> Overlay("case1", np.ones((4, 4)), labels, {"t1": labels}, "flair").case
        'case1'
    """

    case: str
    background: NDArray[np.floating[Any]]
    truth: NDArray[np.integer[Any]]
    predictions: Mapping[str, NDArray[np.integer[Any]]]
    background_name: str

    def __post_init__(self) -> None:
        shape = self.background.shape
        maps = {"truth": self.truth, **{f"prediction {k}": v for k, v in self.predictions.items()}}
        faults = [
            f"overlay of {self.case}: {name} is {labels.shape}, expected the background's {shape}, "
            "two sizes; cut all from the same slice"
            for name, labels in maps.items()
            if labels.shape != shape or len(shape) != 2
        ]
        raise_faults(PrismError, faults)


def _figure(width: float, height: float, layout: Literal["constrained"] | None) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _uri(figure: Figure, kind: str, **options: Any) -> str:
    """The figure as an address that holds all of it; as an image, its ids cannot clash."""
    stream = io.BytesIO()
    figure.savefig(stream, format=kind, **options)
    mime = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    return f"data:{mime};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def _plain(axes: Axes, title: str, x: str, y: str) -> None:
    """Axes of one look: two spines, faint lines across."""
    axes.set_title(_no_math(title), fontsize=10, color=_INK, loc="left", fontweight="bold")
    axes.set_xlabel(x, fontsize=9, color=_INK)
    axes.set_ylabel(y, fontsize=9, color=_INK)
    axes.tick_params(labelsize=8.5, colors=_INK, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#94a3b8")
    axes.grid(axis="y", color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)


def _no_math(text: str) -> str:
    """A name as it stands: matplotlib would read $...$ as a formula and fail on a bad one."""
    return text.replace("$", r"\$")


def class_colour(index: int) -> str:
    return OKABE_ITO[(index - 1) % len(OKABE_ITO)]


def heat_map(summary: Summary, value: str) -> dict[str, Any]:
    """Colours of the heat map per (subset, region): cividis, yellow is better."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    numbers = {key: float(getattr(cell, value)) for key, cell in summary.cells.items()}
    known = [x for x in numbers.values() if not math.isnan(x)] or [0.0]
    low, high = (min(known), max(known)) if value == "dice" else (max(known), min(known))
    colours = {}
    for key, x in numbers.items():
        if not math.isnan(x):
            red, green, blue, _ = rgba = colormaps["cividis"]((x - low) / ((high - low) or 1.0))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            colours[key] = (to_hex(rgba), "#ffffff" if dark else "#0f172a")
    stops = [to_hex(colormaps["cividis"](x / 8)) for x in range(9)]
    return {"colours": colours, "low": low, "high": high, "stops": ", ".join(stops)}


def dice_by_count(summary: Summary, shown: Mapping[str, tuple[bool, ...]]) -> str:
    """Dice against the number of shown modalities: a dot per subset, a line through the means."""
    figure = _figure(7.6, 3.4, "constrained")
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
            markersize=6, markeredgecolor="white", label=_no_math(region),
        )  # fmt: skip
    _plain(axes, "", "number of shown modalities", "Dice, %")
    axes.set_xticks(counts)
    axes.set_xlim(counts[0] - 0.4, counts[-1] + 0.4)
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]), top=min(100.0, axes.get_ylim()[1] + 2))
    axes.legend(fontsize=9, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _uri(figure, "svg", metadata={"Date": None})


def training_curves(history: Sequence[Mapping[str, Any]], modalities: Sequence[str]) -> str | None:
    """Losses and terms against the step, one panel each; None when there is nothing to draw."""
    losses: _Lines = {}
    for i, row in enumerate(history):
        for name in ("train", "meta"):
            _add(losses, name, _place(row, "step", i), row.get(f"{name}_loss"))
    panels = {"loss": losses} if losses else {}
    for term, lines in _terms(history, modalities, "step").items():
        if term not in _WEIGHTS and term != "shown":
            panels[term] = lines
    if not panels:
        return None
    figure = _panels(panels, "outer step", modalities)
    for axes, lines in zip(figure.axes, panels.values(), strict=True):
        if any(lines):
            axes.legend(fontsize=8, frameon=False, ncols=2 if len(lines) > 2 else 1)
    return _uri(figure, "svg", metadata={"Date": None})


def weight_curves(history: Sequence[Mapping[str, Any]], modalities: Sequence[str]) -> str | None:
    """Relative preference and the weights of E11 or E12 per modality, over epochs.

    Each point is the mean of an epoch, over the steps that showed the modality; without ``epoch`` in
    ``history``, the value of a step. None when all weights were fixed.
    """
    over = "epoch" if any("epoch" in row for row in history) else "step"
    found = _terms([_where_shown(row) for row in history], modalities, over)
    panels = {
        title: {name: _means(points) for name, points in found[term].items()}
        for term, title in _WEIGHTS.items()
        if term in found
    }
    if not panels:
        return None
    figure = _panels(panels, "epoch" if over == "epoch" else "outer step", modalities)
    if "preference" in found:
        figure.axes[0].axhline(0, color=_INK, linewidth=0.8)
    # The lines have the same names in all panels, and may run anywhere: one legend above them.
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper left", fontsize=9, frameon=False,
        ncols=len(handles),
    )  # fmt: skip
    return _uri(figure, "svg", metadata={"Date": None})


def _terms(
    history: Sequence[Mapping[str, Any]], modalities: Sequence[str], over: str
) -> dict[str, _Lines]:
    """Per term a line, or one per modality, against ``over``, a key of the rows."""
    panels: dict[str, _Lines] = {}
    for i, row in enumerate(history):
        place, terms = _place(row, over, i), row.get("terms")
        for term, value in terms.items() if isinstance(terms, Mapping) else ():
            lines: _Lines = panels.get(str(term), {})
            if isinstance(value, (list, tuple)):
                names = modalities if len(value) == len(modalities) else range(len(value))
                for name, part in zip(names, value, strict=True):
                    _add(lines, str(name), place, part)
            else:
                _add(lines, "", place, value)
            if lines:
                panels[str(term)] = lines
    return panels


def _where_shown(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row without what it says of modalities that its batch did not show; beta needs no batch.

    Example:
        >>> _where_shown({"terms": {"shown": [0, 2], "beta": [1.0, 1.0], "delta": [0.0, 0.5]}})["terms"]
        {'shown': [0, 2], 'beta': [1.0, 1.0], 'delta': [None, 0.5]}
    """
    terms = row.get("terms")
    if not isinstance(terms, Mapping) or not isinstance(terms.get("shown"), Sequence):
        return row
    kept = {
        term: [v if n else None for v, n in zip(terms[term], terms["shown"], strict=True)]
        for term in ("preference", "delta")
        if isinstance(terms.get(term), Sequence)
    }
    return {**row, "terms": {**terms, **kept}}


def _place(row: Mapping[str, Any], over: str, index: int) -> float:
    place = row.get(over)
    return place if isinstance(place, (int, float)) else index


def _add(lines: _Lines, line: str, place: float, value: Any) -> None:
    if isinstance(value, (int, float)) and math.isfinite(value):
        lines.setdefault(line, []).append((place, float(value)))


def _means(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """One point per place, the mean of those there.

    Example:
        >>> _means([(1, 2.0), (1, 4.0), (2, 5.0)])
        [(1.0, 3.0), (2.0, 5.0)]
    """
    places, values = np.array(points, dtype=np.float64).T
    unique, index = np.unique(places, return_inverse=True)
    means = np.bincount(index, values) / np.bincount(index)
    return list(zip(unique.tolist(), means.tolist(), strict=True))


def _panels(panels: Mapping[str, _Lines], x: str, modalities: Sequence[str]) -> Figure:
    """One panel per title, in rows of three, a modality in one colour; without legends."""
    columns = min(3, len(panels))
    tall = math.ceil(len(panels) / columns)
    # A page shows it at full width: with one width, letters are of one size.
    figure = _figure(10.5 if columns > 1 else 6.0, 2.5 * tall, "constrained")
    for place, (title, lines) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(tall, columns, place)
        for i, (name, points) in enumerate(lines.items()):
            places, values = np.array(points).T
            colour = class_colour(1 + (modalities.index(name) if name in modalities else i))
            if len(lines) <= 2:
                axes.plot(places, values, color=colour, alpha=0.25, linewidth=0.7)
            smooth = _smooth(values)
            axes.plot(places, smooth, color=colour, linewidth=1.6, label=_no_math(name))
        _plain(axes, title, x, "")
    return figure


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred running mean over a twentieth of the curve; the window is cut at the ends.

    Example:
        >>> _smooth(np.arange(4.0)).tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    half = len(values) // 40
    window = np.ones(2 * half + 1)
    count = np.convolve(np.ones(len(values)), window)
    smooth: NDArray[np.float64] = np.convolve(values, window) / count
    return smooth[half : half + len(values)]


def check_overlays(overlays: Sequence[Overlay], class_names: Sequence[str]) -> None:
    faults = []
    for overlay in overlays:
        for name, labels in {"truth": overlay.truth, **overlay.predictions}.items():
            if labels.size and not 0 <= labels.min() <= labels.max() < len(class_names):
                faults.append(
                    f"overlay of {overlay.case}: {name} has classes {labels.min()} to "
                    f"{labels.max()}, expected 0 to {len(class_names) - 1}; name every class in "
                    "class_names"
                )
    raise_faults(PrismError, faults)


def draw_overlay(overlay: Overlay, modalities: Sequence[str]) -> list[tuple[str, str, str]]:
    """(name, marks, picture): the image, the truth, each prediction with the truth as outlines."""
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
    figure = _figure(scale * width, scale * height, None)
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
            # Outlines run between voxels, so the half-way level of a padded 0/1 map is the edge.
            edge = np.pad(overlay.truth == k, 1).astype(np.float64)
            x, y = np.arange(-1, width + 1), np.arange(-1, height + 1)
            axes.contour(x, y, edge, levels=[0.5], colors=["white"], linewidths=0.8)
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    return _uri(figure, "png", dpi=180)
