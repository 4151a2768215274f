"""Availability tables that cannot be read, or that do not fit the cases."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from broken import Broken, whole

COLUMNS = "case,flair,t1ce,t1,t2\n"
REST = "p1,1,1,1,1\np2,1,1,1,1\n"
PUBLISHED = "data_name,mask_id,mask,pos_mask_ids\n"


def using(write: Callable[[Path], object]) -> Callable[[Path], Sequence[object]]:
    """Train with a table that ``write`` writes."""

    def command(folder: Path) -> Sequence[object]:
        path = folder / "table.csv"
        write(path)
        return whole.train(folder, whole.cases(folder), "--set", f"data.availability='{path}'")

    return command


def content(data: bytes | str) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data.encode() if isinstance(data, str) else data)


UNREADABLE = "table.csv: cannot be read as an availability table ("
NO_COLUMNS = "table.csv: got the columns "
CELLS = (
    "table.csv, line 2 (p0): expected 0 or 1 for each of flair, t1ce, t1, t2; put at least one 1"
)
# What is written, and what is said of it.
CONTENTS: dict[str, tuple[bytes | str, str]] = {
    "empty": ("", NO_COLUMNS + "none"),
    "empty lines": ("\n\n,,,\n", NO_COLUMNS + "none"),
    "only columns": (COLUMNS, "table.csv: has no line below the columns"),
    "no columns": ("p0,1,1,1,1\n" + REST, NO_COLUMNS + "p0, 1, 1, 1, 1"),
    "a modality less": ("case,flair,t1ce,t1\np0,1,1,1\n", NO_COLUMNS + "case, flair, t1ce, t1;"),
    "column twice": ("case,flair,t1ce,t1,t2,t1\np0,1,1,1,1,0\n", "has the column t1 twice"),
    "column of cases twice": ("case,case,flair,t1ce,t1,t2\np0,p0,1,1,1,1\n", "column case twice"),
    "semicolons": (COLUMNS.replace(",", ";") + "p0;1;1;1;1\n", NO_COLUMNS + "case;flair"),
    "tabs": (COLUMNS.replace(",", "\t") + "p0\t1\t1\t1\t1\n", NO_COLUMNS + r"case\tflair"),
    "UTF-16": ((COLUMNS + "p0,1,1,1,1\n" + REST).encode("utf-16"), UNREADABLE),
    "UTF-16 without mark": ((COLUMNS + "p0,1,1,1,1\n").encode("utf-16-le"), "table.csv: "),
    "latin-1": (COLUMNS.encode() + "Jos\u00e9,1,1,1,1\n".encode("latin-1"), UNREADABLE),
    "an archive": (b"PK\x03\x04\xff\xfe", UNREADABLE),
    "zeros": (bytes(3000), "table.csv: "),
    "noise": (bytes(range(256)) * 8, UNREADABLE),
    "an open quote": (COLUMNS + 'p0,1,1,1,"1\n', UNREADABLE),
    "text after a quote": (COLUMNS + '"p0"x,1,1,1,1\n', UNREADABLE),
    "an endless cell": (COLUMNS + "x" * 200_000 + ",1,1,1,1\n", UNREADABLE),
    "an endless line": (
        COLUMNS + "p0" + ",1" * 5000 + "\n" + REST,
        "line 2 (p0): has 5001 cells for 5",
    ),
    "a cell more": (COLUMNS + "p0,1,1,1,1,1\n" + REST, "line 2 (p0): has 6 cells for 5 columns"),
    "a cell less": (COLUMNS + "p0,1,1,1\n" + REST, CELLS),
    "only a name": (COLUMNS + "p0\n" + REST, CELLS),
    "no name": (COLUMNS + ",1,1,1,1\n" + REST, "table.csv, line 2: has no name of a case"),
    "case twice": (COLUMNS + "p0,1,1,1,1\np0,1,1,1,1\n" + REST, "line 3: case p0 occurs twice"),
    "case that is not listed": (COLUMNS + REST, "case p0: not in "),
    "cell of 2": (COLUMNS + "p0,2,1,1,1\n" + REST, CELLS),
    "cell of -1": (COLUMNS + "p0,-1,1,1,1\n" + REST, CELLS),
    "cell of 0.5": (COLUMNS + "p0,0.5,1,1,1\n" + REST, CELLS),
    "cell of nan": (COLUMNS + "p0,nan,1,1,1\n" + REST, CELLS),
    "cell of yes": (COLUMNS + "p0,yes,1,1,1\n" + REST, CELLS),
    "cell of code": (COLUMNS + "p0,__import__('os'),1,1,1\n" + REST, CELLS),
    "empty cell": (COLUMNS + "p0,,1,1,1\n" + REST, CELLS),
    "no modality": (COLUMNS + "p0,0,0,0,0\n" + REST, CELLS),
    "mask too short": (PUBLISHED + 'p0,1,"[True, True]",[1]\n', CELLS),
    "mask too long": (PUBLISHED + 'p0,1,"[True, True, True, True, True]",[1]\n', CELLS),
    "mask of numbers": (PUBLISHED + 'p0,1,"[1, 1, 1, 1]",[1]\n', CELLS),
    "mask of code": (PUBLISHED + "p0,1,exit(),[1]\n", CELLS),
    "mask of brackets": (PUBLISHED + f"p0,1,{'[' * 100_000},[1]\n", CELLS),
    "mask of digits": (PUBLISHED + f"p0,1,{'9' * 5000},[1]\n", CELLS),
    "no mask": (PUBLISHED + "p0,1\n", CELLS),
    "mask of nothing": (PUBLISHED + 'p0,1,"[false, false, false, false]",[1]\n', CELLS),
}
PLACES: dict[str, Callable[[Path], object]] = {
    "no file": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a link to nothing": lambda path: path.symlink_to("lost"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}


def _absent_file(folder: Path) -> Sequence[object]:
    command = using(content(COLUMNS + "p0,1,1,1,1\n" + REST))(folder)
    (folder / "cases" / "p0" / "p0_t2.nii.gz").unlink()
    return command


BROKEN = [
    *(Broken(f"table: {n}", using(content(c)), (said,)) for n, (c, said) in CONTENTS.items()),
    *(Broken(f"table: {n}", using(write), (UNREADABLE,)) for n, write in PLACES.items()),
    Broken(
        "table: a modality without file", _absent_file, ("case p0: ", "lists t2, but there is no")
    ),
]
