"""Records: one measurement each. They are written to and read from CSV files."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
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
        nsd: normalised surface Dice at a tolerance of 1 mm, in [0, 1]; NaN if it is undefined.
        predicted_ml: volume of the prediction in ml; 0 if it is empty.
        true_ml: volume of the truth in ml; 0 if it is empty.
        true_lesions: number of lesions of the truth; see ``prism_meta.evaluation.lesions``.
        missed_lesions: number of them that the prediction does not touch.
        false_lesions: number of lesions of the prediction that touch no lesion of the truth.
        diagonal: of the whole volume, in mm, which is the HD95 of an empty mask for some.

    The numbers after ``hd95`` default to NaN, not measured.

    Example:
        >>> Record("case1", "flair+t1ce", "WT", 0.9, 3.5).dice
        0.9
    """

    case: str
    subset: str
    region: str
    dice: float
    hd95: float
    nsd: float = math.nan
    predicted_ml: float = math.nan
    true_ml: float = math.nan
    true_lesions: float = math.nan
    missed_lesions: float = math.nan
    false_lesions: float = math.nan
    diagonal: float = math.nan


#: Columns of the CSV file.
HEADER: tuple[str, ...] = (
    "case", "subset", "region", "dice", "hd95_mm", "nsd_1mm", "predicted_ml", "true_ml", "true_lesions",
    "missed_lesions", "false_lesions", "diagonal_mm",
)  # fmt: skip
#: Columns of shares, which are at most 1.
_SHARES = ("dice", "nsd_1mm")
#: Columns of whole numbers.
_COUNTS = ("true_lesions", "missed_lesions", "false_lesions")

#: A wrong separator makes every line invalid. More messages than this would not help.
_MAX_FAULTS = 10
#: No evaluation writes as much as this, in bytes.
_LONGEST = 2**28
#: Longest quotation of a cell, in characters.
_SHOWN = 80
#: First characters of a cell that a spreadsheet computes.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
_RESTORE = "restore the file or evaluate again"


def write_records(path: Path | str, records: Sequence[Record]) -> None:
    """Write records to a CSV file with the columns of ``HEADER``.

    NaN is written as ``nan``. A name that a spreadsheet would compute, e.g. ``=1+1``, gets an apostrophe in
    front, which ``read_records`` removes.

    Args:
        path: the CSV file; an existing file is replaced.
        records: the records to write, in this order.

    Raises:
        OutputError: the file cannot be written. An existing file is then kept.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "records.csv"
        >>> write_records(path, [Record("case1", "flair+t1", "WT", 0.875, 2.0)])
        >>> [(record.case, record.dice, record.nsd) for record in read_records(path)]
        [('case1', 0.875, nan)]
    """
    with atomic(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        for r in records:
            names, numbers = astuple(r)[:3], astuple(r)[3:]
            cells = (
                f"{number:.0f}" if column in _COUNTS else number
                for column, number in zip(HEADER[3:], numbers, strict=True)
            )
            writer.writerow((*map(escape_cell, names), *cells))


def read_records(path: Path | str) -> list[Record]:
    """Read a CSV file that ``write_records`` wrote.

    Args:
        path: the file.

    Returns:
        The records in the order of the file.

    Raises:
        PrismError: the file cannot be read, or has invalid lines (all of them, with line numbers).
    """
    path = Path(path)
    reader = csv.reader(io.StringIO(_text(path), newline=""))
    records: list[Record] = []
    faults: list[str] = []
    lines: dict[tuple[str, str, str], int] = {}
    try:
        header = next(reader, [])
        if tuple(header) != HEADER:
            fix = "give a records.csv that an evaluation wrote"
            if header and tuple(header) == HEADER[: len(header)]:
                fix = "it is of an older version, so evaluate the run again"
            raise PrismError(
                f"{path}, line 1: got {','.join(header)[:_SHOWN]!r}, expected {','.join(HEADER)!r}; {fix}"
            )
        for row in filter(None, reader):
            try:
                record = _record(row)
                key = (record.case, record.subset, record.region)
                first = lines.setdefault(key, reader.line_num)
                if first != reader.line_num:
                    raise ValueError(f"case, subset and region are those of line {first}")
                records.append(record)
            except ValueError as error:
                faults.append(f"{path}, line {reader.line_num}: {error}; {_RESTORE}")
    except csv.Error as error:
        raise PrismError(f"{path}, line {reader.line_num}: {error}; {_RESTORE}") from error
    if len(faults) > _MAX_FAULTS:
        more = len(faults) - _MAX_FAULTS
        faults[_MAX_FAULTS:] = [f"{path}: and {more} more invalid lines; {_RESTORE}"]
    raise_faults(PrismError, faults)
    return records


def _text(path: Path) -> str:
    """The content of the file, which is complete and UTF-8."""
    wanted = "give a records.csv that an evaluation wrote"
    try:
        with path.open("rb") as file:
            content = file.read(_LONGEST + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise PrismError(f"cannot read {path}: {reason}; {wanted}") from error
    if len(content) > _LONGEST:
        raise PrismError(f"{path}: has more than {_LONGEST} bytes; {wanted}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise PrismError(f"{path}, line {line}: {error}; give a CSV file in UTF-8") from error
    if text and not text.endswith(("\n", "\r")):
        line = content.count(b"\n") + 1
        raise PrismError(
            f"{path}, line {line}: ends without a line break, as a file does that was cut off; {_RESTORE}"
        )
    return text


def _record(row: Sequence[str]) -> Record:
    if len(row) != len(HEADER):
        raise ValueError(f"got {len(row)} values, expected {len(HEADER)}: {', '.join(HEADER)}")
    for name, text in zip(HEADER[:3], row[:3], strict=True):
        if not text:
            raise ValueError(f"{name} is empty, expected a name")
    numbers = []
    for name, text in zip(HEADER[3:], row[3:], strict=True):
        try:
            number = float(text if "_" not in text else "")
        except ValueError:
            raise ValueError(f"{name} is {text[:_SHOWN]!r}, expected a number or nan") from None
        maximum = 1.0 if name in _SHARES else math.inf
        whole = name not in _COUNTS or math.isnan(number) or number % 1 == 0
        if math.isinf(number) or number < 0 or number > maximum or not whole:
            raise ValueError(f"{name} is {text[:_SHOWN]}, expected {_expected(name)}, or nan")
        numbers.append(number)
    case, subset, region = map(_unescaped, row[:3])
    return Record(case, subset, region, *numbers)


def _expected(name: str) -> str:
    if name in _SHARES:
        return "a number in [0, 1]"
    if name in _COUNTS:
        return "a whole number, 0 or more"
    return f"a number in {name.rpartition('_')[2]}, 0 or more"


def _is_formula(text: str) -> bool:
    """Whether a spreadsheet would compute a cell with this text, without the apostrophes before it."""
    return text.lstrip("'").startswith(_FORMULA)


def escape_cell(text: str) -> str:
    """A cell of a CSV file that a spreadsheet does not compute: an apostrophe comes before a formula.

    Example:
        >>> escape_cell("=1+1"), escape_cell("p1")
        ("'=1+1", 'p1')
    """
    return f"'{text}" if _is_formula(text) else text


def _unescaped(text: str) -> str:
    return text[1:] if text.startswith("'") and _is_formula(text) else text


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
