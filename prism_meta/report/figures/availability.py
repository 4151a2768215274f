"""Figure of the data: which case has which modalities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from prism_meta.report.figures.style import (
    INK,
    class_colour,
    data_uri,
    figure_text,
    new_figure,
)

#: Names of cases are drawn below a panel of at most this many.
_NAMED = 40
#: Cases of all panels together that are drawn one square each; more of them share a width.
_WIDTH = 10.5


def availability_chart(
    groups: Mapping[str, Mapping[str, Sequence[str]]], modalities: Sequence[str]
) -> str:
    """Plot a panel per group, a row per modality and a column per case, filled where the case has it.

    Cases with the same modalities stand side by side, those with the most first.

    Args:
        groups: group -> case -> names of its modalities. A group without cases is left out.
        modalities: names of all M modalities, in order.
    """
    from matplotlib.colors import ListedColormap

    groups = {name: cases for name, cases in groups.items() if cases}
    named = [len(cases) <= _NAMED for cases in groups.values()]
    longest = max(
        (len(c) for cases, n in zip(groups.values(), named, strict=True) if n for c in cases),
        default=0,
    )
    height = 0.22 * len(modalities) + 0.45 + 0.07 * min(longest, 24)
    figure = new_figure(_WIDTH, height * len(groups), "constrained")
    for place, ((group, cases), with_names) in enumerate(zip(groups.items(), named, strict=True)):
        has = {case: [name in there for name in modalities] for case, there in cases.items()}
        order = sorted(has, key=lambda case: (-sum(has[case]), [not x for x in has[case]], case))
        axes = figure.add_subplot(len(groups), 1, place + 1)
        filled = np.array([has[case] for case in order]).T  # (modalities, cases)
        axes.pcolormesh(
            np.arange(len(order) + 1), np.arange(len(modalities) + 1), filled.astype(float),
            cmap=ListedColormap(["#f1f5f9", class_colour(5)]), vmin=0, vmax=1,
            edgecolors="white", linewidth=1.2 if len(order) <= 4 * _NAMED else 0,
        )  # fmt: skip
        axes.set_xlim(0, max(len(order), _NAMED // 2))
        axes.invert_yaxis()
        axes.set_yticks(np.arange(len(modalities)) + 0.5, [figure_text(m) for m in modalities])
        shown = [figure_text(case[:24]) for case in order] if with_names else []
        axes.set_xticks(np.arange(len(shown)) + 0.5, shown, rotation=90)
        axes.tick_params(labelsize=8, colors=INK, length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(
            figure_text(f"{group}, {len(order)}"),
            fontsize=9.5,
            color=INK,
            loc="left",
            weight="bold",
        )
    return data_uri(figure, "svg")
