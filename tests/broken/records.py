"""Files of records that ``compare`` cannot read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from broken import Broken
from prism_meta.records import HEADER, Record, write_records

_HEADER = ",".join(HEADER).encode()
_LINE = b"p0,t1,WT,0.5,1.0,0.25,1.5,2.5,3,2,1,90.5\n"
#: What follows the first five columns.
_REST = b",1,1,1,1,1,1,1\n"

#: Contents, and what is said of them.
CONTENTS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("line 1", "expected 'case,subset")),
    "only the header": (_HEADER + b"\n", ("no records",)),
    "no header": (_LINE * 2, ("line 1",)),
    "semicolons": (_HEADER.replace(b",", b";") + b"\n" + _LINE.replace(b",", b";"), ("line 1",)),
    "tabs": (_HEADER.replace(b",", b"\t") + b"\n", ("line 1",)),
    "a column twice": (b"case," + _HEADER + b"\n", ("line 1",)),
    "a column less": (_HEADER.replace(b",dice", b"") + b"\n", ("line 1", "give a records.csv")),
    "an older version": (
        b"case,subset,region,dice,hd95_mm\np0,t1,WT,0.5,1\n", ("line 1", "evaluate the run again"),
    ),
    "columns in another order": (_HEADER.replace(b"case,subset", b"subset,case") + b"\n", ("line 1",)),
    "columns of another case": (_HEADER.upper() + b"\n" + _LINE, ("line 1",)),
    "UTF-16": ("case,subset\n".encode("utf-16"), ("line 1", "UTF-8")),
    "latin-1": (_HEADER + b"\n" + _LINE + b"\xe4,t1,WT,1,1" + _REST, ("line 3", "UTF-8")),
    "an image": (bytes(range(256)) * 9, ("UTF-8",)),
    "zeros": (bytes(5000), ("line 1",)),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(60), ("UTF-8",)),
    "cut off": (_HEADER + b"\n" + _LINE + b"p1,t1,WT,0.5,1", ("line 3", "cut off")),
    "cut off in a quotation": (_HEADER + b'\n"p1,t1,WT,0.5,1' + _REST, ("line",)),
    "an endless cell": (_HEADER + b"\n" + b"x" * 200_000 + b",t1,WT,1,1\n", ("line 2", "field limit")),
    "a record twice": (_HEADER + b"\n" + _LINE * 2, ("line 3", "those of line 2")),
    "two bad lines": (
        _HEADER + b"\np0,t1,WT,2,1" + _REST + b"p1,t1,WT,1,-1" + _REST,
        ("line 2: dice", "line 3: hd95_mm"),
    ),
    "JSON": (b'[{"case": "p0"}]\n', ("line 1",)),
    "HTML": (b"<html><body>404</body></html>\n", ("line 1",)),
}  # fmt: skip
#: Cells that a column cannot hold.
CELLS = {
    "case": ("",),
    "subset": ("",),
    "region": ("",),
    "dice": ("", "good", "-0.1", "1.1", "inf", "-inf", "0_5", "0,5", "50 %", "1e999", "=1/2", "None"),
    "hd95_mm": ("", "far", "-1", "inf", "-inf", "1_0", "3 mm", "1e999", "None"),
    "nsd_1mm": ("", "1.5", "-1"),
    "predicted_ml": ("", "-1", "inf"),
    "missed_lesions": ("", "-1", "0.5", "inf"),
    "diagonal_mm": ("", "-1", "1_0"),
}  # fmt: skip


def _compare(content: bytes) -> Callable[[Path], Sequence[object]]:
    def command(folder: Path) -> Sequence[object]:
        write_records(folder / "good.csv", [Record("p0", "t1", "WT", 0.5, 1.0)])
        (folder / "bad.csv").write_bytes(content)
        return ["compare", folder / "good.csv", folder / "bad.csv"]

    return command


def _cell(column: str, value: str) -> bytes:
    cells = dict(zip(_HEADER.decode().split(","), _LINE.decode().strip().split(","), strict=True))
    row = ",".join(f'"{cell}"' for cell in {**cells, column: value}.values())
    return _HEADER + b"\nother,t1,WT,1,1" + _REST + f"{row}\n".encode()


def _other(a: Record, b: Record) -> Callable[[Path], Sequence[object]]:
    def command(folder: Path) -> Sequence[object]:
        for name, record in (("a.csv", a), ("b.csv", b)):
            write_records(folder / name, [record])
        return ["compare", folder / "a.csv", folder / "b.csv"]

    return command


def _folder(folder: Path) -> Sequence[object]:
    (folder / "records.csv").mkdir()
    return ["compare", folder, folder]


def _absent(folder: Path) -> Sequence[object]:
    return ["compare", folder / "none.csv", folder / "none.csv"]


def _empty_folder(folder: Path) -> Sequence[object]:
    return ["compare", folder, folder]


_FIRST = Record("p0", "t1", "WT", 0.5, 1.0)
BROKEN = [
    *(Broken(f"records: {n}", _compare(content), says) for n, (content, says) in CONTENTS.items()),
    *(
        Broken(f"records: {column} {value!r}", _compare(_cell(column, value)), ("bad.csv, line 3: ", column))
        for column, values in CELLS.items()
        for value in values
    ),
    Broken("records of another case", _other(_FIRST, Record("p1", "t1", "WT", 0.5, 1)), ("share no case",)),
    Broken("records of another subset", _other(_FIRST, Record("p0", "t2", "WT", 0.5, 1)), ("modalities",)),
    Broken("records of another region", _other(_FIRST, Record("p0", "t1", "ET", 0.5, 1)), ("regions",)),
    Broken("a folder named records.csv", _folder, ("records.csv", "directory")),
    Broken("absent records", _absent, ("none.csv", "no such file")),
    Broken("a folder without records", _empty_folder, ("no records.csv here", "evaluate")),
]  # fmt: skip
