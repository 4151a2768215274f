"""What ``evaluate`` does, without a terminal: every subset of every case is measured, then reported."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from prism_meta.cli.adapting import adapt_again, adaptation_facts
from prism_meta.cli.unfinished import UNFINISHED, Measured, Unfinished, fingerprint
from prism_meta.cli.workflow import Progress, refuse_case_folder
from prism_meta.data.cases import Case, Volume
from prism_meta.data.checks import no_label
from prism_meta.errors import CaseError, PrismError, raise_faults
from prism_meta.evaluation.cleaned import CleanedRecords
from prism_meta.evaluation.subsets import in_order
from prism_meta.files import kept_if_used, writable_folder
from prism_meta.modalities import subset_name, subsets
from prism_meta.records import Record
from prism_meta.report import Summary, summarize, summarize_policies
from prism_meta.report.averages import empty_count
from prism_meta.report.cleaned import CLEANED_RECORDS, Cleaned
from prism_meta.report.html import REPORT_FILES, write_report
from prism_meta.report.overlays import OverlayCollector
from prism_meta.report.worst import WorstCases
from prism_meta.training.adaptation.result import adaptation_of
from prism_meta.training.config.meta import MetaConfig
from prism_meta.training.folder.weights import Kind
from prism_meta.training.prediction.ensembles import CleanupChoice, cleanup_of, ensemble_predictor
from prism_meta.training.run import Run
from prism_meta.training.setup.cases import find_configured

if TYPE_CHECKING:
    from torch import Tensor

    from prism_meta.evaluation.predictor import Predictor

#: Kinds of weights as the report names them.
_WEIGHTS: Mapping[Kind, str] = MappingProxyType(
    {
        "best": "the best on the validation cases",
        "ema": "the moving average",
        "last": "those after the last step",
    }
)


@dataclass(frozen=True)
class Evaluation:
    """The result of ``evaluate_run``.

    Args:
        report: the HTML file.
        summary: its numbers.
        policy: what an empty mask gives.
        by_policy: the summary under each policy for empty masks.
        empty: number of records with an empty prediction or truth.
        faults: what was wrong with the cases that were left out.
        cleanup: what was removed from labels; empty if nothing is.
        cleaned: the summary after the clean-up; None without one.
    """

    report: Path
    summary: Summary
    policy: str
    by_policy: dict[str, Summary]
    empty: int
    faults: tuple[str, ...] = ()
    cleanup: str = ""
    cleaned: Summary | None = None


def evaluate_run(
    run: Run,
    progress: Progress,
    *,
    root: Path | None = None,
    out: Path | None = None,
    weights: Kind | None = None,
    flips: bool = False,
    cleanup: CleanupChoice = "run",
    command: Sequence[str] = (),
    tell: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Evaluate a run on the cases it held out, or on all cases of another folder.

    A case with a fault is left out, and the report says so. If the call is interrupted, the next call with
    the same arguments skips the cases that were measured, and ends with the same report.

    Args:
        run: a run whose training has ended.
        progress: called after each prediction.
        root: folder of cases. Defaults to the held-out cases of the run.
        out: folder of the report. Defaults to that of the run.
        weights: those of ``Run.load_model``.
        flips: see ``Ensemble``.
        cleanup: see ``cleanup_of``. The report has the numbers without it, too.
        command: the command line, which the report shows.
        tell: called with a line for the user, if cases were measured before.

    Raises:
        PrismError: there is no case to evaluate on (the faults of all cases together), the files of
            the run cannot be used, or nothing can be written.
    """
    # All files of the run are read first: a fault in one of them must not cost the predictions.
    history, facts = run.history(), _facts(run, weights or run.kinds[0])
    options = [*([] if weights is None else ["--weights", weights]), *["--flips"] * flips]
    options += [] if cleanup == "run" else ["--clean-up", cleanup]
    commands = _commands(run, command, cases=root, options=options)
    cases, faults = (
        _held_out(run) if root is None else find_configured(run.config, root, label=True)
    )
    faults += [no_label(case) for case in cases if not case.label]
    cases = [case for case in cases if case.label]
    if not cases:
        raise_faults(CaseError, faults)
    out = out or run.evaluation
    refuse_case_folder(out, root or Path(str(run.facts["data"])), cases)
    predictor = ensemble_predictor(
        [run], weights=weights, flips=flips, cleanup=cleanup_of([run], cleanup)
    )
    names = run.config.data.modalities
    collector, worst = OverlayCollector(), WorstCases()
    with kept_if_used(out):
        writable_folder(out, files=(*REPORT_FILES, CLEANED_RECORDS, UNFINISHED))
        unfinished = Unfinished(out, fingerprint(run, predictor, flips=flips))
        records, cleaned, more = _measure(
            predictor, cases, collector, worst, unfinished, progress, tell
        )
        faults += more
        if not records:
            raise_faults(CaseError, faults)
        order = [subset_name(row, names) for row in subsets(len(names)).tolist()]
        records = in_order(records, order)
        after = Cleaned(str(predictor.cleanup), in_order(cleaned, order))
        measured = list(dict.fromkeys(record.case for record in records))
        summary = summarize(records)
        report = write_report(
            out,
            title=f"{run.folder.resolve().name}: {len(measured)} cases, every subset of modalities",
            records=records,
            modalities=names,
            class_names=predictor.labels.names,
            policy_statement=f"{predictor.empty.name}: {predictor.empty.statement}",
            overlays=collector.overlays(_shown_subsets(summary, names)),
            worst=worst.found(),
            history=history,
            trained_on={
                "training": run.facts["train"],
                "validation": run.facts.get("validation", {}),
            },
            facts={"test cases": ", ".join(measured), "clean-up": after.rules or "none", **facts},
            commands=commands,
            faults=CaseError(faults).faults,
            cleaned=after if predictor.cleanup.is_on else None,
        )
        unfinished.remove()
    return Evaluation(
        report,
        summary,
        predictor.empty.statement,
        summarize_policies(records),
        empty_count(records),
        CaseError(faults).faults,
        after.rules,
        summarize(after.records) if predictor.cleanup.is_on else None,
    )


def _measure(
    predictor: Predictor,
    cases: Sequence[Case],
    collector: OverlayCollector,
    worst: WorstCases,
    unfinished: Unfinished,
    progress: Progress,
    tell: Callable[[str], None],
) -> tuple[list[Record], list[Record], list[str]]:
    """The records of the cases that can be measured, without and with the clean-up; the others' faults."""
    records: list[Record] = []
    cleaned: list[Record] = []
    faults: list[str] = []
    again = CleanedRecords(predictor)
    done = 0

    def predicted(case: Case, volume: Volume, subset: str, truth: Tensor, classes: Tensor) -> None:
        nonlocal done
        done += 1
        collector(case, volume, subset, truth, classes)
        again(case, volume, subset, truth, classes)
        worst(case, volume, subset, truth, classes)
        progress(done, total, f"{case.id}  {subset}")

    total = sum(_subsets_of(case) for case in cases)
    before = {case.id: unfinished.get(case) for case in cases}
    count = sum(found is not None for found in before.values())
    if count:
        tell(
            f"{count} of {len(cases)} cases were measured before; delete {unfinished.path} to repeat"
        )
    for number, case in enumerate(cases, start=1):
        found = before[case.id]
        # Pictures show the first few cases and the worst. A case that was not among them then may be now.
        if (
            found is not None
            and (found.overlay is not None or collector.full)
            and (found.planes is not None or not worst.wants(found.records))
        ):
            records += found.records
            cleaned += found.cleaned
            worst.add(found.records, found.planes)
            if found.overlay is not None:
                collector.add(found.overlay)
            note = "measured before"
        else:
            try:
                measured = predictor.evaluate_case(case, on_prediction=predicted)
                planes, after = worst.add(measured), again.records(measured)
                unfinished.add(case, Measured(measured, collector.get(case.id), after, planes))
                records += measured
                cleaned += after
                continue
            except CaseError as error:
                collector.discard(case.id)
                faults += error.faults
                note = "left out"
        done = sum(_subsets_of(case) for case in cases[:number])
        progress(done, total, f"{case.id}  {note}")
    return records, cleaned, faults


def _subsets_of(case: Case) -> int:
    """The number of subsets that a case can show."""
    return (1 << len(case.files)) - 1


def _held_out(run: Run) -> tuple[list[Case], list[str]]:
    """The cases that a run held out, and the faults of those among them that have one."""
    data, test = run.facts["data"], run.facts["test"]
    if data is None or not test:
        raise PrismError(
            f"{run.folder}: held no case out; give a folder of cases to evaluate on, or train "
            "with data.holdout"
        )
    found, faults = find_configured(run.config, data, label=True)
    cases = [case for case in found if case.id in test]
    # Faults of other cases do not matter here.
    mine = {name: [f for f in faults if f.startswith(f"case {name}:")] for name in test}
    lost = set(test) - {case.id for case in cases} - {name for name in test if mine[name]}
    gone = [
        f"case {name}: was held out, but is not in {data}; restore it, or give a folder of cases"
        for name in sorted(lost)
    ]
    if gone:  # a folder that cannot be read may be the reason
        gone = [f for f in faults if not f.startswith("case ")] or gone
    return cases, [*(fault for name in test for fault in mine[name]), *gone]


def _shown_subsets(summary: Summary, names: Sequence[str]) -> list[str]:
    """All modalities, the worst subset, then each single modality."""
    shown = [subset_name([True] * len(names), names), summary.worst, *names]
    return list(dict.fromkeys(shown))


def _facts(run: Run, weights: Kind) -> dict[str, str]:
    meta, own = run.config.meta, run.facts.get("own", {})
    missing = {
        name: sum(name not in files for files in run.facts["train"].values())
        for name in run.config.data.modalities
    }
    count, adaptation = len(run.facts["train"]), adaptation_of(run)
    return {
        "training cases": f"{count}, missing "
        + ", ".join(f"{n} in {k}" for n, k in missing.items()),
        "strategy": own.get("strategy") or _strategy(meta),
        "masks": f"train {run.config.masks.train}, meta {run.config.masks.meta}",
        **({} if adaptation is None else adaptation_facts(adaptation)),
        "steps": str(run.config.training.steps),
        "weights": _WEIGHTS[weights],
        "seed": str(run.config.seed),
        "versions": ", ".join(f"{n} {v}" for n, v in run.facts["versions"].items()),
        "config": run.config.to_toml(),
    }


def _commands(
    run: Run, command: Sequence[str], *, cases: Path | None, options: Sequence[str]
) -> dict[str, str]:
    """The commands that made the numbers, and others that give the same from the run's own configuration."""
    found = {"Trained with": shlex.join(run.facts["command"])}
    if command:
        found["Evaluated with"] = shlex.join(command)
    data = run.facts["data"]
    if data is not None and not run.facts.get("own"):
        config, adaptation = str(run.folder / "config.toml"), adaptation_of(run)
        again = "repeated"  # the folder of the new run
        test = [] if cases is None else [str(cases)]
        train = ["prism-meta", "train", data, "--config", config, "--out", again]
        if adaptation is not None:
            train = adapt_again(run, adaptation, again)
        found["With the same settings, from the configuration in the run folder"] = "\n".join(
            map(shlex.join, (train, ["prism-meta", "evaluate", again, *test, *options]))
        )
    return found


def _strategy(meta: MetaConfig) -> str:
    facts = [meta.strategy]
    if meta.kind.adapts:
        facts.append(f"inner lr {meta.inner_lr:g} x {meta.inner_steps}")
    if not meta.prescribes_outer:
        facts.append(f"alpha {meta.alpha:g}")
    return ", ".join(facts)
