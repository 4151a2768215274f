"""Tables for the terminal, and one folder per evaluation: records, a summary, and an HTML page.

Sees records and pictures, never models. The page is one file: no network, no scripts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_meta.errors import PrismError, raise_faults
from prism_meta.files import atomic, writable_folder
from prism_meta.modalities import subset_name
from prism_meta.records import Record, write_records
from prism_meta.report import Change, Comparison, Interval, Summary, summarize
from prism_meta.report.figures import (
    HIDDEN,
    SHOWN,
    Overlay,
    check_overlays,
    class_colour,
    dice_by_count,
    draw_overlay,
    heat_map,
    training_curves,
    weight_curves,
)

if TYPE_CHECKING:
    from rich.table import Table


def results_table(summary: Summary, *, title: str, policy: str, modalities: Sequence[str]) -> Table:
    """The results of one evaluation: a row per subset, averages below, the worst subset marked.

    Args:
        summary: of the records.
        title: above the table.
        policy: what empty masks give, ``EmptyPolicy.statement``; goes under the table.
        modalities: names of all M modalities, in order; a column of ● and ○ each.

    Raises:
        PrismError: a subset names a modality that is not in ``modalities``.

    Example:
        >>> records = [Record("case1", name, "WT", 0.5, 4.0) for name in ("t1", "t1+t2")]
        >>> table = results_table(
        ...     summarize(records), title="Demo", policy="none empty", modalities=("t1", "t2")
        ... )
        >>> [column.header for column in table.columns[:3]]
        ['t1', 't2', 'Dice\\n%\\nWT']
    """
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    shown = _shown(summary, modalities)
    worst = summary.by_subset[summary.worst]
    caption = (
        f"Dice in %, HD95 in mm, mean over {summary.overall.cases} cases. "
        f"Empty masks: {policy}.{_left_out(summary)}\n"
        f"Worst subset: {summary.worst}, mean Dice {_dice(worst.dice)} %."
    )
    # No padding and three short lines of header: four modalities and three regions fit 80 columns.
    table = Table(
        title=Text(title, style="bold"),
        caption=Text(caption),
        caption_justify="left",
        box=SIMPLE,
        padding=0,
    )
    for name in modalities:
        table.add_column(escape(name), justify="center", no_wrap=True, vertical="bottom")
    for head in ("Dice\n%", "HD95\nmm"):
        for name in (*summary.regions, "mean"):
            table.add_column(f"{head}\n{escape(name)}", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for subset in summary.subsets:
        dice, hd95 = _row(summary, subset)
        note = {summary.worst: "◀ worst", summary.full: "all shown"}.get(subset, "")
        table.add_row(
            *(SHOWN if flag else HIDDEN for flag in shown[subset]),
            *map(_dice, dice),
            *map(_mm, hd95),
            note,
            style="bold red" if subset == summary.worst else None,
            end_section=subset == summary.subsets[-1],
        )
    averages = [*(summary.by_region[name] for name in summary.regions), summary.overall]
    table.add_row(
        *("" for _ in modalities),
        *(_dice(cell.dice) for cell in averages),
        *(_mm(cell.hd95) for cell in averages),
        f"mean of {len(summary.subsets)}",
        style="bold",
    )
    return table


def comparison_table(comparison: Comparison, *, names: tuple[str, str] = ("a", "b")) -> Table:
    """Paired differences of two runs with 95% intervals; bold where the interval excludes 0.

    Args:
        comparison: made by ``compare(a, b)``; its differences are b - a.
        names: of runs a and b.

    Example:
        >>> from prism_meta.report import compare
        >>> run = [Record(f"case{i}", "t1", "WT", 0.5, 4.0) for i in range(3)]
        >>> comparison_table(compare(run, run), names=("first", "second")).row_count
        3
    """
    from rich.table import Table
    from rich.text import Text

    caption = (
        f"Paired over {comparison.cases} cases; 95% percentile bootstrap over cases, "
        f"{comparison.resamples} resamples, seed {comparison.seed}. Dice up and HD95 down is "
        "better. Rows are not corrected for their number."
    )
    if comparison.undefined:
        caption += f" Left out as undefined: {comparison.undefined} pairs of records."
    table = Table(
        title=Text(f"{names[1]} minus {names[0]}", style="bold"),
        caption=Text(caption),
        caption_justify="left",
    )
    table.add_column("over")
    for head in ("Dice, points", "HD95, mm"):
        table.add_column(head, justify="right", no_wrap=True)
        table.add_column("95% interval", justify="right", no_wrap=True)

    def add(name: str, change: Change, last: bool) -> None:
        cells = [Text(name)]
        for interval, scale in ((change.dice, 100.0), (change.hd95, 1.0)):
            style = "bold" if interval.excludes_zero else ""
            cells += [Text(text, style=style) for text in _interval(interval, scale)]
        table.add_row(*cells, end_section=last)

    add("all", comparison.overall, True)
    for group in (comparison.by_region, comparison.by_subset):
        for i, (name, change) in enumerate(group.items(), 1):
            add(name, change, i == len(group))
    return table


def write_report(
    folder: Path | str,
    *,
    title: str,
    records: Sequence[Record],
    modalities: Sequence[str],
    class_names: Sequence[str],
    policy_statement: str,
    overlays: Sequence[Overlay] = (),
    history: Sequence[Mapping[str, Any]] = (),
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Write ``records.csv``, ``summary.json`` and ``report.html`` into ``folder``.

    Args:
        folder: made when it is not there; files of these names in it are replaced.
        title: of the page.
        records: measurements, each (case, subset, region) once.
        modalities: names of all M modalities, in order.
        class_names: of the class indices in ``overlays``; the first is the background.
        policy_statement: what empty masks give, ``EmptyPolicy.statement``.
        overlays: slices to draw.
        history: rows of ``metrics.jsonl``; of their keys ``step``, ``epoch``, ``train_loss``,
            ``meta_loss`` and ``terms`` are drawn where they are there.
        facts: what made the numbers: config, versions, seed, command.

    Returns:
        The path of ``report.html``.

    Raises:
        PrismError: all faults of the inputs; nothing is written then.
        OutputError: the folder cannot be written.

    Example:
        >>> import tempfile
        >>> records = [Record("case1", "t1", "WT", 0.5, 4.0)]
        >>> page = write_report(
        ...     tempfile.mkdtemp(), title="Demo", records=records, modalities=("t1", "t2"),
        ...     class_names=("background", "tumour"), policy_statement="none empty",
        ... )
        >>> page.name
        'report.html'
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    folder = writable_folder(folder)
    summary = summarize(records)
    shown = _shown(summary, modalities)
    check_overlays(overlays, class_names)
    drawn = [draw_overlay(overlay, modalities) for overlay in overlays]
    summary_dict = {"title": title, "empty_masks": policy_statement, **summary.to_dict()}

    environment = Environment(
        loader=PackageLoader("prism_meta.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(dice=_dice, mm=_mm)
    full = subset_name([True] * len(modalities), modalities)
    html = environment.get_template("report.html.j2").render(
        title=title,
        summary=summary,
        rows=[(subset, shown[subset], *_row(summary, subset)) for subset in summary.subsets],
        full=summary.full if summary.full and all(shown[summary.full]) else None,
        full_name=full,
        modalities=modalities,
        policy=policy_statement,
        left_out=_left_out(summary),
        heat=[heat_map(summary, "dice"), heat_map(summary, "hd95")],
        by_count=dice_by_count(summary, shown),
        curves=training_curves(history, modalities),
        weights=weight_curves(history, modalities),
        overlays=list(zip(overlays, drawn, strict=True)),
        classes=[(name, class_colour(i)) for i, name in enumerate(class_names) if i > 0],
        facts=dict(facts or {}),
    )
    write_records(folder / "records.csv", records)
    with atomic(folder / "summary.json") as partial:
        text = json.dumps(summary_dict, indent=2, allow_nan=False, ensure_ascii=False)
        partial.write_text(text + "\n", encoding="utf-8")
    with atomic(folder / "report.html") as partial:
        partial.write_text(html, encoding="utf-8")
    return folder / "report.html"


# --- numbers as text ---------------------------------------------------------------------------


def _dice(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f}"


def _mm(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1f}"


def _interval(interval: Interval, scale: float) -> tuple[str, str]:
    mean, low, high = (scale * x for x in (interval.mean, interval.low, interval.high))
    return (
        "–" if math.isnan(mean) else f"{mean:+.1f}",
        "–" if math.isnan(low) else f"{low:+.1f} to {high:+.1f}",
    )


def _left_out(summary: Summary) -> str:
    count = summary.overall.undefined
    return f" Left out as undefined: {count} records." if count else ""


def _shown(summary: Summary, modalities: Sequence[str]) -> dict[str, tuple[bool, ...]]:
    """Per subset, which modalities it names."""
    faults = [
        f"subset {subset!r}: expected modalities of {', '.join(modalities)} joined by '+'; "
        "give the modalities that the records were made with"
        for subset in summary.subsets
        if not set(subset.split("+")) <= set(modalities)
    ]
    raise_faults(PrismError, faults)
    return {s: tuple(name in s.split("+") for name in modalities) for s in summary.subsets}


def _row(summary: Summary, subset: str) -> tuple[list[float], list[float]]:
    """Dice and HD95 of a subset: one value per region, then their mean; NaN where unmeasured."""
    cells = [summary.cells.get((subset, region)) for region in summary.regions]
    cells.append(summary.by_subset[subset])
    return (
        [cell.dice if cell else math.nan for cell in cells],
        [cell.hd95 if cell else math.nan for cell in cells],
    )
