"""What ``predict`` does, without a terminal: label volumes of cases."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from prism_meta.cli.map_files import MapFiles
from prism_meta.data.cases import Case
from prism_meta.errors import CaseError, ConfigError, OutputError, PrismError, raise_faults
from prism_meta.evaluation.predictions import PredictionTable
from prism_meta.evaluation.predictor import Predictor
from prism_meta.evaluation.saving import region_volumes, save_labels, saved_origin
from prism_meta.files import atomic, kept_if_used, writable_folder
from prism_meta.modalities import composed, subset_name
from prism_meta.training.folder.facts import versions
from prism_meta.training.folder.weights import Kind
from prism_meta.training.prediction.ensembles import (
    CleanupChoice,
    cleanup_of,
    ensemble_predictor,
    member_predictors,
)
from prism_meta.training.prediction.expected import Expected
from prism_meta.training.run import Run
from prism_meta.training.setup.cases import find_configured

#: Called during a long task with what is done, the total, and a note to show beside the bar.
Progress = Callable[[int, int, str], None]


#: Columns of a table of predictions that validation gives: the Dice of its cases from the same subset, the
#: missing modality that raised it most, and by how much.
_EXPECTED = ("expected_dice", "would_help", "gain")


def predict_folder(
    runs: Sequence[Run],
    root: Path,
    out: Path,
    progress: Progress,
    *,
    subset: Sequence[str] = (),
    grid: str | None = None,
    weights: Kind | None = None,
    flips: bool = False,
    cleanup: CleanupChoice = "run",
    probabilities: bool = False,
    uncertainty: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Write a label volume for each case of ``root``, and ``predictions.csv`` with their volumes.

    A case that cannot be predicted does not stop the others; all faults are raised at the end. Cases that
    were predicted before from the same files, with the same weights and options, are skipped.

    Args:
        runs: runs whose training has ended; the probabilities of several are averaged.
        root: folder of cases.
        out: folder for the label volumes.
        progress: called after each case.
        subset: names of the modalities to use. Defaults to all that a case has.
        grid: modality on whose grid the labels are written; all files are resampled onto it. Defaults to
            the grid of the case.
        weights: see ``Run.load_model``.
        flips: see ``Ensemble``.
        cleanup: see ``cleanup_of``.
        probabilities: write the class probabilities, too, see ``MapFiles``.
        uncertainty: write their entropy, and the disagreement of several runs.
        tell: called with a line for the user, if cases were predicted before.

    Returns:
        The label volumes, including those that were there before.

    Raises:
        PrismError: bad modality names, cases that cannot be read, or no permission to write.
    """
    run = runs[0]
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
    refuse_case_folder(out, root, found)
    predictor = ensemble_predictor(
        runs, weights=weights, flips=flips, cleanup=cleanup_of(runs, cleanup)
    )
    labels = predictor.labels
    # What several runs reach together was not measured.
    expected = Expected.of_run(run, weights) if len(runs) == 1 else None
    table = PredictionTable(out, list(labels.regions), _EXPECTED if expected else ())
    members = member_predictors(runs, predictor, flips=flips)
    maps = MapFiles(out, members, probabilities=probabilities, uncertainty=uncertainty)
    written: list[Path] = []
    before = 0
    origin = _Origin(runs, predictor, weights=weights, flips=flips, grid=wanted)
    with kept_if_used(out):
        writable_folder(out)
        cases, refused = _writable(table, maps, found, subset)
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
            shown, own = subset_name(chosen, modalities), origin.of(case, chosen)
            file = table.label_file(case.id)
            done = table.has(case.id, subset=shown) and saved_origin(file) == own
            lacking = maps.lacking(case.id, own)
            if done and not lacking:
                written.append(file)
                before += 1
                progress(number, len(cases), f"{case.id}  predicted before")
                continue
            try:
                if lacking:
                    volume, probable = predictor.predict_maps(case, subset=chosen)
                else:
                    volume = predictor.predict(case, subset=chosen)
                if not done:  # labels that are there may have been corrected
                    volumes = region_volumes(volume, case, labels)
                    # The table first: it marks the folder as an output before that holds a label volume.
                    with atomic(file) as partial:
                        save_labels(partial, volume, case, origin=own)
                        table.add(
                            case.id,
                            subset=shown,
                            volumes=volumes,
                            more=_expected_cells(expected, chosen),
                        )
                if lacking:
                    maps.write(case, probable, subset=chosen, kinds=lacking, origin=own)
                written.append(file)
            except CaseError as error:
                faults += error.faults
            except OutputError as error:  # the next file would not fit, either
                raise PrismError([*faults, *error.faults]) from error
            progress(number, len(cases), case.id)
        if not written:
            raise_faults(CaseError, faults)
    if before:
        tell(f"{before} of {len(cases)} cases were predicted before; delete {out} to repeat them")
    if probabilities:
        tell(f"channels of *_probabilities.nii.gz: {', '.join(labels.names)}")
    raise_faults(CaseError, faults)
    return written


class _Origin:
    """Tells what label volumes were made from, in few characters."""

    def __init__(
        self,
        runs: Sequence[Run],
        predictor: Predictor,
        *,
        weights: Kind | None,
        flips: bool,
        grid: str | None,
    ) -> None:
        device = next((p.device.type for p in predictor.model.parameters()), "cpu")
        data = {"modalities", "labels", "regions", "spacing", "patch", "align"}
        config = runs[0].config.model_dump(
            mode="json", include={"data": data, "model": True, "evaluation": {"overlap"}}
        )
        hashes = [_hash(run.existing_weights(weights)) for run in runs]
        self._common = (hashes, config, versions(), device, flips, grid, predictor.cleanup)

    def of(self, case: Case, shown: Sequence[bool]) -> str:
        """That of a case from which some modalities are shown. It does not depend on where its files lie."""
        used = [n for n, s in zip(case.modalities, shown, strict=True) if s and n in case.files]
        facts = (self._common, case.id, list(shown), [_hash(case.files[name]) for name in used])
        return f"prism-meta {hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}"


def _hash(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:  # a fault of its own
        return ""


def _expected_cells(expected: Expected | None, shown: Sequence[bool]) -> list[str]:
    if expected is None:
        return []
    dice, addition = expected.of(shown), expected.best_addition(shown)
    name, gain = ("", "") if addition is None else (addition[0], f"{addition[1]:.3f}")
    return ["" if dice is None else f"{dice:.3f}", name, gain]


def _writable(
    table: PredictionTable, maps: MapFiles, found: Sequence[Case], subset: Sequence[str]
) -> tuple[list[Case], list[str]]:
    """The cases that have a subset and whose files can be written, and the faults of the others."""
    cases, faults = [], []
    named = maps.faults(found)
    for case in found:
        lacks = [name for name in subset if name not in case.files]
        own = [f"case {case.id}: has no {', '.join(lacks)}; leave it out of the subset"] * bool(
            lacks
        )
        own += [*table.faults(case, list(maps.of(case.id).values())), *named[case.id]]
        faults += own
        cases += [] if own else [case]
    return cases, faults


def refuse_case_folder(out: Path, root: Path, cases: Sequence[Case]) -> None:
    """Refuse a folder of cases as the folder of an output, because the next search for cases skips outputs.

    Args:
        out: folder of the output.
        root: the folder or manifest that was searched.
        cases: the cases that were found.

    Raises:
        OutputError: the output would lie among the files of the cases.
    """
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
