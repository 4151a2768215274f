"""What the commands do, without a terminal: from a folder of cases to runs, reports and labels."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from prism_meta.data.cases import Case, apply_availability, drop_modalities, load_cases
from prism_meta.data.preprocessing import prepare
from prism_meta.errors import CaseError, ConfigError, PrismError, raise_faults
from prism_meta.evaluation.predictor import evaluate, predict
from prism_meta.evaluation.saving import save_labels
from prism_meta.files import writable_folder
from prism_meta.modalities import subset_name, subsets
from prism_meta.records import Record, read_records
from prism_meta.report import Summary, summarize
from prism_meta.report.html import write_report
from prism_meta.report.overlays import OverlayCollector
from prism_meta.training.config import Config
from prism_meta.training.run import Run
from prism_meta.training.trainer import train

#: Told how far a long task is: done, total, and what to show beside the bar.
Progress = Callable[[int, int, str], None]


def load_from_config(config: Config, root: Path) -> list[Case]:
    """The cases of a folder, by the names that the configuration gives."""
    return load_cases(root, config.data.modalities, label=config.data.label)


def split(config: Config, cases: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    """Training and test cases; modalities are made missing in the training cases as configured.

    Raises:
        ConfigError: a test case does not exist, or none is left to train on.
        CaseError: the availability table does not fit.
    """
    data = config.data
    by_id = {case.id: case for case in cases}
    unknown = [name for name in data.test_cases if name not in by_id]
    if unknown:
        raise ConfigError(
            f"data.test_cases: no such case: {', '.join(unknown)}; name cases of the folder"
        )
    if max(data.holdout, len(data.test_cases)) >= len(cases):
        raise ConfigError(
            f"data.holdout: leaves none of {len(cases)} cases to train on; hold fewer out"
        )
    held = set(data.test_cases)
    if data.holdout:
        order = torch.randperm(len(cases), generator=torch.Generator().manual_seed(config.seed))
        held = {cases[i].id for i in order[: data.holdout].tolist()}
    training = [case for case in cases if case.id not in held]
    if data.availability is not None:
        training = apply_availability(training, data.availability)
    elif data.missing_rates is not None:
        training = drop_modalities(training, data.missing_rates, seed=config.seed)
    return training, [case for case in cases if case.id in held]


@dataclass(frozen=True)
class Progresses:
    """Where the steps of ``train_folder`` report to."""

    prepare: Progress
    train: Progress


def launch(config: Config) -> Fabric:
    """Start the processes that a configuration asks for; each of them goes on from here.

    With several devices Fabric runs the command again for each of the others, up to this call.
    """
    fabric = Fabric(
        accelerator=config.fabric.accelerator,
        devices=config.fabric.devices,
        num_nodes=config.fabric.nodes,
        precision=config.fabric.precision,
    )
    fabric.launch()
    return fabric


def start_run(config: Config, root: Path, out: Path) -> tuple[Run, Fabric]:
    """Check cases and configuration, and only then start the processes and make the run folder."""
    training, test = split(config, load_from_config(config, root))
    Run.new_folder(out)
    fabric = launch(config)
    with fabric.rank_zero_first():
        if fabric.is_global_zero:
            return Run.create(out, config, root=root, train=training, test=test), fabric
        return Run.open(out), fabric


def train_run(run: Run, progress: Progresses, *, fabric: Fabric, resume: bool = False) -> nn.Module:
    """Prepare the cases of a run and train on them."""
    config = run.config
    training, _ = split(config, load_from_config(config, Path(run.facts["data"])))
    now = {case.id: sorted(case.files) for case in training}
    if now != run.facts["train"]:
        raise PrismError(
            f"{run.facts['data']}: the cases have changed since {run.folder} was started; "
            "restore them or start a new run"
        )
    cache = config.data.cache or run.folder.parent / ".prism-meta-cache"
    done = 0

    def prepared(name: str) -> None:
        nonlocal done
        done += 1
        progress.prepare(done, len(training), name)

    with fabric.rank_zero_first(local=True):  # the others of its node find the cases in the cache
        cached = prepare(
            training, config.data.preprocessing(), config.data.label_set(), cache, on_case=prepared
        )

    def stepped(step: int, line: dict[str, Any]) -> None:
        losses = f"train {line['train_loss']:.3f}  meta {line['meta_loss']:.3f}"
        progress.train(step, config.training.steps, losses)

    return train(run, cached, fabric=fabric, resume=resume, on_step=stepped)


@dataclass(frozen=True)
class Evaluation:
    """The result of ``evaluate_run``: where the report is, and its numbers."""

    report: Path
    summary: Summary


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
    cases = load_from_config(config, root or Path(run.facts["data"]))
    if root is None:
        cases = [case for case in cases if case.id in run.facts["test"]]
        if not cases:
            raise PrismError(
                f"{run.folder}: held no case out; give a folder of cases to evaluate on, or train "
                "with data.holdout"
            )
    model = _model(run)
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

    labels = config.data.label_set()
    policy = config.evaluation.policy()
    records = evaluate(
        model,
        cases,
        preprocessing=config.data.preprocessing(),
        labels=labels,
        patch=config.data.patch,
        overlap=config.evaluation.overlap,
        empty=policy,
        on_prediction=predicted,
    )
    summary = summarize(records)
    report = write_report(
        out,
        title=f"{run.folder.resolve().name}: {len(cases)} cases, every subset of modalities",
        records=records,
        modalities=names,
        class_names=labels.names,
        policy_statement=f"{policy.name}: {policy.statement}",
        overlays=collector.overlays(_shown_subsets(summary, names)),
        history=run.history(),
        facts=_facts(run, cases, command),
    )
    return Evaluation(report, summary)


def predict_folder(
    run: Run, root: Path, out: Path, progress: Progress, *, subset: Sequence[str] = ()
) -> list[Path]:
    """Write a label volume per case of ``root``, from what it has, or from ``subset`` of it.

    Every case that can be predicted is; what is wrong with the others is raised at the end.

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
    # Labels are not needed, and a damaged one does not matter.
    cases = [_unlabelled(case) for case in load_from_config(config, root)]
    model = _model(run)
    written: list[Path] = []
    faults: list[str] = []
    for number, case in enumerate(cases, start=1):
        wanted = (
            [name in subset for name in case.modalities] if subset else case.availability.tolist()
        )
        absent = [
            n for n, w in zip(case.modalities, wanted, strict=True) if w and n not in case.files
        ]
        try:
            if absent:
                raise CaseError(
                    f"case {case.id}: has no {', '.join(absent)}; leave it out of the subset"
                )
            volume = predict(
                model,
                case,
                subset=wanted,
                preprocessing=config.data.preprocessing(),
                labels=config.data.label_set(),
                patch=config.data.patch,
                overlap=config.evaluation.overlap,
            )
        except CaseError as error:
            faults.extend(error.faults)
            continue
        written.append(out / f"{case.id}.nii.gz")
        save_labels(written[-1], volume, case)
        progress(number, len(cases), case.id)
    raise_faults(CaseError, faults)
    return written


def load_records(path: Path) -> list[Record]:
    """The records of a run folder, an evaluation folder, or a CSV file."""
    for candidate in (path / "evaluation" / "records.csv", path / "records.csv"):
        if candidate.exists():
            return read_records(candidate)
    if path.is_dir():
        raise PrismError(f"{path}: no records.csv here; run prism-meta evaluate {path} first")
    return read_records(path)


def _model(run: Run) -> nn.Module:
    return run.load_model("cuda" if torch.cuda.is_available() else "cpu")


def _unlabelled(case: Case) -> Case:
    return Case(case.id, case.modalities, case.files)


def _shown_subsets(summary: Summary, names: Sequence[str]) -> list[str]:
    """All modalities, the worst subset, then each modality alone."""
    shown = [subset_name([True] * len(names), names), summary.worst, *names]
    return list(dict.fromkeys(shown))


def _facts(run: Run, cases: Sequence[Case], command: Sequence[str]) -> dict[str, str]:
    meta = run.config.meta
    missing = {
        name: sum(name not in files for files in run.facts["train"].values())
        for name in run.config.data.modalities
    }
    count = len(run.facts["train"])
    return {
        "training cases": f"{count}, missing "
        + ", ".join(f"{n} in {k}" for n, k in missing.items()),
        "test cases": ", ".join(case.id for case in cases),
        "strategy": f"{meta.strategy}, inner lr {meta.inner_lr:g} x {meta.inner_steps}, alpha {meta.alpha:g}",
        "masks": f"train {run.config.masks.train}, meta {run.config.masks.meta}",
        "steps": str(run.config.training.steps),
        "seed": str(run.config.seed),
        "versions": ", ".join(f"{n} {v}" for n, v in run.facts["versions"].items()),
        "trained with": shlex.join(run.facts["command"]),
        "evaluated with": shlex.join(command),
        "config": run.config.to_toml(),
    }
