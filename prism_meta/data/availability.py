"""Availability: which modalities exist for each case. It is read from tables or drawn at random."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prism_meta.errors import CaseError, ConfigError, Fault, raise_faults
from prism_meta.modalities import BRATS, composed

if TYPE_CHECKING:  # ``cases`` imports this module
    from prism_meta.data.cases import Case


def draw_availability(n: int, rates: Sequence[float], *, seed: int = 0) -> Tensor:
    """Draw which modalities exist for ``n`` cases at given missing rates.

    Modality m is missing in exactly round(n * rates[m]) cases. Every case keeps at least one.

    Args:
        n: number of cases, at least 1.
        rates: missing rate FR^m of each of the M modalities, in [0, 1).
        seed: random seed of the draw.

    Returns:
        bool (n, M); no row is empty.

    Raises:
        ValueError: a rate is outside [0, 1).
        ConfigError: the rates leave fewer files than cases.

    Source: the imbalanced missing rates of PASSION (Shi et al., ACM MM 2024).

    Example:
        >>> draw_availability(10, (0.2, 0.4, 0.6, 0.8)).sum(0).tolist()
        [8, 6, 4, 2]
    """
    if n < 1 or not rates or any(not 0 <= rate < 1 for rate in rates):
        raise ValueError(
            f"draw_availability: got n={n}, rates={tuple(rates)}; use n >= 1 and rates in [0, 1)"
        )
    present = [n - round(n * rate) for rate in rates]
    if sum(present) < n:
        message = (
            f"rates: {tuple(rates)} leave {sum(present)} files for {n} cases, so some case would have no "
            "modality; use lower rates"
        )
        raise ConfigError([Fault(message, "rates")])
    generator = torch.Generator().manual_seed(seed)
    available = torch.stack(
        [torch.randperm(n, generator=generator) < count for count in present], 1
    )
    # An empty case takes a modality from a case that has several, so that the counts do not change.
    # Such a case always exists because there are at least as many files as cases.
    for row in (~available.any(1)).nonzero().flatten().tolist():
        donors = (available & (available.sum(1, keepdim=True) > 1)).nonzero()
        donor, modality = donors[
            int(torch.randint(len(donors), (1,), generator=generator))
        ].tolist()
        available[donor, modality], available[row, modality] = False, True
    return available


def read_availability(path: Path | str, modalities: Sequence[str]) -> dict[str, tuple[bool, ...]]:
    """Read an availability table from a CSV file.

    The table may have lines for cases and columns for other facts that are not used. Names are
    compared in one Unicode form (NFC). Two forms are read:

    - ``case,<modality>,...`` with 0 or 1 per modality, in any order of the columns;
    - the published imbalanced-split table ``data_name,mask_id,mask,pos_mask_ids``, whose masks are
      in the order flair, t1ce, t1, t2.

    Args:
        path: the CSV file.
        modalities: names of the M modalities, in the order of the result.

    Returns:
        case name -> M booleans, which modalities exist.

    Raises:
        CaseError: the file cannot be read, or has invalid lines (all of them together).

    Source: the second form is that of PASSION (Shi et al., ACM MM 2024).

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "table.csv"
        >>> _ = path.write_text("case,t2,t1\\np0,1,0\\n")
        >>> read_availability(path, ("t1", "t2"))
        {'p0': (False, True)}
    """
    path = Path(path)
    columns, lines = _read_csv(path)
    published = {"data_name", "mask"} <= set(columns)
    names = [composed(name) for name in modalities]
    faults = _column_faults(columns, [] if published else ["case", *names], names)
    if columns and not lines:
        faults.append("has no line below the columns; add a line for each case")
    raise_faults(CaseError, [f"{path}: {fault}" for fault in faults])
    table: dict[str, tuple[bool, ...]] = {}
    for number, cells in lines:
        row = dict(zip(columns, cells, strict=False))
        name = row.get("data_name" if published else "case", "")
        if published:
            mask = _published_mask(row.get("mask", ""), modalities)
        else:
            mask = tuple({"0": False, "1": True}.get(row.get(m, "")) for m in names)
        if not name:
            fault = ": has no name of a case; add it"
        elif len(cells) > len(columns):
            fault = f" ({name}): has {len(cells)} cells for {len(columns)} columns; remove the rest"
        elif mask is None or None in mask or not any(mask):
            fault = f" ({name}): expected 0 or 1 for each of {', '.join(modalities)}; put at least one 1"
        elif name in table:
            fault = f": case {name} occurs twice; keep one line"
        else:
            table[name] = tuple(bool(there) for there in mask)
            continue
        faults.append(f"{path}, line {number}{fault}")
    raise_faults(CaseError, faults)
    return table


def available(cases: Sequence[Case], table: Path | str) -> dict[str, tuple[bool, ...]]:
    """The rows of an availability table that belong to cases, by the names of the cases.

    The published tables put HG_ or LG_, the grade of the glioma, before the names of BraTS 2020.

    Args:
        cases: the cases, at least one. Those that are not in the table are left out.
        table: the CSV file, see ``read_availability``.
    """
    rows = read_availability(table, cases[0].modalities)
    found = {}
    for case in cases:
        name = composed(case.id)
        row = next((rows[n] for n in (name, f"HG_{name}", f"LG_{name}") if n in rows), None)
        if row is not None:
            found[case.id] = row
    return found


def apply_availability(cases: Sequence[Case], table: Path | str) -> list[Case]:
    """Restrict cases to the modalities that an availability table lists as available.

    Args:
        cases: the cases, at least one.
        table: the CSV file, see ``read_availability``.

    Returns:
        The same cases without the hidden files.

    Raises:
        CaseError: a case is not in the table, or the table lists a modality that has no file.
    """
    rows = available(cases, table)
    faults, restricted = [], []
    for case in cases:
        if case.id not in rows:
            faults.append(f"case {case.id}: not in {table}; add a line for it")
            continue
        listed = dict(zip(case.modalities, rows[case.id], strict=True))
        absent = [name for name, there in listed.items() if there and name not in case.files]
        if absent:
            faults.append(
                f"case {case.id}: {table} lists {', '.join(absent)}, but there is no such file; "
                "put 0 there"
            )
        restricted.append(case.restrict(rows[case.id]))
    raise_faults(CaseError, faults)
    return restricted


def drop_modalities(cases: Sequence[Case], rates: Sequence[float], *, seed: int) -> list[Case]:
    """Hide modalities at random, at given missing rates. Files that are absent stay absent.

    Args:
        cases: the cases, at least one.
        rates: missing rate of each of the M modalities, in [0, 1).
        seed: random seed of the draw.

    Returns:
        The same cases without the hidden files.

    Raises:
        CaseError: a case would keep no modality, because the draw hides all files that it has.
        ConfigError, ValueError: see ``draw_availability``.
    """
    drawn = draw_availability(len(cases), rates, seed=seed)
    faults = [
        Fault(
            f"case {case.id}: has only {', '.join(case.files)}, which this draw hides; use an "
            "availability table, lower rates or another seed",
            "table",
            "rates",
            "seed",
        )
        for case, row in zip(cases, drawn, strict=True)
        if not (row & case.availability).any()
    ]
    raise_faults(CaseError, faults)
    return [case.restrict(row) for case, row in zip(cases, drawn, strict=True)]


def _read_csv(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The columns of a CSV file; and each line with its number. Empty lines are left out."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("no regular file")
        with path.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.reader(handle, strict=True)
            rows = [(reader.line_num, [composed(c.strip()) for c in row]) for row in reader]
    except (OSError, ValueError, csv.Error) as error:  # ValueError: not UTF-8, or a NUL in the path
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise CaseError(
            f"{path}: cannot be read as an availability table ({reason}); give a CSV file in UTF-8"
        ) from error
    rows = [(number, row) for number, row in rows if any(row)]
    return (rows[0][1], rows[1:]) if rows else ([], [])


def _column_faults(
    columns: Sequence[str], wanted: Sequence[str], modalities: Sequence[str]
) -> list[str]:
    if not columns or not set(wanted) <= set(columns):
        return [
            f"got the columns {', '.join(columns) or 'none'}; expected case,{','.join(modalities)} or "
            "data_name,mask_id,mask,pos_mask_ids, separated by commas"
        ]
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    return [f"has the column {name} twice; keep one of them" for name in twice]


def _published_mask(text: str, modalities: Sequence[str]) -> tuple[bool | None, ...] | None:
    try:
        mask = json.loads(text.lower())
    except (ValueError, RecursionError):  # ValueError: not JSON, or a number of thousands of digits
        return None
    if not isinstance(mask, list) or len(mask) != len(BRATS) or set(modalities) - set(BRATS):
        return None
    by_name = dict(zip(BRATS, mask, strict=True))
    return tuple(by_name[m] if isinstance(by_name[m], bool) else None for m in modalities)
