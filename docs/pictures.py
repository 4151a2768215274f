"""Draws the diagrams of the documentation.

python docs/pictures.py    # writes docs/images/data.svg, loops.svg and subsets.svg
"""

from __future__ import annotations

from html import escape
from pathlib import Path

import prism_meta as pm
from prism_meta.files import write_whole

IMAGES = Path(__file__).parent / "images"
INK, EDGE, PALE = "#1f2937", "#0f766e", "#ecfdf5"
FIRST, SECOND, HIDDEN = "#0072b2", "#d55e00", "#ffffff"  # Okabe and Ito: distinct for all readers


def text(
    x: float, y: float, words: str, *, size: int = 14, bold: bool = False, fill: str = INK
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}"{weight} fill="{fill}" text-anchor="middle">'
        f"{escape(words)}</text>"
    )


def box(x: float, y: float, title: str, *lines: str, width: float = 200, height: float = 84) -> str:
    """A box with its upper left corner at (x, y), a title, and smaller lines below it."""
    middle = x + width / 2
    parts = [
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" fill="{PALE}" '
        f'stroke="{EDGE}" stroke-width="1.5"/>',
        text(middle, y + 24, title, bold=True),
    ]
    parts += [text(middle, y + 46 + 18 * n, line, size=12) for n, line in enumerate(lines)]
    return "".join(parts)


def arrow(path: str, colour: str = INK, *, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="6 4"' if dashed else ""
    return (
        f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash} '
        f'marker-end="url(#{colour[1:]})"/>'
    )


def picture(width: int, height: int, title: str, *parts: str) -> str:
    """A whole file. Its background is white, so that it can be read on dark pages, too."""
    heads = "".join(
        f'<marker id="{colour[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
        f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{colour}"/></marker>'
        for colour in (INK, FIRST, SECOND)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" font-family="sans-serif"><title>{escape(title)}</title>'
        f'<defs>{heads}</defs><rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>'
        + "\n".join(parts)
        + "</svg>\n"
    )


def data() -> str:
    """File -> case -> availability -> mask -> episode -> step."""
    steps = [
        ("Files", "NIfTI, some are missing", "one folder per case"),
        ("Case", "pm.load_cases(folder)", "paths, label, patient, site"),
        ("Availability", "bool (N, M)", "which files exist"),
        ("Mask", "bool (B, M), a mask policy", "what the net is shown"),
        ("Episode", "train batch, meta batch", "different cases and masks"),
        ("Step", "MetaLearner.step(train, meta)", "the strategy's gradient"),
    ]
    places = [(20 + 250 * (n % 3), 20 + 130 * (n // 3)) for n in range(6)]
    boxes = [box(x, y, *step, width=210) for (x, y), step in zip(places, steps, strict=True)]
    across = [
        arrow(f"M{x + 210} {y + 42}H{x + 246}") for n, (x, y) in enumerate(places) if n % 3 < 2
    ]
    return picture(750, 254, "From files to a step", *boxes, *across, arrow("M625 104V127H125V146"))


def loops() -> str:
    """The inner and the outer step, and the ways that both gradients take."""
    return picture(
        750, 300, "The inner and the outer step",
        box(30, 90, "phi", "the parameters", "that are deployed", width=170),
        box(290, 90, "phi~", "adapted parameters", "after K inner steps", width=170),
        box(550, 90, "L_meta(phi~)", "meta batch:", "other cases, other masks", width=170),
        arrow("M200 132H286"), text(243, 122, "inner step"), text(243, 152, "L_train", size=12),
        arrow("M460 132H546"), text(503, 122, "evaluate"),
        arrow("M620 90C600 30 150 30 120 86", FIRST),
        text(375, 32, "first order (E3): the gradient at phi~ is applied at phi", fill=FIRST),
        arrow("M620 174C600 215 420 220 390 178", SECOND),
        arrow("M360 174C330 220 150 215 125 178", SECOND),
        text(375, 240, "second order (E4): the gradient goes back through the inner step,", fill=SECOND),
        text(375, 260, "which costs products with the second derivative of L_train", fill=SECOND),
        text(375, 286, "outer step (E2): phi <- phi + alpha (phi~ - phi) - eta_out G", size=13),
    )  # fmt: skip


def subsets() -> str:
    """All 15 subsets, in the order of tables and figures."""
    parts = [text(52, 48 + 30 * m, name) for m, name in enumerate(pm.BRATS)]
    for column, shown in enumerate(pm.subsets(4).tolist()):
        x = 112 + 42 * column
        parts.append(text(x, 20, str(sum(shown)), size=12))
        for m, there in enumerate(shown):
            fill = EDGE if there else HIDDEN
            parts.append(
                f'<circle cx="{x}" cy="{43 + 30 * m}" r="10" fill="{fill}" stroke="{EDGE}" '
                'stroke-width="1.5"/>'
            )
    return picture(750, 160, "The 15 subsets of four modalities", *parts)


PICTURES = {"data": data, "loops": loops, "subsets": subsets}


def main() -> None:
    for name, draw in PICTURES.items():
        write_whole(IMAGES / f"{name}.svg", draw())


if __name__ == "__main__":
    main()
