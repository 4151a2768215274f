"""What do validation, averaged weights, folds, clean-ups and a start from another run change?

    python benchmarks/training_choices.py DATA             # about 90 minutes on one thread
    python benchmarks/training_choices.py DATA --set model.network=unet --set objective.unimodal=false  # 30
    python benchmarks/training_choices.py DATA --steps 60  # a short look; little is learned in so few steps

DATA is a folder of cases with the modalities and labels of BraTS. Some cases are kept for the test, and the
others are divided into two folds. Each fold trains a model and is the validation of the other one, which
chooses the best weights and the clean-up. Both models together do only what both chose. A further model
starts from a run on phantoms and trains on both folds, and one with as many steps starts from random weights.

All subsets of the test cases are predicted. Dice and HD95 are means over all subsets and regions, with 95 %
bootstrap intervals over cases, and differences are paired. There is one seed, and there are few cases: an
interval says how much cases differ, not how much another draw of weights and folds would.

Result (U-Net, 2-D slices of 3 mm, 13 glioma cases of which 4 are tested, seed 0): averaged weights gain
1.2 Dice points (0.3 to 1.8) over the last ones. The weights that were best on the five cases of the other
fold lose 4.8 (3.3 to 6.8): five patients are too few to choose by. Two models together gain 2.2 (-0.5 to
4.9) over the first of them. The clean-up lowers HD95 from 70 to 39, 61 to 35 and 60 to 37 mm, and gains
5.5, 1.0 and 2.6 points of Dice. A start from phantoms gains 4.5 (3.0 to 5.5) over a random one after 333
steps. The phantoms' model itself, which saw no patient, has a higher Dice (51.1) than all that were
trained on four to nine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import facts
from rich.console import Console
from rich.table import Table

import prism_meta as pm
from prism_meta.data.phantom import write_phantoms
from prism_meta.evaluation.cleaned import CleanedRecords
from prism_meta.records import Record
from prism_meta.report import compare, summarize
from prism_meta.training.cleanup.file import CLEANUP
from prism_meta.training.prediction.ensembles import cleanup_of, ensemble_predictor
from prism_meta.training.run import Run

SETTINGS = ("data.spacing=[2, 2, 2]", "data.patch=[48, 48]", "data.batch_size=8")
PROGRESS = Console(stderr=True)


def train(
    cases: Sequence[pm.Case], out: Path, arguments: argparse.Namespace, *overrides: str
) -> dict[str, Any]:
    """Train a run in ``out``, and say how long it took and what its validation found."""
    config = pm.load_config(
        overrides=[
            *SETTINGS,
            *arguments.set,
            f"data.cache='{out.parent / 'cache'}'",
            f"seed={arguments.seed}",
            "meta.strategy=first_order",
            "training.ema=0",
            f"training.steps={arguments.steps}",
            *overrides,
        ]
    )
    start = time.perf_counter()
    trained = pm.train(list(cases), config, out=out, progress=False)
    validations = [
        {"step": line["step"], **line["validation"]}
        for line in trained.history
        if "validation" in line
    ]
    found = {
        "run": out.name,
        "cases": len(cases),
        "steps": trained.history[-1]["step"],
        "seconds": time.perf_counter() - start,
        "validations": validations,
    }
    PROGRESS.print(found)
    return found


class Comparisons:
    """The scores of predictors on the test cases, each beside those of another one."""

    def __init__(self, test: Sequence[pm.Case], seed: int) -> None:
        self.test, self.seed = test, seed
        self.records: dict[str, list[Record]] = {}
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, predictor: pm.Predictor, *, to: str | None = None) -> None:
        """Measure ``predictor`` under a name, and compare it with an earlier one, ``to``.

        If it has a clean-up, a second row compares the labels after it with those before.
        """
        cleaned = CleanedRecords(predictor)
        self.records[name] = predictor.evaluate(self.test, on_prediction=cleaned)
        self.compare(name, to=to)
        if predictor.cleanup.is_on:
            self.records[f"{name}, cleaned"] = cleaned.records(self.records[name])
            self.compare(f"{name}, cleaned", to=name)

    def compare(self, name: str, *, to: str | None = None) -> None:
        """Add a row for records that were measured."""
        records = self.records[name]
        scores = summarize(records, seed=self.seed).overall.scores
        row: dict[str, Any] = {"name": name, "to": to}
        row |= {measure: scores[measure].to_dict() for measure in ("dice", "hd95_mm")}
        if to is not None:
            row["difference"] = compare(self.records[to], records, seed=self.seed).overall.to_dict()
        PROGRESS.print(row)
        self.rows.append(row)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    cases = list(pm.load_cases(arguments.data, pm.BRATS))
    order = torch.randperm(len(cases), generator=torch.Generator().manual_seed(arguments.seed))
    shuffled = [cases[i] for i in order.tolist()]
    test, rest = shuffled[: arguments.test], shuffled[arguments.test :]
    folds = [rest[::2], rest[1::2]]
    scores = Comparisons(test, arguments.seed)

    watched = [f"validation.every={arguments.every}", "validation.patience=4", "training.ema=0.99"]
    trainings = []
    for number, fold in enumerate(folds):
        names = json.dumps([case.id for case in fold])
        out = folder / f"fold{number}"
        trainings.append(train(rest, out, arguments, f"validation.cases={names}", *watched))
    runs = [Run.open(folder / f"fold{number}") for number in range(len(folds))]
    scores.add("fold 0, last", ensemble_predictor(runs[:1], weights="last"))
    scores.add("fold 0, ema", ensemble_predictor(runs[:1], weights="ema"), to="fold 0, last")
    against = {"fold 0": "fold 0, last", "both folds": "fold 0, best"}
    for name, chosen in {"fold 0": runs[:1], "fold 1": runs[1:], "both folds": runs}.items():
        predictor = ensemble_predictor(chosen, weights="best", cleanup=cleanup_of(chosen, "run"))
        scores.add(f"{name}, best", predictor, to=against.get(name))

    complete = torch.ones(arguments.phantoms, len(pm.BRATS), dtype=torch.bool)
    write_phantoms(folder / "phantoms", complete, seed=arguments.seed)
    phantoms = pm.load_cases(folder / "phantoms", pm.BRATS)
    trainings.append(train(phantoms, folder / "phantom", arguments))
    short = f"training.steps={max(1, arguments.steps // 3)}"
    trainings.append(train(rest, folder / "random", arguments, short))
    start = f"training.init='{folder / 'phantom'}'"
    trainings.append(train(rest, folder / "init", arguments, short, start))
    scores.add("phantoms only", Run.open(folder / "phantom").predictor())
    scores.add("random start", Run.open(folder / "random").predictor())
    scores.add("start from phantoms", Run.open(folder / "init").predictor(), to="random start")
    return {
        "test": [case.id for case in test],
        "folds": [[case.id for case in fold] for fold in folds],
        "trainings": trainings,
        "cleanups": [json.loads((run.folder / CLEANUP).read_text()) for run in runs],
        "scores": scores.rows,
    }


def told_of(value: dict[str, Any], digits: int) -> str:
    mean, low, high = (
        "n/a" if value[key] is None else f"{value[key]:.{digits}f}"
        for key in ("mean", "low", "high")
    )
    return f"{mean} ({low} to {high})"


def table(rows: Sequence[dict[str, Any]]) -> Table:
    result = Table("model", "Dice", "HD95, mm", "compared with", "Dice", "HD95, mm")
    for row in rows:
        change = row.get("difference")
        result.add_row(
            row["name"],
            told_of(row["dice"], 3),
            told_of(row["hd95_mm"], 1),
            row["to"] or "",
            "" if change is None else told_of(change["dice"], 3),
            "" if change is None else told_of(change["hd95_mm"], 1),
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of cases")
    parser.add_argument("--steps", type=int, default=600, help="outer steps of a run (default 600)")
    parser.add_argument("--every", type=int, default=60, help="steps between validations")
    parser.add_argument("--test", type=int, default=4, help="number of test cases (default 4)")
    parser.add_argument("--phantoms", type=int, default=12, help="phantoms to start from")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as of prism-meta train"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results/training_choices.json"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments, Path(folder))
    Console().print(table(found["scores"]))
    result = {**facts(arguments, ["torch", "monai"]), **found}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
