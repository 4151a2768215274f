"""Records: one measurement each. They are written to and read from CSV files."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prism_meta.errors import PrismError, raise_faults
from prism_meta.files import atomic


@dataclass(frozen=True)
class Record:
    """One measurement: the prediction of one case from one subset of modalities, in one region.

    The arguments are in the order of the columns of the CSV file.

    Args:
        case: name of the case.
        subset: name of the subset, e.g. ``flair+t1ce``.
        region: name of the region, e.g. ``WT``.
        dice: Dice coefficient in [0, 1]; NaN if it is undefined (empty masks).
        hd95: 95th percentile of the symmetric surface distance in mm; NaN if it is undefined.

    Example:
        >>> Record("case1", "flair+t1ce", "WT", 0.9, 3.5).dice
        0.9
    """

    case: str
    subset: str
    region: str
    dice: float
    hd95: float


#: Columns of the CSV file.
HEADER: tuple[str, ...] = ("case", "subset", "region", "dice", "hd95_mm")

#: A wrong separator makes every line invalid. More messages than this would not help.
_MAX_FAULTS = 10


def write_records(path: Path | str, records: Sequence[Record]) -> None:
    """Write records to a CSV file with the columns ``case,subset,region,dice,hd95_mm``.

    NaN is written as ``nan``.

    Args:
        path: the CSV file; an existing file is replaced.
        records: the records to write, in this order.

    Raises:
        OutputError: the file cannot be written. An existing file is then kept.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "records.csv"
        >>> write_records(path, [Record("case1", "flair+t1", "WT", 0.875, 2.0)])
        >>> read_records(path)
        [Record(case='case1', subset='flair+t1', region='WT', dice=0.875, hd95=2.0)]
    """
    with atomic(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        writer.writerows((r.case, r.subset, r.region, r.dice, r.hd95) for r in records)


def read_records(path: Path | str) -> list[Record]:
    """Read a CSV file that ``write_records`` wrote.

    Raises:
        PrismError: the file cannot be read, or has invalid lines (all of them, with line numbers).
    """
    path, records, faults = Path(path), [], []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            if tuple(header) != HEADER:
                raise PrismError(
                    f"{path}, line 1: got {','.join(header)!r}, expected {','.join(HEADER)!r}; "
                    "give a records.csv that an evaluation wrote"
                )
            for row in filter(None, reader):
                try:
                    records.append(_record(row))
                except ValueError as error:
                    faults.append(f"{path}, line {reader.line_num}: {error}")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise PrismError(
            f"cannot read {path}: {reason}; give a records.csv that an evaluation wrote"
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise PrismError(f"{path}: {error}; give a CSV file in UTF-8") from error
    if len(faults) > _MAX_FAULTS:
        faults[_MAX_FAULTS:] = [f"{path}: and {len(faults) - _MAX_FAULTS} more invalid lines"]
    raise_faults(PrismError, faults)
    return records


def _record(row: Sequence[str]) -> Record:
    if len(row) != len(HEADER):
        raise ValueError(f"got {len(row)} values, expected {len(HEADER)}: {', '.join(HEADER)}")
    numbers = []
    for name, text, maximum in zip(HEADER[3:], row[3:], (1.0, math.inf), strict=True):
        try:
            number = float(text)
        except ValueError:
            raise ValueError(f"{name} is {text!r}, expected a number or nan") from None
        if math.isinf(number) or number < 0 or number > maximum:
            wanted = "in [0, 1]" if maximum == 1 else "in mm, 0 or more"
            raise ValueError(f"{name} is {text}, expected a number {wanted}, or nan")
        numbers.append(number)
    return Record(row[0], row[1], row[2], *numbers)


def index_records(records: Sequence[Record], name: str) -> dict[tuple[str, str, str], Record]:
    """Index records by (case, subset, region).

    Args:
        records: the records.
        name: name of the argument that holds them; messages use it.

    Raises:
        PrismError: there are no records, or two of the same case, subset and region.
    """
    if not records:
        raise PrismError(f"{name}: got no records, expected at least one; evaluate a case first")
    table = {(r.case, r.subset, r.region): r for r in records}
    if len(table) < len(records):
        seen: set[tuple[str, str, str]] = set()
        for record in records:
            key = (record.case, record.subset, record.region)
            if key in seen:
                raise PrismError(
                    f"{name}: case {key[0]}, subset {key[1]}, region {key[2]} occurs twice; "
                    "give each case its own name"
                )
            seen.add(key)
    return table


def nan_to_none(value: float) -> float | None:
    """Return None for NaN, which JSON cannot represent."""
    return None if math.isnan(value) else value
