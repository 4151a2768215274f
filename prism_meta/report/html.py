"""The report: one folder with records.csv, summary.json and an HTML page.

The page is a single file without scripts, and it loads nothing from the network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prism_meta.files import atomic, writable_folder
from prism_meta.modalities import subset_name
from prism_meta.records import Record, write_records
from prism_meta.report.averages import summarize
from prism_meta.report.figures.curves import training_curves, weight_curves
from prism_meta.report.figures.scores import dice_by_count, heat_map
from prism_meta.report.figures.slices import draw_overlay
from prism_meta.report.figures.style import class_colour
from prism_meta.report.overlays import Overlay, check_overlays
from prism_meta.report.text import (
    format_dice,
    format_mm,
    shown_modalities,
    subset_scores,
    undefined_note,
)


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
        folder: output folder. It is created if needed, and existing files are replaced.
        title: title of the page.
        records: measurements, each (case, subset, region) once.
        modalities: names of all M modalities, in order.
        class_names: names of the class indices in ``overlays``; the first is the background.
        policy_statement: the scores of empty masks, ``EmptyPolicy.statement``.
        overlays: slices to draw.
        history: rows of ``metrics.jsonl``. The keys ``step``, ``epoch``, ``train_loss``,
            ``meta_loss`` and ``terms`` are plotted if they exist.
        facts: how the numbers were made, e.g. config, versions, seed, command.

    Returns:
        The path of ``report.html``.

    Raises:
        PrismError: the inputs do not match (all faults together). Nothing is written then.
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
    shown = shown_modalities(summary, modalities)
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
    environment.filters.update(dice=format_dice, mm=format_mm)
    full = subset_name([True] * len(modalities), modalities)
    html = environment.get_template("report.html.j2").render(
        title=title,
        summary=summary,
        rows=[
            (subset, shown[subset], *subset_scores(summary, subset)) for subset in summary.subsets
        ],
        full=summary.full if summary.full and all(shown[summary.full]) else None,
        full_name=full,
        modalities=modalities,
        policy=policy_statement,
        left_out=undefined_note(summary),
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
        partial.write_text(html, encoding="utf-8", errors="backslashreplace")
    return folder / "report.html"
