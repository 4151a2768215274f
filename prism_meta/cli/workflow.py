"""What the commands do, without a terminal: reports and label volumes from a run and cases."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from prism_meta.data.cases import Case, Volume
from prism_meta.data.checks import no_label
from prism_meta.errors import CaseError, ConfigError, OutputError, PrismError, raise_faults
from prism_meta.evaluation.predictions import PredictionTable
from prism_meta.evaluation.saving import region_volumes, save_labels
from prism_meta.evaluation.subsets import in_order
from prism_meta.files import atomic, kept_if_used, writable_folder
from prism_meta.modalities import composed, subset_name, subsets
from prism_meta.records import Record, read_records
from prism_meta.report import Summary, summarize
from prism_meta.report.html import REPORT_FILES, write_report
from prism_meta.report.overlays import OverlayCollector
from prism_meta.training.cases import find_configured
from prism_meta.training.config.schema import MetaConfig
from prism_meta.training.expected import Expected
from prism_meta.training.run import Run
from prism_meta.training.weights import Kind

if TYPE_CHECKING:
    from torch import Tensor

    from prism_meta.evaluation.predictor import Predictor

#: Called during a long task with what is done, the total, and a note to show beside the bar.
Progress = Callable[[int, int, str], None]


#: Columns of a table of predictions that validation gives: the Dice of its cases from the same subset, the
#: missing modality that raised it most, and by how much.
_EXPECTED = ("expected_dice", "would_help", "gain")
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
        faults: what was wrong with the cases that were left out.
    """

    report: Path
    summary: Summary
    policy: str
    faults: tuple[str, ...] = ()


def evaluate_run(
    run: Run,
    progress: Progress,
    *,
    root: Path | None = None,
    out: Path | None = None,
    weights: Kind | None = None,
    command: Sequence[str] = (),
) -> Evaluation:
    """Evaluate a run on the cases it held out, or on all cases of another folder.

    A case with a fault is left out, and the report says so. ``weights`` are those of ``Run.load_model``.

    Raises:
        PrismError: there is no case to evaluate on (the faults of all cases together), the files of
            the run cannot be used, or nothing can be written.
    """
    # All files of the run are read first: a fault in one of them must not cost the predictions.
    history, facts = run.history(), _facts(run, weights or run.kinds[0], command)
    cases, faults = (
        _held_out(run) if root is None else find_configured(run.config, root, label=True)
    )
    faults += [no_label(case) for case in cases if not case.label]
    cases = [case for case in cases if case.label]
    if not cases:
        raise_faults(CaseError, faults)
    out = out or run.evaluation
    _refuse_case_folder(out, root or Path(str(run.facts["data"])), cases)
    predictor = run.predictor(weights=weights)
    names = run.config.data.modalities
    collector = OverlayCollector()
    with kept_if_used(out):
        writable_folder(out, files=REPORT_FILES)
        records, more = _measure(predictor, cases, collector, progress)
        faults += more
        if not records:
            raise_faults(CaseError, faults)
        records = in_order(
            records, [subset_name(row, names) for row in subsets(len(names)).tolist()]
        )
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
            history=history,
            facts={"test cases": ", ".join(measured), **facts},
            faults=CaseError(faults).faults,
        )
    return Evaluation(report, summary, predictor.empty.statement, CaseError(faults).faults)


def predict_folder(
    run: Run,
    root: Path,
    out: Path,
    progress: Progress,
    *,
    subset: Sequence[str] = (),
    grid: str | None = None,
    weights: Kind | None = None,
) -> list[Path]:
    """Write a label volume for each case of ``root``, and ``predictions.csv`` with their volumes.

    A case that cannot be predicted does not stop the others; all faults are raised at the end.

    Args:
        run: a run whose training has ended.
        root: folder of cases.
        out: folder for the label volumes.
        progress: called after each case.
        subset: names of the modalities to use. Defaults to all that a case has.
        grid: modality on whose grid the labels are written; all files are resampled onto it. Defaults to
            the grid of the case.
        weights: see ``Run.load_model``.

    Returns:
        The written label volumes.

    Raises:
        PrismError: bad modality names, cases that cannot be read, or no permission to write.
    """
    modalities = run.config.data.modalities
    known = {composed(name): name for name in modalities}
    subset = [known.get(composed(name), name) for name in subset]
    unknown = [name for name in subset if name not in modalities]
    twice = sorted({name for name in subset if subset.count(name) > 1} - set(unknown))
    faults = [
        f"subset: unknown modality {name}; use some of {', '.join(modalities)}"
        for name in dict.fromkeys(unknown)
    ]
    faults += [f"subset: {name} occurs twice; give each name once" for name in twice]
    wanted = None if grid is None else known.get(composed(grid))
    if grid is not None and wanted is None:
        faults.append(f"grid: unknown modality {grid}; use one of {', '.join(modalities)}")
    raise_faults(ConfigError, faults)
    # Labels are not needed, so a damaged label file must not stop a prediction.
    config = run.config
    if wanted is not None:
        aligned = config.data.model_copy(update={"align": "resample"})
        config = config.model_copy(update={"data": aligned})
    found, faults = find_configured(config, root, label=False)
    _refuse_case_folder(out, root, found)
    predictor = run.predictor(weights=weights)
    labels = predictor.labels
    expected = Expected.of_run(run, weights)
    table = PredictionTable(out, list(labels.regions), _EXPECTED if expected else ())
    written: list[Path] = []
    with kept_if_used(out):
        writable_folder(out)
        cases, refused = _writable(table, found, subset)
        faults += refused
        if wanted is not None:
            faults += [
                f"case {case.id}: has no {wanted}, on whose grid its labels should lie; leave --grid out"
                for case in cases
                if wanted not in case.files
            ]
            cases = [
                replace(case, grid=case.files[wanted]) for case in cases if wanted in case.files
            ]
        for number, case in enumerate(cases, start=1):
            chosen = [name in (subset or case.files) for name in modalities]
            try:
                volume = predictor.predict(case, subset=chosen)
                volumes = region_volumes(volume, case, labels)
                # The table first: it marks the folder as an output before that holds a label volume.
                with atomic(table.label_file(case.id)) as partial:
                    save_labels(partial, volume, case)
                    table.add(
                        case.id,
                        subset=subset_name(chosen, modalities),
                        volumes=volumes,
                        more=_expected_cells(expected, chosen),
                    )
                written.append(table.label_file(case.id))
            except CaseError as error:
                faults += error.faults
            except OutputError as error:  # the next file would not fit, either
                raise PrismError([*faults, *error.faults]) from error
            progress(number, len(cases), case.id)
        if not written:
            raise_faults(CaseError, faults)
    raise_faults(CaseError, faults)
    return written


def _expected_cells(expected: Expected | None, shown: Sequence[bool]) -> list[str]:
    if expected is None:
        return []
    dice, addition = expected.of(shown), expected.best_addition(shown)
    name, gain = ("", "") if addition is None else (addition[0], f"{addition[1]:.3f}")
    return ["" if dice is None else f"{dice:.3f}", name, gain]


def load_records(path: Path) -> list[Record]:
    """Read the records of a run folder, an evaluation folder, or a CSV file."""
    for candidate in (path / "evaluation" / "records.csv", path / "records.csv"):
        if candidate.exists():
            return read_records(candidate)
    if path.is_dir():
        raise PrismError(f"{path}: no records.csv here; run prism-meta evaluate {path} first")
    return read_records(path)


def _writable(
    table: PredictionTable, found: Sequence[Case], subset: Sequence[str]
) -> tuple[list[Case], list[str]]:
    """The cases that have a subset and whose labels can be written, and the faults of the others."""
    cases, faults = [], []
    for case in found:
        lacks = [name for name in subset if name not in case.files]
        own = [f"case {case.id}: has no {', '.join(lacks)}; leave it out of the subset"] * bool(
            lacks
        )
        own += table.faults(case)
        faults += own
        cases += [] if own else [case]
    return cases, faults


def _measure(
    predictor: Predictor, cases: Sequence[Case], collector: OverlayCollector, progress: Progress
) -> tuple[list[Record], list[str]]:
    """The records of the cases that can be measured, case by case, and the faults of the others."""
    records: list[Record] = []
    faults: list[str] = []
    done = 0

    def predicted(case: Case, volume: Volume, subset: str, truth: Tensor, classes: Tensor) -> None:
        nonlocal done
        done += 1
        collector(case, volume, subset, truth, classes)
        progress(done, total, f"{case.id}  {subset}")

    total = sum(_subsets_of(case) for case in cases)
    for number, case in enumerate(cases, start=1):
        try:
            records += predictor.evaluate_case(case, on_prediction=predicted)
        except CaseError as error:
            faults += error.faults
            done = sum(_subsets_of(case) for case in cases[:number])
            progress(done, total, f"{case.id}  left out")
    return records, faults


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


def _refuse_case_folder(out: Path, root: Path, cases: Sequence[Case]) -> None:
    """An output among the cases would hide them from the next search, which skips outputs."""
    folders = {root} | {
        folder
        for case in cases
        for file in case.files.values()
        for folder in file.parents
        if folder == file.parent or folder.is_relative_to(root)
    }
    if _real(out) in map(_real, folders):
        raise OutputError(
            f"{out}: holds the cases, or some of them; give another OUT, e.g. {out / 'out'}"
        )


def _real(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a loop of links
        return path.absolute()


def _shown_subsets(summary: Summary, names: Sequence[str]) -> list[str]:
    """All modalities, the worst subset, then each single modality."""
    shown = [subset_name([True] * len(names), names), summary.worst, *names]
    return list(dict.fromkeys(shown))


def _facts(run: Run, weights: Kind, command: Sequence[str]) -> dict[str, str]:
    meta, own = run.config.meta, run.facts.get("own", {})
    missing = {
        name: sum(name not in files for files in run.facts["train"].values())
        for name in run.config.data.modalities
    }
    count = len(run.facts["train"])
    return {
        "training cases": f"{count}, missing "
        + ", ".join(f"{n} in {k}" for n, k in missing.items()),
        "strategy": own.get("strategy") or _strategy(meta),
        "masks": f"train {run.config.masks.train}, meta {run.config.masks.meta}",
        "steps": str(run.config.training.steps),
        "weights": _WEIGHTS[weights],
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
