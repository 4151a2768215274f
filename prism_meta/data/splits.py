"""Splits of cases into sets that share no patient, each with its part of every availability."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from prism_meta.data.cases import Case
from prism_meta.data.layouts.dataset_json import read_json
from prism_meta.errors import CaseError, ConfigError, Fault, raise_faults

#: What stays together: the cases of a patient, or all those of a site.
By: TypeAlias = Literal["patient", "site"]


def draw_holdout(
    cases: Sequence[Case],
    count: int,
    *,
    by: By = "patient",
    seed: int = 0,
    availability: Mapping[str, Sequence[bool]] | None = None,
) -> list[str]:
    """Draw cases to hold out, whole patients or whole sites, stratified by availability.

    One group after another is drawn, each time the one with which the held-out cases have the modalities
    and subsets most nearly as often as all cases; equal ones in random order.

    Args:
        cases: the cases.
        count: number of cases to hold out. There are more if the last patient or site has more.
        by: what stays together.
        seed: random seed of the order.
        availability: case -> bool (M,), the modalities that count. Defaults to those of the files.

    Returns:
        Names of the cases, in the order of ``cases``.

    Raises:
        ConfigError: a case has no site, or no case is left.

    Example:
        >>> cases = [Case(f"p{k}", ("t1",), files={}, patient=f"{k // 2}") for k in range(6)]
        >>> len(draw_holdout(cases, 2))
        2
    """
    if not count:
        return []
    groups = _groups(cases, by, seed)
    sums, sizes = _strata(cases, availability, groups), torch.tensor([len(g) for g in groups])
    wanted = sums.sum(0) * (count / len(cases))
    held, free = torch.zeros_like(wanted), torch.ones(len(groups), dtype=torch.bool)
    while sizes[~free].sum() < count:
        fits = free & (sizes[~free].sum() + sizes <= count)
        distances = _distance(held + sums, wanted)
        distances[~(fits if fits.any() else free)] = torch.inf
        best = int(distances.argmin())  # the first of equal ones
        held, free[best] = held + sums[best], False
        if not free.any():
            message = f"leaves no {by} of {len(cases)} cases to train on; hold fewer out"
            raise ConfigError([Fault(message, "holdout")])
    drawn = (~free).nonzero().flatten().tolist()
    return [cases[i].id for i in sorted(i for k in drawn for i in groups[k])]


def draw_folds(
    cases: Sequence[Case],
    count: int,
    *,
    by: By = "patient",
    seed: int = 0,
    availability: Mapping[str, Sequence[bool]] | None = None,
) -> list[list[str]]:
    """Divide cases into folds of nearly the same size, stratified by availability.

    The largest patient or site is placed first, each in the fold that lacks its availability most. Sizes
    differ by at most one if all patients have one case.

    Args:
        cases: the cases.
        count: number of folds k, at least 2.
        by: what stays together.
        seed: random seed of the order.
        availability: see ``draw_holdout``.

    Returns:
        Names of the cases of each fold, in the order of ``cases``.

    Raises:
        ConfigError: a case has no site, or there are fewer patients or sites than folds.

    Source: the greedy rule of scikit-learn's ``StratifiedGroupKFold``.

    Example:
        >>> cases = [Case(f"p{k}", ("t1",), files={}) for k in range(5)]
        >>> sorted(len(fold) for fold in draw_folds(cases, 2))
        [2, 3]
    """
    groups = _groups(cases, by, seed)
    if len(groups) < count:
        message = f"got {count} folds for {len(groups)} {by}s, expected at most one for each; use fewer folds"
        raise ConfigError([Fault(message, "folds")])
    groups.sort(key=len, reverse=True)  # stable: equal ones stay in random order
    sums = _strata(cases, availability, groups)
    wanted = sums.sum(0) / count
    folds: list[list[int]] = [[] for _ in range(count)]
    have, sizes = torch.zeros(count, len(wanted), dtype=torch.float64), torch.zeros(count)
    for position, (group, own) in enumerate(zip(groups, sums, strict=True)):
        growth = _distance(have + own, wanted) - _distance(have, wanted)
        growth[~_open(sizes, len(group), len(cases), left=len(groups) - position)] = torch.inf
        best = int(growth.argmin())
        have[best] += own
        sizes[best] += len(group)
        folds[best] += group
    return [[cases[i].id for i in sorted(fold)] for fold in folds]


def read_folds(path: Path, cases: Sequence[Case]) -> list[list[str]]:
    """Read the folds that a file names: a list of lists of cases, by itself or as ``folds``.

    Args:
        path: a JSON file, e.g. the ``folds.json`` of another run.
        cases: the cases.

    Raises:
        CaseError: the file cannot be read, a case is in no fold or in two, or a patient is in two.
    """
    content = read_json(path, "folds")
    folds = content.get("folds") if isinstance(content, dict) else content
    valid = isinstance(folds, list) and all(
        isinstance(fold, list) and fold and all(isinstance(name, str) for name in fold)
        for fold in folds
    )
    if not isinstance(folds, list) or not valid or len(folds) < 2:
        raise CaseError(
            f'{path}: has no list of folds, expected at least two, e.g. {{"folds": [["p1"], ["p2", "p3"]]}}; '
            "write it so"
        )
    counts = Counter(name for fold in folds for name in fold)
    known = {case.id: case for case in cases}
    faults = [
        f"case {name}: is {n} times in {path}; keep one" for name, n in counts.items() if n > 1
    ]
    faults += [
        f"case {name}: is in {path}, but there is no such case; remove it there, or add the case"
        for name in counts
        if name not in known
    ]
    faults += [
        f"case {name}: is in no fold of {path}; add it to one"
        for name in known
        if name not in counts
    ]
    where: dict[str, set[int]] = {}
    for number, fold in enumerate(folds):
        for name in fold:
            if name in known:
                where.setdefault(known[name].patient, set()).add(number)
    faults += [
        f"patient {patient}: has cases in the folds {', '.join(map(str, sorted(numbers)))} of {path}, "
        "expected one fold; move them together"
        for patient, numbers in where.items()
        if len(numbers) > 1
    ]
    raise_faults(CaseError, faults)
    return [list(fold) for fold in folds]


def folds_json(folds: Sequence[Sequence[str]], *, fold: int, by: By, seed: int) -> str:
    """The content of ``folds.json``: the folds by name, and which of them is held out."""
    facts = {"by": by, "seed": seed, "fold": fold, "folds": [list(names) for names in folds]}
    return json.dumps(facts, indent=2) + "\n"


def shared_patients(first: Sequence[Case], second: Sequence[Case]) -> dict[str, list[str]]:
    """Patients that have cases in two sets -> names of all their cases.

    Example:
        >>> a, b = (Case(name, ("t1",), files={}, patient="x") for name in ("a", "b"))
        >>> shared_patients([a], [b])
        {'x': ['a', 'b']}
    """
    both = {case.patient for case in first} & {case.patient for case in second}
    return {
        patient: [case.id for case in (*first, *second) if case.patient == patient]
        for patient in sorted(both)
    }


def _groups(cases: Sequence[Case], by: By, seed: int) -> list[list[int]]:
    """The positions of the cases that stay together, in random order.

    A patient who was at two sites joins them.
    """
    if by == "site":
        without = [case.id for case in cases if case.site is None]
        if without:
            shown = ", ".join(without[:5]) + (" ..." if len(without) > 5 else "")
            message = (
                f"got a split by site, but {len(without)} cases have no site ({shown}); give a manifest "
                "with a column site, or split by patient"
            )
            raise ConfigError([Fault(message, "split")])
    leader: dict[tuple[str, str], tuple[str, str]] = {}

    def root(key: tuple[str, str]) -> tuple[str, str]:
        while leader.setdefault(key, key) != key:
            key = leader[key]
        return key

    for case in cases:
        own = root(("patient", case.patient))
        if by == "site":
            leader[own] = root(("site", str(case.site)))
    order = torch.randperm(len(cases), generator=torch.Generator().manual_seed(seed)).tolist()
    groups: dict[tuple[str, str], list[int]] = {}
    for i in order:
        groups.setdefault(root(("patient", cases[i].patient)), []).append(i)
    return list(groups.values())


def _open(sizes: Tensor, more: int, total: int, *, left: int) -> Tensor:
    """Which folds can take ``more`` cases, so that no fold stays empty and sizes differ little: bool (k,).

    Args:
        sizes: cases in each fold.
        more: cases of the group to be placed.
        total: cases in all folds, at the end.
        left: groups that are not placed yet.
    """
    empty = sizes == 0
    if int(empty.sum()) >= left:  # each of the last groups gets an empty fold
        return empty
    least, larger = divmod(total, len(sizes))
    grown = sizes + more
    fits = grown <= least
    if int((sizes > least).sum()) < larger:
        fits |= grown <= least + 1
    return fits if fits.any() else grown == grown.min()


def _strata(
    cases: Sequence[Case],
    availability: Mapping[str, Sequence[bool]] | None,
    groups: Sequence[Sequence[int]],
) -> Tensor:
    """What should be spread evenly, counted in each group: cases, modalities and subsets; float64 (G, F)."""
    own = availability or {}
    rows = torch.stack(
        [torch.tensor(own.get(case.id, case.availability.tolist())) for case in cases]
    )
    _, kinds = rows.unique(dim=0, return_inverse=True)
    facts = torch.cat([torch.ones(len(rows), 1), rows, torch.nn.functional.one_hot(kinds)], 1)
    return torch.stack([facts[list(group)].double().sum(0) for group in groups])


def _distance(counts: Tensor, wanted: Tensor) -> Tensor:
    """How far counts (N, F) are from those that are wanted (F,): (N,).

    Each count is taken as a share, so that rare subsets matter; rounding makes equal ones equal.
    """
    return (((counts - wanted) / wanted.clamp(min=1e-9)) ** 2).sum(1).round(decimals=9)
