"""The report: one folder with records.csv, summary.json and an HTML page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prism_meta.errors import one_line
from prism_meta.files import atomic, writable_folder
from prism_meta.modalities import subset_name
from prism_meta.records import Record, write_records
from prism_meta.report.averages import empty_count, summarize, summarize_policies
from prism_meta.report.cases import group_row, score_cases
from prism_meta.report.cleaned import Cleaned, written_or_removed
from prism_meta.report.figures.availability import availability_chart
from prism_meta.report.figures.curves import cosine_curve, training_curves, weight_curves
from prism_meta.report.figures.scores import dice_by_count, heat_map
from prism_meta.report.figures.slices import draw_outlines, draw_overlay
from prism_meta.report.figures.style import class_colour
from prism_meta.report.findings import CHANGE, UNITS, bootstrap_note, findings
from prism_meta.report.overlays import Overlay, check_overlays
from prism_meta.report.page import render
from prism_meta.report.text import shown_modalities, undefined_note
from prism_meta.report.worst import WorstCase

#: Names of the files of a report.
REPORT_FILES = ("records.csv", "summary.json", "report.html")
#: Headings of the page's sections, in order. A page leaves out those that have nothing to show.
SECTIONS = {
    "faults": "Cases that were left out",
    "subsets": "Dice and HD95 of each subset",
    "count": "Dice by number of shown modalities",
    "averages": "Averages over all subsets",
    "balance": "Balance of the subsets and contribution of each modality",
    "cases": "Scores of each case",
    "worst": "The worst cases",
    "labels": "Predicted labels",
    "results": "All results",
    "cleanup": "After the clean-up",
    "policies": "Policies for empty masks",
    "data": "What was trained and tested on what",
    "training": "Training",
    "cosine": "Agreement of the meta-gradient with the single-level gradient",
    "weights": "Weights of the modalities",
    "made": "How these numbers were made",
    "repeat": "How to repeat them",
}


def write_report(
    folder: Path | str,
    *,
    title: str,
    records: Sequence[Record],
    modalities: Sequence[str],
    class_names: Sequence[str],
    policy_statement: str,
    overlays: Sequence[Overlay] = (),
    worst: Sequence[WorstCase] = (),
    history: Sequence[Mapping[str, Any]] = (),
    trained_on: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    facts: Mapping[str, str] | None = None,
    commands: Mapping[str, str] | None = None,
    faults: Sequence[str] = (),
    cleaned: Cleaned | None = None,
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
        worst: cases to draw in three planes; see ``WorstCases``.
        history: rows of ``metrics.jsonl``. The keys ``step``, ``epoch``, ``train_loss``,
            ``meta_loss``, ``terms``, ``validation`` and ``cosine`` are plotted if they exist.
        trained_on: group of cases, e.g. ``training`` -> case -> names of the modalities that it has. The
            page shows them beside those of the test cases, which it takes from the records.
        facts: how the numbers were made, e.g. config, versions, seed.
        commands: what a command does -> the command, or several lines of them.
        faults: one line per fault of the cases that were left out. The page shows them.
        cleaned: the same measurements after a clean-up, which are shown beside ``records``; they go to
            ``records_cleaned.csv``. Defaults to no clean-up.

    Returns:
        The path of ``report.html``.

    Raises:
        PrismError: the inputs do not match (all faults together). Nothing is written then.
        OutputError: a file cannot be written. The old files are then kept, all three.

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
    folder = writable_folder(folder, files=REPORT_FILES)
    records = [replace(r, case=one_line(r.case), region=one_line(r.region)) for r in records]
    summary, by_policy = summarize(records), summarize_policies(records)
    measured = {n for n, score in summary.overall.scores.items() if not math.isnan(score.mean)}
    shown = shown_modalities(summary, modalities)
    check_overlays([*overlays, *(plane for case in worst for plane in case.planes)], class_names)
    drawn = [draw_overlay(overlay, modalities) for overlay in overlays]
    summary_dict = {
        "title": title,
        "empty_masks": policy_statement,
        "left_out": list(faults),
        **summary.to_dict(),
        "policies": {
            name: {
                "overall": under.overall.to_dict(),
                "by_region": {region: cell.to_dict() for region, cell in under.by_region.items()},
            }
            for name, under in by_policy.items()
        },
    }
    if cleaned is not None:
        summary_dict["cleaned"] = {"rules": cleaned.rules, **cleaned.summary.to_dict()}
    full = subset_name([True] * len(modalities), modalities)
    curves, weights = (draw(history, modalities) for draw in (training_curves, weight_curves))
    cosine = cosine_curve(history)
    cases = score_cases(records)
    groups = {**(trained_on or {}), "test": {row.case: row.modalities for row in cases}}
    absent = {
        name
        for name, there in {
            "faults": faults,
            "worst": worst,
            "labels": overlays,
            "policies": by_policy,
            "cleanup": cleaned,
            "training": curves,
            "cosine": cosine,
            "weights": weights,
            "made": facts,
            "repeat": commands,
        }.items()
        if not there
    }
    html = render(
        "report.html.j2",
        title=title,
        sections={name: heading for name, heading in SECTIONS.items() if name not in absent},
        summary=summary,
        rows=[(subset, shown[subset]) for subset in summary.subsets],
        notes={
            subset: "◀ worst" if subset == summary.worst else "all shown" * all(shown[subset])
            for subset in summary.subsets
        },
        full=summary.full if summary.full and all(shown[summary.full]) else None,
        full_name=full,
        modalities=modalities,
        policy=policy_statement,
        left_out=undefined_note(summary),
        findings=findings(summary),
        intervals=bootstrap_note(summary),
        scores=[(name, UNITS[name]) for name in ("dice", "hd95_mm")],
        change=CHANGE,
        units=[(name, unit) for name, unit in UNITS.items() if name in measured],
        by_policy=by_policy,
        cleaned=None if cleaned is None else cleaned.table(summary),
        empty=empty_count(records),
        heat=[heat_map(summary, "dice"), heat_map(summary, "hd95")],
        by_count=dice_by_count(summary, shown),
        cases=cases,
        has={row.case: [name in row.modalities for name in modalities] for row in cases},
        groups=[group_row(name, there, modalities) for name, there in groups.items() if there],
        availability_chart=availability_chart(groups, modalities),
        curves=curves,
        cosine=cosine,
        weights=weights,
        worst=[
            (case.scores, [(p.plane, p.background_name, draw_outlines(p)) for p in case.planes])
            for case in worst
        ],
        overlays=list(zip(overlays, drawn, strict=True)),
        classes=[(name, class_colour(i)) for i, name in enumerate(class_names) if i > 0],
        facts=dict(facts or {}),
        commands=dict(commands or {}),
        faults=faults,
    )
    text = json.dumps(summary_dict, indent=2, allow_nan=False, ensure_ascii=False)
    table, numbers, page = (folder / name for name in REPORT_FILES)
    # All of them or none; a name that is no UTF-8 is escaped, as JSON does it, too.
    with (
        written_or_removed(folder, cleaned),
        atomic(table) as a,
        atomic(numbers) as b,
        atomic(page) as c,
    ):
        write_records(a, records)
        b.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
        c.write_text(html, encoding="utf-8", errors="backslashreplace")
    return page
