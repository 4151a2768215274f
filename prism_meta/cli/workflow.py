"""What the commands do, without a terminal: reports and label volumes from a run and cases."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prism_meta.data.cases import Case
from prism_meta.errors import CaseError, ConfigError, PrismError, raise_faults
from prism_meta.evaluation.saving import save_labels
from prism_meta.files import writable_folder
from prism_meta.modalities import subset_name, subsets
from prism_meta.records import Record, read_records
from prism_meta.report import Summary, summarize
from prism_meta.report.html import write_report
from prism_meta.report.overlays import OverlayCollector
from prism_meta.training.cases import load_configured
from prism_meta.training.config.schema import MetaConfig
from prism_meta.training.run import Run

#: Called during a long task with what is done, the total, and a note to show beside the bar.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Evaluation:
    """The result of ``evaluate_run``.

    Args:
        report: the HTML file.
        summary: its numbers.
        policy: what an empty mask gives.
    """

    report: Path
    summary: Summary
    policy: str


def evaluate_run(
    run: Run,
    progress: Progress,
    *,
    root: Path | None = None,
    out: Path | None = None,
    command: Sequence[str] = (),
) -> Evaluation:
    """Evaluate a run on the cases it held out, or on all cases of another folder.

    Raises:
        PrismError: there is no case to evaluate on, or no weights, or nothing can be written.
    """
    config = run.config
    out = writable_folder(out or run.evaluation)
    cases = _held_out(run) if root is None else load_configured(config, root)
    predictor = run.predictor()
    names = config.data.modalities
    every = subsets(len(names))
    total = sum(int((~(every & ~case.availability).any(1)).sum()) for case in cases)
    collector = OverlayCollector()
    done = 0

    def predicted(case: Case, volume: Any, subset: str, truth: Any, prediction: Any) -> None:
        nonlocal done
        done += 1
        collector(case, volume, subset, truth, prediction)
        progress(done, total, f"{case.id}  {subset}")

    records = predictor.evaluate(cases, on_prediction=predicted)
    summary = summarize(records)
    report = write_report(
        out,
        title=f"{run.folder.resolve().name}: {len(cases)} cases, every subset of modalities",
        records=records,
        modalities=names,
        class_names=predictor.labels.names,
        policy_statement=f"{predictor.empty.name}: {predictor.empty.statement}",
        overlays=collector.overlays(_shown_subsets(summary, names)),
        history=run.history(),
        facts=_facts(run, cases, command),
    )
    return Evaluation(report, summary, predictor.empty.statement)


def predict_folder(
    run: Run, root: Path, out: Path, progress: Progress, *, subset: Sequence[str] = ()
) -> list[Path]:
    """Write a label volume for each case of ``root``.

    A case that cannot be predicted does not stop the others; all faults are raised at the end.

    Args:
        run: a run whose training has ended.
        root: folder of cases.
        out: folder for the label volumes.
        progress: called after each case.
        subset: names of the modalities to use. Defaults to all that a case has.

    Returns:
        The written files.

    Raises:
        PrismError: bad modality names, cases that cannot be read, or no permission to write.
    """
    config = run.config
    unknown = [name for name in subset if name not in config.data.modalities]
    if unknown:
        raise ConfigError(
            f"subset: unknown modality {', '.join(unknown)}; use some of {', '.join(config.data.modalities)}"
        )
    writable_folder(out)
    # Labels are not needed, so a damaged label file must not stop a prediction.
    cases = [replace(case, label=None) for case in load_configured(config, root)]
    predictor = run.predictor()
    written: list[Path] = []
    faults: list[str] = []
    for number, case in enumerate(cases, start=1):
        absent = [name for name in subset if name not in case.files]
        wanted = [name in subset for name in case.modalities] if subset else None
        try:
            if absent:
                raise CaseError(
                    f"case {case.id}: has no {', '.join(absent)}; leave it out of the subset"
                )
            volume = predictor.predict(case, subset=wanted)
        except CaseError as error:
            faults.extend(error.faults)
            continue
        written.append(out / f"{case.id}.nii.gz")
        save_labels(written[-1], volume, case)
        progress(number, len(cases), case.id)
    raise_faults(CaseError, faults)
    return written


def load_records(path: Path) -> list[Record]:
    """Read the records of a run folder, an evaluation folder, or a CSV file."""
    for candidate in (path / "evaluation" / "records.csv", path / "records.csv"):
        if candidate.exists():
            return read_records(candidate)
    if path.is_dir():
        raise PrismError(f"{path}: no records.csv here; run prism-meta evaluate {path} first")
    return read_records(path)


def _held_out(run: Run) -> list[Case]:
    cases = [] if run.facts["data"] is None else load_configured(run.config, run.facts["data"])
    cases = [case for case in cases if case.id in run.facts["test"]]
    if not cases:
        raise PrismError(
            f"{run.folder}: held no case out; give a folder of cases to evaluate on, or train "
            "with data.holdout"
        )
    return cases


def _shown_subsets(summary: Summary, names: Sequence[str]) -> list[str]:
    """All modalities, the worst subset, then each single modality."""
    shown = [subset_name([True] * len(names), names), summary.worst, *names]
    return list(dict.fromkeys(shown))


def _facts(run: Run, cases: Sequence[Case], command: Sequence[str]) -> dict[str, str]:
    meta, own = run.config.meta, run.facts.get("own", {})
    missing = {
        name: sum(name not in files for files in run.facts["train"].values())
        for name in run.config.data.modalities
    }
    count = len(run.facts["train"])
    return {
        "training cases": f"{count}, missing "
        + ", ".join(f"{n} in {k}" for n, k in missing.items()),
        "test cases": ", ".join(case.id for case in cases),
        "strategy": own.get("strategy") or _strategy(meta),
        "masks": f"train {run.config.masks.train}, meta {run.config.masks.meta}",
        "steps": str(run.config.training.steps),
        "seed": str(run.config.seed),
        "versions": ", ".join(f"{n} {v}" for n, v in run.facts["versions"].items()),
        "trained with": shlex.join(run.facts["command"]),
        "evaluated with": shlex.join(command),
        "config": run.config.to_toml(),
    }


def _strategy(meta: MetaConfig) -> str:
    facts = [meta.strategy]
    if meta.kind.adapts:
        facts.append(f"inner lr {meta.inner_lr:g} x {meta.inner_steps}")
    if not meta.prescribes_outer:
        facts.append(f"alpha {meta.alpha:g}")
    return ", ".join(facts)
