"""Writes the tables of docs/evidence.md from the results of the studies.

    python benchmarks/evidence.py            # print them
    python benchmarks/evidence.py --write    # put them between the marks of the page

A table stands between the lines ``<!-- table NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "evidence.md"
BUDGETS = ("equal gradients", "equal time")
#: Trainings per seed of the studies on real cases.
FOLDS = {"real": 5, "default_real": 5}
#: With fewer trainings an interval is too narrow to say anything.
LEAST = 5
#: Ending of a column -> key of an interval.
_ENDS = {"": "mean", "_low": "low", "_high": "high"}
#: Claim of PRISM's description -> rows that test it: study, method, which Dice, and whether the method
#: should be better than the reference (+1), or worse (-1).
CLAIMS: Mapping[str, Sequence[tuple[str, str, str, int]]] = {
    "Two levels generalise to unseen distributions of modalities": (
        ("levels", "first order, alpha 0.5", "mean", +1),
        ("levels", "first order, alpha 0", "mean", +1),
        ("levels", "second order, alpha 0.5", "mean", +1),
        ("long", "first order, alpha 0.5", "mean", +1),
        ("unseen", "first order", "mean", +1),
        ("real", "first order, alpha 0.5", "mean", +1),
    ),
    "Dynamic masks are robust to changing patterns of modalities": (
        ("levels", "static masks", "worst", -1),
        ("real", "static masks", "worst", -1),
    ),
    "A meta batch prevents overfitting to the modalities of training": (
        ("levels", "first order, full meta, all files", "worst", +1),
        ("rows", "first order, single meta", "worst", +1),
        ("unseen", "first order, single meta", "worst", +1),
    ),
    "All losses gain from the outer level": (("losses", "all losses, first order", "mean", +1),),
    "Weights that follow the meta-gradient balance the losses": (
        ("losses", "learned weights, first order", "mean", +1),
    ),
}


def study(name: str) -> list[dict[str, str]]:
    """The rows of a study's table; none if it has no results."""
    path = RESULTS / "ablation" / name / "study.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _points(row: Mapping[str, str], what: str, *, sign: str = "+") -> str:
    """A value in points, with its interval."""
    value, low, high = (100 * float(row[key]) for key in (what, f"{what}_low", f"{what}_high"))
    return f"{value:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "*No results yet.*"
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def levels_of(name: str) -> str:
    """Differences to the reference, in both budgets side by side."""
    found: dict[str, list[str]] = {}
    rows = study(name)
    budgets = [each for each in BUDGETS if any(row["budget"] == each for row in rows)]
    for row in rows:
        cells = found.setdefault(row["method"], [""] * (1 + 2 * len(budgets)))
        first = 1 + 2 * budgets.index(row["budget"])
        cells[0] = row["seeds"]
        if row["mean_difference"] == "nan":
            cells[first : first + 2] = [_points(row, key, sign="") for key in ("mean", "worst")]
        else:
            cells[first : first + 2] = [
                _points(row, f"{key}_difference") for key in ("mean", "worst")
            ]
    head = ["method", "seeds"]
    for budget in budgets:
        head += [f"{budget}: mean", "worst subset"]
    return _table(head, [[method, *cells] for method, cells in found.items()])


def verdict(row: Mapping[str, str], what: str, side: int, *, folds: int = 1) -> str:
    """What a difference and its interval say of a claim."""
    low, high = (side * float(row[f"{what}_difference_{end}"]) for end in ("low", "high"))
    if int(row["seeds"]) * folds < LEAST:
        return "too few trainings"
    if min(low, high) > 0:
        return "confirmed"
    return "the opposite" if max(low, high) < 0 else "not confirmed"


def claims() -> str:
    """What the studies say of each claim, at equal time where they have it."""
    lines = []
    for claim, tests in CLAIMS.items():
        told = [
            [
                f"{method}, {name}",
                str(int(row["seeds"]) * FOLDS.get(name, 1)),
                row["budget"],
                {"worst": "worst subset"}.get(what, what),
                _points(row, f"{what}_difference"),
                verdict(row, what, side, folds=FOLDS.get(name, 1)),
            ]
            for name, method, what, side in tests
            for row in study(name)
            if row["method"] == method
        ]
        told = told or [[""] * 5 + ["not tested yet"]]
        lines += [[claim if k == 0 else "", *cells] for k, cells in enumerate(told)]
    return _table(
        ["claim", "method, study", "trainings", "budget", "Dice", "minus one level", "says"], lines
    )


def adaptation() -> str:
    """Starts and numbers of support cases: Dice before and after, and how often it became worse.

    The fixed settings beside the default are told of the first start only.
    """
    lines = []
    for name in ("adaptation", "adaptation_five"):
        path = RESULTS / f"{name}.json"
        found = json.loads(path.read_text(encoding="utf-8"))["summary"] if path.exists() else []
        for row in found:
            if row["setting"] != "default" and row["start"] != found[0]["start"]:
                continue
            change = {f"change{end}": str(row["change"][key]) for end, key in _ENDS.items()}
            lines.append([
                row["start"], row["group"], str(row["n"]), row["setting"], f"{100 * row['before']:.1f}",
                f"{100 * row['after']:.1f}", _points(change, "change"),
                f"{100 * row['worse']:.0f} %", f"{100 * row['kept']:.0f} %",
            ])  # fmt: skip
    head = ["start", "site", "n", "setting", "before", "after", "change", "worse", "kept"]
    return _table(head, lines)


TABLES: Mapping[str, Callable[[], str]] = {
    "claims": claims,
    "adaptation": adaptation,
    **{
        name: (lambda name=name: levels_of(name))
        for name in ("levels", "long", "real", "default", "default_real", "second_levels", "unseen",
                     "losses", "rows")
    },
}  # fmt: skip


def filled(page: str) -> str:
    """The page with the tables that the results give."""

    def table(match: re.Match[str]) -> str:
        text = TABLES[match[1]]()
        return f"<!-- table {match[1]} -->\n\n{text}\n\n<!-- end -->"

    return re.sub(r"(?s)<!-- table (\w+) -->.*?<!-- end -->", table, page)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write docs/evidence.md")
    if parser.parse_args().write:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return
    for name, made in TABLES.items():
        Console().print(f"{name}\n\n{made()}\n", soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
