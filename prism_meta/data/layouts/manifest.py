"""A manifest: a table in CSV or JSON that lists the files of each case."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_meta.data.layouts.base import (
    Found,
    Layout,
    build_case,
    is_folder,
    name_faults,
    only_once,
)
from prism_meta.data.layouts.dataset_json import read_json
from prism_meta.data.layouts.names import FileNames
from prism_meta.errors import CaseError, Fault, one_line, raise_faults
from prism_meta.modalities import composed

#: Names of a manifest in a folder of cases.
MANIFESTS = ("manifest.csv", "manifest.json")
_CASE, _LABEL, _SITE, _PATIENT = "case", "label", "site", "patient"
_FIX = "or leave it empty, because a missing modality is allowed"


@dataclass(frozen=True)
class _Row:
    """One case of a manifest: where it stands, for messages, and what it says by column."""

    where: str
    cells: Mapping[str, str]


class Manifest(Layout):
    """A CSV file with the columns ``case``, a path per modality, ``label``, ``site`` and ``patient``.

    Only ``case`` and one modality are needed, and an empty cell is a missing modality. Paths start at the
    folder of the manifest. A JSON file has the same as a list of objects, by itself or as ``cases``.
    Other columns are not used. The manifest is given instead of a folder of cases, or lies in it as
    ``manifest.csv`` or ``manifest.json``.
    """

    name = "manifest"
    title = "manifest"

    def matches(self, root: Path, names: FileNames) -> bool:
        if root.suffix.lower() in (".csv", ".json") and not is_folder(root):
            return True
        return is_folder(root) and any((root / name).exists() for name in MANIFESTS)

    def find(self, root: Path, names: FileNames) -> Found:
        found = Found(self.title, kind="columns")
        path = root
        if is_folder(root):
            path = next((root / n for n in MANIFESTS if (root / n).exists()), root / MANIFESTS[0])
        try:
            rows = _json_rows(path) if path.suffix.lower() == ".json" else _csv_rows(path)
            columns = _columns(path, rows, names, found)
        except CaseError as error:
            found.faults.extend(error.faults)
            return found
        counts: Counter[str] = Counter()
        for row in rows:
            name = composed(row.cells.get(_CASE, ""))
            if not name:
                found.faults.append(f"{row.where}: has no name of a case, expected one; add it")
                continue
            counts[name] += 1
            _add(row, name, columns, names, path.parent, found)
        only_once(found, counts, f"lines of this name in {path}; keep one, or rename the others")
        found.cases.sort(key=lambda case: case.id)
        return found


def _add(
    row: _Row, name: str, columns: Mapping[str, str], names: FileNames, base: Path, found: Found
) -> None:
    """Add the case of one row, or its faults."""
    faults = [] if not name_faults(name) else name_faults(name, f"its name in {row.where}")
    owned: dict[str, list[Path]] = {}
    for column, key in columns.items():
        cell = row.cells.get(column, "")
        if cell:
            path = base / _expanded(cell)
            fix = "add the file" if key == names.label else _FIX
            if not _exists(path):
                faults.append(
                    f"{row.where} (case {name}): {column} is {cell}, but there is no such file; correct "
                    f"the path, {fix}"
                )
            owned.setdefault(key, []).append(path)
    paths = Counter(path for listed in owned.values() for path in listed)
    faults.extend(
        f"{row.where} (case {name}): lists {path.name} {count} times, expected a file for each column; "
        "correct the paths"
        for path, count in paths.items()
        if count > 1
    )
    if not any(key in owned for key in names.modalities):
        faults.append(
            f"{row.where} (case {name}): no modality, expected a file for one of "
            f"{', '.join(names.modalities)}; add one or remove the line"
        )
    if faults:
        found.faults.extend(faults)
        return
    site, patient = row.cells.get(_SITE) or None, row.cells.get(_PATIENT) or ""
    found.add(*build_case(name, names, owned, site=site, patient=patient))


def _columns(path: Path, rows: Sequence[_Row], names: FileNames, found: Found) -> dict[str, str]:
    """Column -> modality or label.

    Raises:
        CaseError: there is no column of cases, none of a modality, or two of the same.
    """
    listed = list(dict.fromkeys(column for row in rows for column in row.cells))
    owned: dict[str, str] = {}
    for column in listed:
        if column in (_CASE, _SITE, _PATIENT):
            continue
        key = names.label if column == _LABEL and names.label else names.owner(column)
        if key is None:
            found.others[column] += 1
        else:
            owned[column] = key
    shown = ", ".join(listed) or "none"
    faults: list[Fault] = []
    if _CASE not in listed:
        message = (
            f"has the columns {shown}, expected one called case; name the column of the cases so, and "
            "separate columns by commas"
        )
        faults.append(Fault(message))
    if not set(owned.values()) & set(names.modalities):
        message = (
            f"has the columns {shown}, expected one for each of {', '.join(names.modalities)}; name the "
            "modalities so, or give patterns"
        )
        faults.append(Fault(message, "modalities", "files"))
    for key, count in Counter(owned.values()).items():
        if count > 1:
            same = ", ".join(column for column, other in owned.items() if other == key)
            faults.append(
                Fault(
                    f"the columns {same} all mean {key}, expected one; remove the others", "files"
                )
            )
    raise_faults(CaseError, [fault.prefixed(str(path)) for fault in faults])
    return owned


def _csv_rows(path: Path) -> list[_Row]:
    try:
        if path.exists() and not path.is_file():
            raise OSError("no regular file")
        with path.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.reader(handle, strict=True)
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except (OSError, ValueError, csv.Error) as error:  # ValueError: not UTF-8, or a NUL in the path
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise CaseError(
            f"{path}: cannot be read as a manifest ({reason}); give a CSV file in UTF-8"
        ) from error
    lines = [(number, cells) for number, cells in lines if any(cells)]
    if len(lines) < 2:
        raise CaseError(
            f"{path}: has {'no line below the columns' if lines else 'no columns'}, expected a line for "
            "each case; add them"
        )
    columns = [_column(name) for name in lines[0][1]]
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    faults = [f"{path}: has the column {name} twice; keep one of them" for name in twice]
    faults += [
        f"{path}, line {number}: has {len(cells)} cells for {len(columns)} columns; remove the rest, or "
        "put paths with commas in quotes"
        for number, cells in lines[1:]
        if len(cells) > len(columns)
    ]
    raise_faults(CaseError, faults)
    return [
        _Row(
            f"{path}, line {number}",
            {c: cell for c, cell in zip(columns, cells, strict=False) if c},
        )
        for number, cells in lines[1:]
    ]


def _json_rows(path: Path) -> list[_Row]:
    content = read_json(path, "a manifest")
    rows = content.get("cases") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not rows:
        raise CaseError(
            f'{path}: has no list of cases, expected [{{"case": "p1", "t1": "p1/t1.nii.gz"}}]; write it so'
        )
    faults, found = [], []
    for number, row in enumerate(rows, start=1):
        where = f"{path}, entry {number}"
        if not isinstance(row, dict):
            faults.append(f"{where}: is no object, expected a case and its files; correct it")
            continue
        cells: dict[str, Any] = {_column(key): value for key, value in row.items()}
        wrong = [
            key
            for key, value in cells.items()
            if not (value is None or isinstance(value, (str, int)))
        ]
        wrong += [key for key, value in cells.items() if isinstance(value, bool)]
        wrong += [
            key for key, value in cells.items()
            if isinstance(value, str) and one_line(value) != value
        ]  # fmt: skip
        faults += [
            f"{where}: {key} is {str(cells[key])[:60]!r}, expected a path or a name in quotes; correct it"
            for key in wrong
        ]
        found.append(
            _Row(where, {k: "" if v is None else str(v).strip() for k, v in cells.items()})
        )
    raise_faults(CaseError, faults)
    return found


def _column(name: str) -> str:
    """The name of a column; those that are not modalities do not depend on upper and lower case."""
    name = composed(name.strip())
    return name.lower() if name.lower() in (_CASE, _LABEL, _SITE, _PATIENT) else name


def _expanded(cell: str) -> Path:
    try:
        return Path(cell).expanduser()
    except RuntimeError:  # a user who has no home
        return Path(cell)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # the path is too long, or has a NUL
        return False
