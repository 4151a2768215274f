"""How much does a run gain from a few labelled cases of a site that it has never seen, and from which start?

    python benchmarks/adaptation.py DATA                   # hours on one thread: five starts, 15 subsets
    python benchmarks/adaptation.py DATA --starts single_level --subsets flair t1ce flair+t1  # minutes
    python benchmarks/adaptation.py --phantoms 6           # phantoms of five sites instead of DATA

DATA is a folder of BraTS-like cases whose names tell their site. No case of --held-out sites is trained on.
All starts go on from one common single-level run, and cost the same: --steps gradient evaluations of a batch
for the common run, and --more for each start. A start is adapted to draws of n cases of a held-out site, or
of all of them together (group "unseen"), for each subset of modalities, with the default of prism-meta adapt,
and also with fixed settings. Dice before and after is measured on the other cases of the group, on the
model's grid, as the mean over the regions that a case has.

The unit is the case: its values are means over draws and subsets, and intervals are bootstraps over cases.
There is one seed, and there are few cases: an interval says how much cases differ, not how much another
training would.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from measuring import facts
from rich.console import Console
from rich.table import Table
from sites import write_sites

import prism_meta as pm
from prism_meta.data.cache import CachedCase, prepare
from prism_meta.modalities import subset_name, subsets
from prism_meta.report.bootstrap import Bootstrap
from prism_meta.training.build import build_label_set, build_model, build_preprocessing
from prism_meta.training.validation.one_subset import OneSubsetValidation

COMMON = (
    "data.spacing=[3, 3, 3]", "data.patch=[48, 48]", "data.batch_size=8", "model.network=unet",
    "model.width=8", "objective.unimodal=false", "training.ema=0.99", "training.lr=0.002",
)  # fmt: skip
SINGLE_LEVEL = ("meta.strategy=single_level", "masks.train=one_subset", "masks.meta=one_subset")
#: Inner steps and rate of task episodes.
STEPS, RATE = 5, 0.05
TASK = (
    "episodes.kind=task",
    f"meta.inner_steps={STEPS}",
    f"meta.inner_lr={RATE}",
    "meta.alpha=0.0",
)
#: Start -> its overrides, and the gradient evaluations of an outer step.
STARTS: Mapping[str, tuple[tuple[str, ...], int]] = {
    "single_level": (SINGLE_LEVEL, 1),
    "meta_drop_first_order": (("meta.strategy=first_order", "meta.alpha=1.0"), 2),
    "task_first_order": ((*TASK, "meta.strategy=first_order"), STEPS + 1),
    "task_second_order": ((*TASK, "meta.strategy=second_order"), STEPS + 1),
    # Learned rates are no key of a configuration: the strategy is an object.
    "task_meta_sgd": ((*TASK, "meta.strategy=second_order"), STEPS + 1),
}
PROGRESS = Console(stderr=True)


@dataclass(frozen=True)
class Row:
    """One adaptation: Dice of each test case before and after it.

    Args:
        start: what was adapted.
        group: the site, or "unseen".
        n: number of support cases.
        draw: number of the draw of support cases.
        subset: modalities that are shown.
        setting: "default", or a fixed one, e.g. "20:0.001".
        steps: steps taken; 0 if the weights were kept.
        lr: rate.
        before: test case -> Dice before.
        after: test case -> Dice after.
    """

    start: str
    group: str
    n: int
    draw: int
    subset: str
    setting: str
    steps: int
    lr: float
    before: dict[str, float]
    after: dict[str, float]

    @property
    def change(self) -> float:
        return fmean(self.after[case] - self.before[case] for case in self.before)


def train_starts(
    cases: Sequence[pm.Case], folder: Path, arguments: argparse.Namespace
) -> dict[str, pm.Run]:
    """The common run, and one run from it for each start."""
    rates = f"data.missing_rates={list(map(float, arguments.rates))}"
    common = [*COMMON, f"data.cache='{folder / 'cache'}'", f"seed={arguments.seed}", rates]
    base = pm.load_config(overrides=[*common, *SINGLE_LEVEL, f"training.steps={arguments.steps}"])
    start = time.perf_counter()
    pm.train(list(cases), base, out=folder / "base", progress=False)
    PROGRESS.print(f"common run: {time.perf_counter() - start:.0f} s")
    runs = {}
    for name in arguments.starts:
        overrides, evaluations = STARTS[name]
        config = pm.load_config(
            overrides=[
                *common,
                *overrides,
                f"training.steps={max(1, arguments.more // evaluations)}",
                f"training.init='{folder / 'base'}'",
            ]
        )
        strategy = None
        if name == "task_meta_sgd":
            strategy = pm.SecondOrder(pm.MetaSGD(build_model(config), lr=RATE), STEPS)
        start = time.perf_counter()
        pm.train(list(cases), config, out=folder / name, strategy=strategy, progress=False)
        PROGRESS.print(f"{name}: {time.perf_counter() - start:.0f} s")
        runs[name] = pm.Run.open(folder / name)
    return runs


class Study:
    """Adapts starts to draws of support cases, and measures the other cases of the group."""

    def __init__(
        self, cases: Sequence[pm.Case], run: pm.Run, arguments: argparse.Namespace
    ) -> None:
        self.cases = {case.id: case for case in cases}
        self.arguments = arguments
        data = run.config.data
        assert data.cache is not None
        prepared = prepare(
            cases,
            data.cache,
            preprocessing=build_preprocessing(data),
            labels=build_label_set(data),
        )
        self.prepared = {case.id: case for case in prepared}
        self.subsets = [
            row
            for row in subsets(len(pm.BRATS))
            if not arguments.subsets or subset_name(row, pm.BRATS) in arguments.subsets
        ]

    def groups(self) -> dict[str, list[str]]:
        """Held-out sites with two cases or more, and all together."""
        found = {
            site: [case.id for case in self.cases.values() if case.site == site]
            for site in self.arguments.held_out
        }
        groups = {site: names for site, names in found.items() if len(names) > 1}
        together = [name for names in found.values() for name in names]
        return groups if [together] == list(groups.values()) else {**groups, "unseen": together}

    def draws(self, names: Sequence[str], n: int) -> list[tuple[str, ...]]:
        """Different support sets of n cases, which leave at least one case to test on."""
        every = list(combinations(names, n)) if n < len(names) else []
        random.Random(self.arguments.seed).shuffle(every)
        return every[: self.arguments.draws]

    def rows(self, name: str, run: pm.Run) -> list[Row]:
        """All adaptations of one start."""
        model = run.load_model()
        rows = []
        for group, names in self.groups().items():
            for n in self.arguments.support:
                for draw, support in enumerate(self.draws(names, n)):
                    test = [self.prepared[case] for case in names if case not in support]
                    for subset in self.subsets:
                        before = self.dice(run, model, test, subset)
                        for setting in ("default", *self.arguments.fixed):
                            adapted = self.adapt(run, support, subset, setting)
                            rows.append(
                                Row(
                                    name,
                                    group,
                                    n,
                                    draw,
                                    subset_name(subset, pm.BRATS),
                                    setting,
                                    adapted.facts.steps,
                                    adapted.facts.lr,
                                    before,
                                    self.dice(run, adapted.model, test, subset),
                                )
                            )
                    PROGRESS.print(f"{name}, {group}, n = {n}, draw {draw}: done")
        return rows

    def adapt(
        self, run: pm.Run, support: Sequence[str], subset: torch.Tensor, setting: str
    ) -> pm.Adapted:
        steps, lr = (None, None)
        if setting != "default":
            first, second = setting.split(":")
            steps, lr = int(first), float(second)
        return pm.adapt(
            run,
            [self.cases[name] for name in support],
            subset=subset_name(subset, pm.BRATS),
            steps=steps,
            lr=lr,
            progress=False,
        )

    def dice(
        self,
        run: pm.Run,
        model: torch.nn.Module,
        cases: Sequence[CachedCase],
        subset: torch.Tensor,
    ) -> dict[str, float]:
        measure = OneSubsetValidation(
            cases,
            modalities=pm.BRATS,
            labels=build_label_set(run.config.data),
            patch=run.config.data.patch,
            subset=subset,
        )
        (name,) = {subset_name(subset, pm.BRATS)}
        return {
            case.id: found[name]
            for case, found in zip(cases, measure.dice(model, cases), strict=True)
        }


def by_case(rows: Sequence[Row], what: str) -> dict[str, float]:
    """The mean of each test case over draws and subsets: of ``before``, ``after`` or the change."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for case, before in row.before.items():
            values = {
                "before": before,
                "after": row.after[case],
                "change": row.after[case] - before,
            }
            found.setdefault(case, []).append(values[what])
    return {case: fmean(values) for case, values in found.items()}


def interval(values: Mapping[str, float], seed: int) -> dict[str, Any]:
    column = np.array([[value] for value in values.values()])
    return Bootstrap(len(column), seed=seed).intervals(column)[0].to_dict()


def summarize(rows: Sequence[Row], seed: int) -> list[dict[str, Any]]:
    """A line for each start, group, n and setting."""
    found = []
    keys = dict.fromkeys((row.start, row.group, row.n, row.setting) for row in rows)
    first = next(iter(keys))[0]
    for start, group, n, setting in keys:
        own, base = (
            [row for row in rows if (row.start, row.group, row.n, row.setting) == key]
            for key in ((start, group, n, setting), (first, group, n, setting))
        )
        after, reference = by_case(own, "after"), by_case(base, "after")
        found.append(
            {
                "start": start,
                "group": group,
                "n": n,
                "setting": setting,
                "before": fmean(by_case(own, "before").values()),
                "after": fmean(after.values()),
                "change": interval(by_case(own, "change"), seed),
                "worse": fmean(row.change < 0 for row in own),
                "kept": fmean(row.steps == 0 for row in own),
                "adaptations": len(own),
                f"after, minus {first}": interval(
                    {case: after[case] - reference[case] for case in after}, seed
                ),
            }
        )
    return found


def table(lines: Sequence[Mapping[str, Any]]) -> Table:
    result = Table("start", "group", "n", "setting", "before", "after", "change", "worse", "kept")
    for line in lines:
        change = line["change"]
        ends = [change[key] for key in ("low", "high")]
        told = "" if None in ends else f" ({100 * ends[0]:+.1f} to {100 * ends[1]:+.1f})"
        result.add_row(
            line["start"],
            line["group"],
            str(line["n"]),
            line["setting"],
            f"{100 * line['before']:.1f}",
            f"{100 * line['after']:.1f}",
            f"{100 * change['mean']:+.1f}{told}",
            f"{100 * line['worse']:.0f} %",
            f"{100 * line['kept']:.0f} %",
        )
    return result


def measure(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """The results so far, after each start."""
    root = arguments.data
    if arguments.phantoms:
        sites = ["TCIA01", "TCIA02", "TCIA03", *arguments.held_out]
        root = write_sites(folder / "sites", sites, arguments.phantoms, seed=arguments.seed)
    cases = list(pm.load_cases(root, pm.BRATS))
    held_out = [case for case in cases if case.site in arguments.held_out]
    seen = [case for case in cases if case.site not in arguments.held_out]
    if not held_out or not seen:
        raise SystemExit(f"{root}: no cases of {', '.join(arguments.held_out)}, or no others")
    runs = train_starts(seen, folder, arguments)
    study = Study(held_out, next(iter(runs.values())), arguments)
    rows: list[Row] = []
    for name, run in runs.items():
        start = time.perf_counter()
        rows += study.rows(name, run)
        PROGRESS.print(f"{name}: adapted in {time.perf_counter() - start:.0f} s")
        yield {
            "trained_on": [case.id for case in seen],
            "groups": study.groups(),
            "summary": summarize(rows, arguments.seed),
            "adaptations": [{**asdict(row), "change": row.change} for row in rows],
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="DATA", nargs="?", help="folder of cases")
    parser.add_argument("--phantoms", type=int, default=0, help="phantoms per site, without DATA")
    parser.add_argument("--steps", type=int, default=1200, help="evaluations of the common run")
    parser.add_argument("--more", type=int, default=900, help="evaluations of each start")
    parser.add_argument("--draws", type=int, default=2, help="support sets per group and n")
    parser.add_argument("--support", type=int, nargs="+", default=[1, 3, 5], help="n (1 3 5)")
    parser.add_argument("--subsets", nargs="+", default=[], help="e.g. flair flair+t1 (all)")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--fixed", nargs="*", default=["20:0.001", "40:0.003"], help="STEPS:RATE")
    parser.add_argument("--held-out", nargs="+", default=["TCIA10", "TCIA13"], help="sites")
    parser.add_argument("--rates", type=float, nargs=4, default=[0.2, 0.4, 0.6, 0.8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results/adaptation.json"
    )
    arguments = parser.parse_args()
    if (arguments.data is None) == (not arguments.phantoms):
        parser.error("give DATA, or --phantoms")
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        for found in measure(arguments, Path(folder)):
            result = {**facts(arguments, ["torch", "monai"]), **found}
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    Console().print(table(found["summary"]))


if __name__ == "__main__":
    main()
