"""The page of several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from prism_meta.errors import OutputError
from prism_meta.files import atomic
from prism_meta.report.figures.scores import runs_by_count
from prism_meta.report.findings import CHANGE, UNITS, Unit
from prism_meta.report.page import render
from prism_meta.report.several import SideBySide
from prism_meta.report.text import shown_modalities, undefined_note

#: Key of the configuration -> its values, one per run.
Settings: TypeAlias = Mapping[str, Sequence[str]]

#: Headings of the page's sections, in order.
SECTIONS = {
    "runs_averages": "Averages over all subsets and regions",
    "runs_count": "Dice by number of shown modalities",
    "runs_dice": "Dice of each subset and region",
    "runs_hd95": "HD95 of each subset and region",
    "runs_dice_change": "Paired differences of Dice",
    "runs_hd95_change": "Paired differences of HD95",
    "runs_settings": "Settings that differ",
    "runs_repeat": "How to repeat this page",
}


def write_runs_page(
    path: Path | str, runs: SideBySide, *, settings: Settings | None = None, command: str = ""
) -> Path:
    """Write a page with the averages of all runs side by side and the differences to the first.

    Args:
        path: the HTML file; an existing file is replaced.
        runs: made by ``side_by_side``.
        settings: the settings that differ between the runs.
        command: the command that repeats the page.

    Returns:
        ``path``.

    Raises:
        OutputError: the file cannot be written. An existing file is then kept.

    Example:
        >>> import tempfile
        >>> from prism_meta.records import Record
        >>> from prism_meta.report.several import side_by_side
        >>> run = [Record(f"p{i}", "t1", "WT", 0.5, 4.0) for i in (1, 2)]
        >>> file = Path(tempfile.mkdtemp()) / "runs.html"
        >>> "Paired differences" in write_runs_page(file, side_by_side({"a": run, "b": run})).read_text()
        True
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(
            f"cannot write {path}: is a directory; give a file, e.g. {path / 'runs.html'}"
        )
    first = runs.summaries[runs.first]
    shown = shown_modalities(first, runs.modalities)
    absent = {
        name for name, there in (("runs_settings", settings), ("runs_repeat", command)) if not there
    }
    html = render(
        "runs.html.j2",
        title=f"{len(runs.summaries)} runs side by side",
        sections={name: heading for name, heading in SECTIONS.items() if name not in absent},
        runs=runs,
        modalities=runs.modalities,
        first=first,
        rows=[(subset, shown[subset]) for subset in first.subsets],
        units={name: UNITS[name] for name in ("dice", "hd95_mm")},
        changes={"dice": CHANGE, "hd95": Unit("HD95, mm", sign=True)},
        intervals=_note(runs),
        undefined={name: undefined_note(found).strip() for name, found in runs.summaries.items()},
        by_count=runs_by_count(runs.summaries, shown),
        settings=settings or {},
        command=command,
    )
    with atomic(path) as partial:
        partial.write_text(html, encoding="utf-8", errors="backslashreplace")
    return path


def _note(runs: SideBySide) -> str:
    one, change = runs.summaries[runs.first], next(iter(runs.changes.values()))
    return (
        f"95% percentile bootstrap over {len(runs.cases)} cases, seed {one.seed}: {one.resamples} "
        f"resamples for averages, {change.resamples} for differences."
    )
