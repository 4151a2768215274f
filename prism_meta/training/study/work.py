"""One run of a study: trained, and scored on its test cases from every subset of modalities."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from prism_meta.training.build import build_fabric, build_label_set
from prism_meta.training.config import Config
from prism_meta.training.folder.facts import versions
from prism_meta.training.processes.agreement import Processes
from prism_meta.training.profiling.memory import step_memory
from prism_meta.training.setup.cases import prepare_configured
from prism_meta.training.study.jobs import Job
from prism_meta.training.study.results import Result
from prism_meta.training.train import Trained, train
from prism_meta.training.validation.validation import Validation

if TYPE_CHECKING:  # it takes two seconds to import
    from lightning_fabric import Fabric

#: Points of a curve at most; a study has hundreds of curves.
_POINTS = 50


def run_job(
    job: Job,
    cases: Path,
    folder: Path,
    *,
    gpu: int | None = None,
    keep: bool = False,
    should_stop: Callable[[], bool] | None = None,
) -> Result:
    """Train and score one run.

    A run that was interrupted goes on where it was.

    Args:
        job: what to run.
        cases: folder of all cases.
        folder: of the study; the run has a folder below it, which is removed at the end.
        gpu: index of the GPU to use. Defaults to what the configuration says.
        keep: keep the folder of the run.
        should_stop: see ``train``.

    Raises:
        PrismError: see ``train``.
        TrainingStopped: ``should_stop`` was true.
    """
    out = folder / "work" / job.key
    data = job.config.data.model_copy(update={"cache": (folder / "cache").absolute()})
    config = job.config.model_copy(update={"data": data})
    # The comma makes it an index instead of a number of devices.
    device = {} if gpu is None else {"devices": f"{gpu},"}
    fabric = build_fabric(config.fabric.model_copy(update=device))
    timer = _Timer(fabric.device.type == "cpu")
    trained = train(
        cases,
        config,
        out=out,
        fabric=fabric,
        resume=(out / "run.json").exists(),
        progress=False,
        on_step=timer,
        should_stop=should_stop,
    )
    run = trained.run
    assert run is not None  # there is a folder
    history = run.history()
    result = Result(
        key=job.key,
        title=job.title,
        steps=history[-1]["step"],
        evaluations=job.evaluations,
        seconds=timer.seconds_per_step() * history[-1]["step"],
        memory=step_memory(config).total,
        scores={} if job.stage == "search" else _scores(config, trained, folder / "cache", fabric),
        validation=_validation(history),
        curves=_curves(history),
        weights=run.kinds[0],
        machine={**versions(), "device": str(fabric.device)},
    )
    if not keep:
        shutil.rmtree(out, ignore_errors=True)
    return result


class _Timer:
    """Takes the time at the calls of ``on_step``; the median over them leaves validations out."""

    def __init__(self, on_cpu: bool) -> None:
        self._clock = time.process_time if on_cpu else time.perf_counter
        self._calls: list[tuple[int, float]] = []

    def __call__(self, step: int, line: dict[str, Any]) -> None:
        self._calls.append((step, self._clock()))

    def seconds_per_step(self) -> float:
        """NaN if the training was too short."""
        pairs = zip(self._calls, self._calls[1:], strict=False)
        found = [(after - before) / (b - a) for (a, before), (b, after) in pairs]
        return median(found) if found else math.nan


def _scores(
    config: Config, trained: Trained, cache: Path, fabric: Fabric
) -> dict[str, dict[str, float]]:
    """Dice of each test case from each subset, on the model's grid, where all subsets share one pass."""
    prepared = prepare_configured(
        config,
        trained.test,
        cache,
        processes=Processes(fabric),
        on_case=lambda done, total, name: None,
    )
    test = Validation(
        prepared,
        modalities=config.data.modalities,
        labels=build_label_set(config.data),
        patch=config.data.patch,
        overlap=config.evaluation.overlap,
    )
    dice = test.dice(trained.model, prepared)
    return {case.id: found for case, found in zip(trained.test, dice, strict=True)}


def _validation(history: Sequence[Mapping[str, Any]]) -> float:
    """The best Dice on the validation cases."""
    found = [line["validation"]["best"]["dice"] for line in history if "validation" in line]
    return float(found[-1]) if found else math.nan


def _curves(history: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """The losses over training, averaged to a few points, and what was measured now and then."""
    curves: dict[str, list[list[float]]] = {}
    size = -(-len(history) // _POINTS)
    for name in ("train_loss", "meta_loss"):
        parts = [history[i : i + size] for i in range(0, len(history), size)]
        curves[name] = [[part[-1]["step"], fmean(line[name] for line in part)] for part in parts]
    cosine = [[line["step"], line["cosine"]] for line in history if line.get("cosine") is not None]
    validated = [line for line in history if "validation" in line]
    scores = {
        f"{name} {measure}": [
            [line["step"], line["validation"][name][measure]]
            for line in validated
            if name in line["validation"]
        ]
        for name in ("last", "ema")
        for measure in ("dice", "worst")
    }
    return {name: curve for name, curve in {**curves, "cosine": cosine, **scores}.items() if curve}
