"""The tables of ``prism-meta cases``; they fit 80 columns with four modalities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from prism_meta.errors import one_line
from prism_meta.report.figures.style import HIDDEN, SHOWN
from prism_meta.training.survey.result import CaseSurvey, Spread, Survey

#: What could not be read, or was not.
_NONE = "–"
#: Names of array axes in the column of slices.
_AXES = ("1st", "2nd", "3rd")


def survey_tables(survey: Survey, *, title: str) -> Iterator[Group]:
    """The tables of a survey: its cases, then modalities, subsets, grid, labels and sites of all of them.

    Args:
        survey: what was found.
        title: of the first table, e.g. the folder.

    Example:
        >>> case = CaseSurvey("p1", patient="p1", site=None, modalities=("t1",), label=True)
        >>> found = Survey("BIDS", modalities=("t1", "t2"), cases=(case,))
        >>> for group in survey_tables(found, title="data"):
        ...     print(group.renderables[0])
        data: BIDS, 1 case of 1 patient
        Modalities
        Subsets of modalities
    """
    if not survey.cases:
        return
    yield _cases(survey, title)
    yield _modalities(survey)
    yield _subsets(survey)
    if survey.axes():
        yield _grid(survey)
    if survey.volumes:
        yield _volumes(survey)
    if set(survey.sites) != {None}:
        yield _sites(survey)


def _cases(survey: Survey, title: str) -> Group:
    count, patients = len(survey.cases), survey.patients
    said = f"{title}: {survey.layout}, {_count(count, 'case')} of {_count(patients, 'patient')}"
    caption = "slices: the axis that they are stacked along; label: ml of all classes"
    if not all(case.usable for case in survey.cases):
        caption += "; ✗: has a fault"
    table = _table()
    table.add_column("case", overflow="fold")
    for name in survey.modalities:
        table.add_column(_plain(name), justify="center", no_wrap=True)
    table.add_column("voxels", no_wrap=True)
    table.add_column("mm", overflow="fold")
    table.add_column("slices", no_wrap=True)
    table.add_column("label", justify="right", no_wrap=True)
    for case in survey.cases:
        table.add_row(
            Text(one_line(case.id if case.usable else f"✗ {case.id}")),
            *_shown(case.modalities, survey.modalities),
            _NONE if case.shape is None else "×".join(map(str, case.shape)),
            _NONE if case.spacing is None else "×".join(_number(s) for s in case.spacing),
            _NONE if case.slice_axis is None else _AXES[case.slice_axis],
            _label(case, survey),
            style=None if case.usable else "bold red",
        )
    return _section(said, table, caption)


def _modalities(survey: Survey) -> Group:
    table = _table()
    table.add_column("modality", overflow="fold")
    table.add_column("cases", justify="right")
    table.add_column("missing", justify="right")
    measured = bool(survey.intensities)
    for head in ("smallest voxel", "largest voxel") if measured else ():
        table.add_column(head, justify="right")
    for name, count in survey.counts.items():
        ends = survey.intensities.get(name)
        table.add_row(
            Text(name),
            str(count),
            f"{100 * survey.missing_rates[name]:.0f} %",
            *(map(_range, ends) if ends else (_NONE, _NONE) if measured else ()),
        )
    caption = "of voxels: the median over cases (smallest to largest)" if measured else ""
    return _section("Modalities", table, caption)


def _subsets(survey: Survey) -> Group:
    table = _table()
    for name in survey.modalities:
        table.add_column(_plain(name), justify="center", no_wrap=True)
    table.add_column("cases", justify="right")
    for subset, count in survey.subsets.items():
        table.add_row(*_shown(subset, survey.modalities), str(count))
    never = ", ".join("+".join(names) for names in survey.never_together)
    return _section("Subsets of modalities", table, f"never in one case: {never}" if never else "")


def _grid(survey: Survey) -> Group:
    table = _table()
    table.add_column("axis")
    for head in ("voxels", "mm"):
        table.add_column(head, justify="right")
    for axis, (voxels, size) in zip(_AXES, survey.axes(), strict=True):
        table.add_row(axis, _range(voxels), _range(size))
    return _section("Grid of the files", table)


def _volumes(survey: Survey) -> Group:
    table = _table()
    table.add_column("class or region", overflow="fold")
    table.add_column("cases with it", justify="right")
    for head in ("smallest", "median", "largest"):
        table.add_column(head, justify="right")
    for name, spread in survey.volumes.items():
        count = sum(case.volumes.get(name, 0) > 0 for case in survey.cases)
        table.add_row(
            Text(name), str(count), *(f"{x:.1f}" for x in (spread.min, spread.median, spread.max))
        )
    return _section("Labels", table, "ml, over the cases whose label was read")


def _sites(survey: Survey) -> Group:
    table = _table()
    table.add_column("site", overflow="fold")
    table.add_column("cases", justify="right")
    for site, count in survey.sites.items():
        table.add_row(Text("unknown" if site is None else one_line(site)), str(count))
    return _section("Sites", table)


def _table() -> Table:
    return Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)


def _section(title: str, table: Table, caption: str = "") -> Group:
    """A table with lines above and below, which may be longer than the table is wide."""
    below = [Text(caption, style="dim")] if caption else []
    return Group(Text(one_line(title), style="bold"), table, *below, Text())


def _plain(name: str) -> Text:
    """A name of the user, which may have brackets that rich would take for markup."""
    return Text(name)


def _shown(subset: Sequence[str], modalities: Sequence[str]) -> list[str]:
    return [SHOWN if name in subset else HIDDEN for name in modalities]


def _label(case: CaseSurvey, survey: Survey) -> str:
    if case.classes:
        return f"{sum(case.classes.values()):.1f}"
    if not case.label:
        return "none"
    return _NONE if survey.voxels else "yes"


def _range(spread: Spread) -> str:
    """One number if all are alike, otherwise the median and both ends."""
    low, median, high = map(_number, (spread.min, spread.median, spread.max))
    return low if low == high else f"{median} ({low} to {high})"


def _number(value: float) -> str:
    """Three digits, or the whole number where it has more; an exponent only for huge ones."""
    return f"{value:.0f}" if 100 <= abs(value) < 1e7 else f"{value:.3g}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
