"""The report of a study as a page, as Markdown, and as a CSV table."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from prism_meta.files import atomic, writable_folder
from prism_meta.records import escape_cell
from prism_meta.report.figures.study import curves, differences
from prism_meta.report.page import render
from prism_meta.report.study.scores import ScoredRun
from prism_meta.report.study.statistics import RESAMPLES
from prism_meta.report.study.table import Comparisons, Power, Row, study_table
from prism_meta.report.text import format_ends, format_number

#: Names of the files of a report.
FILES = ("study.html", "study.md", "study.csv")
#: Columns of the table in Markdown and on the page.
COLUMNS = (
    "method", "seeds", "steps", "gradients", "time", "memory, MiB", "mean Dice, %", "worst subset, %",
    "mean minus reference", "worst minus reference", "d", "p (Holm)", "seeds needed",
)  # fmt: skip
#: With fewer seeds an interval is too narrow to be believed, and is not marked.
ENOUGH_SEEDS = 5
_HEADINGS = {
    "study_tables": "Methods against the reference",
    "study_curves": "Curves over training",
    "study_search": "The search of each method",
    "study_made": "How these numbers were made",
}


def write_study_report(
    folder: Path | str,
    runs: Sequence[ScoredRun],
    *,
    title: str,
    reference: str,
    base: str,
    power: Power | None = None,
    search: Sequence[Mapping[str, str]] = (),
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Write ``study.html``, ``study.md`` and ``study.csv``; all three or none.

    Args:
        folder: output folder.
        runs: see ``study_table``.
        title: title of the page.
        reference: see ``study_table``.
        base: see ``study_table``.
        power: see ``study_table``.
        search: a row for each point of the searches: column -> text.
        facts: how the numbers were made.

    Returns:
        The path of ``study.html``.

    Raises:
        OutputError: a file cannot be written. The old files are then kept.

    Example:
        >>> import tempfile
        >>> runs = [ScoredRun(name, "all", "gradients", seed, {"p1": {"t1": 0.5 + 0.1 * seed}})
        ...         for name in ("one", "two") for seed in (0, 1)]
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = write_study_report(folder, runs, title="Two", reference="one", base="gradients")
        >>> (folder / "study.csv").read_text().splitlines()[1].split(",")[:5]
        ['all', 'gradients', 'one', '2', '0']
    """
    folder = writable_folder(folder, files=FILES)
    power = power or Power()
    tables = study_table(runs, reference=reference, base=base, power=power)
    pictures = {
        f"{found.condition}, {found.budget}": differences(found)
        for found in tables
        if len(found.rows) > 1
    }
    plots = curves([run for run in runs if run.budget == base])
    absent = {
        name
        for name, there in (
            ("study_curves", plots),
            ("study_search", search),
            ("study_made", facts),
        )
        if not there
    }
    html = render(
        "study.html.j2",
        title=title,
        sections={name: text for name, text in _HEADINGS.items() if name not in absent},
        note=note(power, reference),
        columns=COLUMNS,
        tables=[(found, [cells(row) for row in found.rows]) for found in tables],
        pictures=pictures,
        plots=plots,
        search=search,
        facts=dict(facts or {}),
    )
    page, text, table = (folder / name for name in FILES)
    with atomic(page) as a, atomic(text) as b, atomic(table) as c:
        a.write_text(html, encoding="utf-8", errors="backslashreplace")
        b.write_text(_markdown(title, tables, power, reference, facts or {}), encoding="utf-8")
        c.write_text(_csv(tables), encoding="utf-8")
    return page


def note(power: Power, reference: str) -> str:
    """What the columns mean."""
    return (
        f"Differences are paired with {reference}: same seeds, same test cases. Intervals are 95% "
        f"percentiles of {RESAMPLES} bootstrap draws of cases and seeds, with one seed of cases only. The "
        "worst subset is that of each seed. d is the mean difference over its standard deviation over seeds, "
        "and p is from a paired t-test over seeds, corrected by Holm for all methods of the table. Seeds "
        "needed: to find a "
        f"difference of {100 * power.effect:g} points with power {power.power:g} at level {power.level:g}. "
        "Gradients are those of the objective on a batch, where a product with second derivatives counts as "
        "two. Time is that of training, relative to the reference. Memory of a step is predicted. With fewer "
        f"than {ENOUGH_SEEDS} seeds intervals are too narrow, and no difference is marked."
    )


def cells(row: Row) -> list[str]:
    """The texts of a row, in the order of ``COLUMNS``."""
    against = row.against
    return [
        row.method,
        str(len(row.scores.seeds)),
        str(row.steps),
        str(row.evaluations),
        format_number(row.time, digits=2),
        format_number(row.memory / 2**20, digits=0),
        *(
            f"{format_number(each.mean, 100)} ({format_ends(each, 100)})"
            for each in (row.averages.mean, row.averages.worst)
        ),
        *(
            ["reference", "", "", "", ""]
            if against is None
            else [
                *(
                    f"{format_number(each.mean, 100, sign=True)} ({format_ends(each, 100, sign=True)})"
                    + "*" * (each.excludes_zero and against.seeds >= ENOUGH_SEEDS)
                    for each in (against.averages.mean, against.averages.worst)
                ),
                format_number(against.effect_size, digits=2, sign=True),
                format_number(against.corrected, digits=3),
                "–" if row.needed is None else str(row.needed),
            ]
        ),
    ]


def _markdown(
    title: str,
    tables: Sequence[Comparisons],
    power: Power,
    reference: str,
    facts: Mapping[str, str],
) -> str:
    lines = [f"# {title}", "", note(power, reference), ""]
    for found in tables:
        lines += [f"## {found.condition}, {found.budget}", ""]
        lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in found.rows]
        lines += ["", "\\* the 95% interval excludes 0.", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items() if "\n" not in value]
    return "\n".join(lines) + "\n"


def _csv(tables: Sequence[Comparisons]) -> str:
    """The numbers without rounding; shares are in [0, 1], memory is in bytes."""
    text = io.StringIO()
    writer = csv.writer(text)
    parts = ("mean", "worst", "mean_difference", "worst_difference")
    writer.writerow(
        [
            "condition", "budget", "method", "seeds", "steps", "gradients", "relative_time", "memory",
            *(f"{part}{end}" for part in parts for end in ("", "_low", "_high")),
            "deviation", "effect_size", "p", "p_holm", "seeds_needed",
        ]
    )  # fmt: skip
    for found in tables:
        for row in found.rows:
            against = row.against
            intervals = [row.averages.mean, row.averages.worst]
            if against is not None:
                intervals += [against.averages.mean, against.averages.worst]
            numbers = [n for each in intervals for n in (each.mean, each.low, each.high)]
            numbers += [math.nan] * (12 - len(numbers))
            more = (
                [math.nan] * 4
                if against is None
                else [against.deviation, against.effect_size, against.p, against.corrected]
            )
            writer.writerow(
                [
                    *map(escape_cell, (found.condition, found.budget, row.method)),
                    len(row.scores.seeds), row.steps, row.evaluations, row.time, row.memory,
                    *numbers, *more, "" if row.needed is None else row.needed,
                ]
            )  # fmt: skip
    return text.getvalue()
