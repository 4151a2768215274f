"""The common style of all figures: colours, axes, and encoding as data URIs."""

from __future__ import annotations

import base64
import io
import warnings
from typing import TYPE_CHECKING, Any, Literal

from prism_meta.errors import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colours that are distinct for colour-blind readers, too.
#: Source: Okabe and Ito, Color Universal Design, 2008.
OKABE_ITO: tuple[str, ...] = (
    "#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#0072b2", "#d55e00", "#f0e442",
)  # fmt: skip

#: Marks of a modality that is shown to the model, and of one that is hidden.
SHOWN, HIDDEN = "●", "○"

#: Colours of text and of the grid.
INK, FAINT = "#334155", "#e2e8f0"


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = None) -> Figure:
    """Create a figure (sizes in inches) without touching matplotlib's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def data_uri(figure: Figure, kind: str, **options: Any) -> str:
    """Encode a figure as a data URI: the same figure, the same text.

    As an image, its ids cannot clash with those of other figures.
    """
    from matplotlib import rc_context

    if kind == "svg":
        options = {"metadata": {"Date": None}, **options}
    stream = io.BytesIO()
    with warnings.catch_warnings(), rc_context({"svg.hashsalt": "prism-meta"}):
        # A name in letters that the font lacks; the tables of the page show it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(stream, format=kind, **options)
    mime = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    return f"data:{mime};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def style_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Apply the common style to axes: title, labels, two spines, a faint horizontal grid."""
    axes.set_title(figure_text(title), fontsize=10, color=INK, loc="left", fontweight="bold")
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.tick_params(labelsize=8.5, colors=INK, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#94a3b8")
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)


def figure_text(text: str) -> str:
    """A name as matplotlib can draw it: it parses $...$ as a formula, and fails on invalid characters."""
    return one_line(text).replace("$", r"\$")


def class_colour(index: int) -> str:
    """The colour of class ``index``, from 1 on."""
    return OKABE_ITO[(index - 1) % len(OKABE_ITO)]
