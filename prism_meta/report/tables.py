"""Tables for the terminal: the results of one evaluation, and a comparison of two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from prism_meta.report.averages import Summary
from prism_meta.report.comparison import Change, Comparison
from prism_meta.report.figures.style import HIDDEN, SHOWN
from prism_meta.report.findings import bootstrap_note, findings
from prism_meta.report.text import (
    format_dice,
    format_ends,
    format_interval,
    format_mm,
    shown_modalities,
    subset_scores,
    undefined_note,
)

if TYPE_CHECKING:
    from rich.table import Table


def results_table(
    summary: Summary,
    *,
    title: str,
    policy: str,
    modalities: Sequence[str],
    faults: Sequence[str] = (),
) -> Table:
    """Build the table of one evaluation: a row per subset, then the averages. The worst is marked.

    Args:
        summary: averages of the records.
        title: title of the table.
        policy: the scores of empty masks, ``EmptyPolicy.statement``; part of the caption.
        modalities: names of all M modalities, in order. Each gets a column of ● (shown) and ○ (hidden).
        faults: one line per fault of the cases that were left out; part of the caption.

    Raises:
        PrismError: a subset names a modality that is not in ``modalities``.

    Example:
        >>> from prism_meta.records import Record
        >>> from prism_meta.report import summarize
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

    shown = shown_modalities(summary, modalities)
    worst = summary.by_subset[summary.worst]
    caption = (
        f"Dice in %, HD95 in mm, mean over {summary.overall.cases} cases. "
        f"Empty masks: {policy}.{undefined_note(summary)}\n"
        f"Worst subset: {summary.worst}, mean Dice {format_dice(worst.dice)} %."
    )
    if faults:
        caption += "\n".join(["\nCases that were left out:", *faults])
    # Without padding and with short headers, four modalities and three regions fit 80 columns.
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
        dice, hd95 = subset_scores(summary, subset)
        note = {summary.worst: "◀ worst", summary.full: "all shown"}.get(subset, "")
        table.add_row(
            *(SHOWN if flag else HIDDEN for flag in shown[subset]),
            *map(format_dice, dice),
            *map(format_mm, hd95),
            note,
            style="bold red" if subset == summary.worst else None,
            end_section=subset == summary.subsets[-1],
        )
    averages = [*(summary.by_region[name] for name in summary.regions), summary.overall]
    table.add_row(
        *("" for _ in modalities),
        *(format_dice(cell.dice) for cell in averages),
        *(format_mm(cell.hd95) for cell in averages),
        f"mean of {len(summary.subsets)}",
        style="bold",
    )
    return table


def findings_table(summary: Summary) -> Table:
    """Build the table of the averages with their intervals, the balance, and the contributions.

    Args:
        summary: averages of the records.

    Example:
        >>> from prism_meta.records import Record
        >>> from prism_meta.report import summarize
        >>> table = findings_table(summarize([Record("case1", "t1", "WT", 0.5, 4.0)]))
        >>> list(table.columns[1].cells)
        ['50.0', '4.0', '0.0', '0.0', '50.0', '50.0']
    """
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text("Averages over all subsets and regions", style="bold"),
        caption=Text(f"Intervals: {bootstrap_note(summary)}"),
        caption_justify="left",
        box=SIMPLE,
    )
    table.add_column("")
    table.add_column("mean", justify="right", no_wrap=True)
    table.add_column("95% interval", justify="right", no_wrap=True)
    for section in findings(summary):
        for finding in section:
            last = finding is section[-1]
            table.add_row(escape(finding.title), finding.mean, finding.ends, end_section=last)
    return table


def policies_table(by_policy: Mapping[str, Summary], *, empty: int) -> Table:
    """Build the table of the same predictions under each policy for empty masks.

    Args:
        by_policy: made by ``summarize_policies``.
        empty: number of records with an empty prediction or truth; part of the caption.

    Example:
        >>> from prism_meta.records import Record
        >>> from prism_meta.report import summarize_policies
        >>> missed = Record("p1", "t1", "ET", 0.0, 373.13, 0.0, 0.0, 2.5, 1, 1, 0, 300.0)
        >>> table = policies_table(summarize_policies([missed]), empty=1)
        >>> [list(column.cells) for column in table.columns[:4:3]]
        [['brats', 'nan', 'diagonal'], ['373.1', '–', '300.0']]
    """
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text("The same predictions under each policy for empty masks", style="bold"),
        caption=Text(
            f"Means over all subsets and regions. {empty} records have an empty prediction or truth."
        ),
        caption_justify="left",
        box=SIMPLE,
    )
    table.add_column("policy")
    for head in ("Dice, %", "95% interval", "HD95, mm", "95% interval", "undefined"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, summary in by_policy.items():
        cell = summary.overall
        table.add_row(
            name,
            format_dice(cell.dice),
            format_ends(cell.scores["dice"], 100.0),
            format_mm(cell.hd95),
            format_ends(cell.scores["hd95_mm"]),
            str(cell.undefined),
        )
    return table


def comparison_table(comparison: Comparison, *, names: tuple[str, str] = ("a", "b")) -> Table:
    """Build the table of paired differences with 95% intervals. Bold intervals exclude 0.

    Args:
        comparison: made by ``compare(a, b)``; its differences are b - a.
        names: of runs a and b.

    Example:
        >>> from prism_meta.records import Record
        >>> from prism_meta.report import compare
        >>> run = [Record(f"case{i}", "t1", "WT", 0.5, 4.0) for i in range(3)]
        >>> comparison_table(compare(run, run), names=("first", "second")).row_count
        3
    """
    from rich.table import Table
    from rich.text import Text

    caption = (
        f"Paired over {comparison.cases} cases; 95% percentile bootstrap over cases, "
        f"{comparison.resamples} resamples, seed {comparison.seed}. Higher Dice and lower "
        "HD95 are better. The intervals are not corrected for multiple comparisons."
    )
    if comparison.undefined:
        caption += f" {comparison.undefined} pairs with undefined values are left out."
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
            cells += [Text(text, style=style) for text in format_interval(interval, scale)]
        table.add_row(*cells, end_section=last)

    add("all", comparison.overall, True)
    for group in (comparison.by_region, comparison.by_subset):
        for i, (name, change) in enumerate(group.items(), 1):
            add(name, change, i == len(group))
    return table
