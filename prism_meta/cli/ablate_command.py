"""``prism-meta ablate``: the runs of a study, and its report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from prism_meta.cli.output import add_result, bars, show
from prism_meta.cli.studies import scored_runs, search_rows, study_facts, table_facts
from prism_meta.cli.usage import path
from prism_meta.errors import PrismError, raise_faults
from prism_meta.report.study.page import COLUMNS, cells, note, write_study_report
from prism_meta.report.study.statistics import seeds_needed
from prism_meta.report.study.table import Power, study_table
from prism_meta.training.folder.facts import command_line
from prism_meta.training.stopping import duration
from prism_meta.training.study.jobs import Plan
from prism_meta.training.study.results import Results
from prism_meta.training.study.runner import run_study
from prism_meta.training.study.schema import PowerConfig, read_study

EXAMPLES = (
    "[bold]Examples[/bold]  prism-meta ablate study.toml --out results/study  ·  "
    "prism-meta ablate study.toml --out results/study --jobs 2 --time 8h  ·  "
    "prism-meta ablate study.toml --out results/study --list"
)
#: The standard deviation of a difference over seeds before any is known: that of Dice between runs in trials.
_USUAL_DEVIATION = 0.02


def run_ablate(
    file: Annotated[
        Path,
        typer.Argument(
            parser=path, metavar="STUDY", help="TOML file with methods, conditions and seeds."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", parser=path, help="Folder for results and report; a study goes on there."
        ),
    ] = Path("study"),
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1024,
            help="Runs at the same time, with one thread each. Defaults to one per GPU, otherwise per core.",
        ),
    ] = None,
    time: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Save unfinished runs and stop after this time, e.g. 8h. The same command goes on later.",
        ),
    ] = None,
    only_list: Annotated[
        bool,
        typer.Option("--list", help="Only say which runs are made and which are still to come."),
    ] = False,
    only_report: Annotated[
        bool, typer.Option("--report", help="Only write the report of the runs that are made.")
    ] = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the run folders with their weights, in OUT/work.")
    ] = False,
) -> None:
    """Compare methods over seeds and folds: train all runs of a study, and write its report.

    Methods are compared at equal numbers of gradients, and at equal training time. Each is searched over its
    own rates on validation patients first. Several calls, e.g. the tasks of a SLURM array, can share OUT.

    Which strategy? The table of docs/strategies.md says what such studies have found so far.
    """
    study = read_study(file)
    limit = None if time is None else duration(time)
    if only_list:
        _list(Plan(study, Results(out)))
        return
    _say_power(study.power)
    faults: tuple[str, ...] = ()
    if not only_report:
        with bars("runs") as advance:
            made = run_study(study, out, jobs=jobs, limit=limit, keep=keep, on_run=advance)
        faults = made.faults
        show(f"{made.made} runs made, {made.left} left")
        add_result(made=made.made, left=made.left)
    results = Results(out)
    runs = scored_runs(study, results)
    if not runs:
        raise_faults(PrismError, faults)
        raise PrismError(f"{out}: has no run with scores yet; let the study run longer")
    power = _power(study.power)
    base = "equal gradients"
    page = write_study_report(
        out,
        runs,
        title=f"{file.stem}: {len(study.methods)} methods, {study.seeds} seeds",
        reference=study.first.name,
        base=base,
        power=power,
        search=search_rows(study, results),
        facts=study_facts(study, results, command=shlex.join(command_line())),
    )
    tables = study_table(runs, reference=study.first.name, base=base, power=power)
    for found in tables:
        table = Table(title=f"{found.condition}, {found.budget}")
        shown = [0, 1, 4, 6, 7, 8, 9, 11]
        for column in shown:
            table.add_column(COLUMNS[column])
        for row in found.rows:
            texts = cells(row)
            table.add_row(*(texts[column] for column in shown))
        show(table)
    show(note(power, study.first.name), f"report in {page}")
    add_result(report=page, tables=[table_facts(found) for found in tables])
    raise_faults(PrismError, faults)


def _list(plan: Plan) -> None:
    known = plan.jobs()
    for job in known:
        state = "made" if job.key in plan.results else "to do"
        show(f"{state:<6}{job.title}")
    made = sum(job.key in plan.results for job in known)
    show(f"{made} of {len(known)} runs are made; more may follow from searches and times")
    add_result(
        runs=[{"run": job.title, "made": job.key in plan.results} for job in known], made=made
    )


def _power(config: PowerConfig) -> Power:
    return Power(config.effect, config.level, config.power)


def _say_power(config: PowerConfig) -> None:
    """What is to be expected before anything is known of the study's own spread."""
    needed = seeds_needed(_USUAL_DEVIATION, config.effect, level=config.level, power=config.power)
    show(
        f"{needed} seeds find a difference of {100 * config.effect:g} points with power {config.power:g} if "
        f"differences have a standard deviation of {100 * _USUAL_DEVIATION:g} points over seeds; the report "
        "says what the study's own spread asks for",
    )
