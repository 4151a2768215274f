"""The table of a folder of predicted labels: one row per case, with the volume of each region."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from prism_meta.data.cases import Case
from prism_meta.errors import OutputError
from prism_meta.files import atomic
from prism_meta.records import escape_cell

#: Name of the table. A folder that holds it is an output, which the search for cases skips.
TABLE = "predictions.csv"


class PredictionTable:
    """``predictions.csv`` in a folder of label volumes: case, file, subset, and ml per region.

    Rows of an earlier call are kept, unless a row of the same case replaces them.

    Args:
        folder: folder of the label volumes. It need not exist yet.
        regions: names of the regions.
        more: names of further columns.

    Raises:
        OutputError: there is a table that cannot be read, or of other columns.

    Example:
        >>> import tempfile
        >>> table = PredictionTable(Path(tempfile.mkdtemp()), ["WT"])
        >>> table.add("p1", subset="flair+t1", volumes={"WT": 12.5})
        >>> print(table.path.read_text().strip())
        case,file,subset,WT_ml
        p1,p1.nii.gz,flair+t1,12.500
    """

    def __init__(self, folder: Path, regions: Sequence[str], more: Sequence[str] = ()) -> None:
        self.path = folder / TABLE
        volumes = (escape_cell(f"{r}_ml") for r in regions)
        self.header = ["case", "file", "subset", *volumes, *more]
        self._rows = self._read()

    def label_file(self, case: str) -> Path:
        """The file of a case's labels."""
        return self.path.with_name(f"{case}.nii.gz")

    def faults(self, case: Case, more: Sequence[Path] = ()) -> list[str]:
        """What keeps the labels of a case from being written. Neither its own files are replaced, nor
        any file in a folder that has no table yet.

        Args:
            case: the case.
            more: further files that are written for it.
        """
        return [
            fault
            for file in (self.label_file(case.id), *more)
            for fault in self._file_faults(case, file)
        ]

    def _file_faults(self, case: Case, file: Path) -> list[str]:
        another = "or give another OUT"
        try:
            file.lstat()
        except FileNotFoundError:
            return []
        except OSError as error:  # the name or the path is too long, for example
            reason = (error.strerror or str(error)).lower()
            return [
                f"case {case.id}: cannot write {file}: {reason}; give its folder a shorter name"
            ]
        if file.is_dir():
            return [f"case {case.id}: cannot write {file}: is a directory; remove it, {another}"]
        if not self.path.exists() or file.resolve() in {
            path.resolve() for path in case.files.values()
        }:
            return [
                f"case {case.id}: {file} exists, and is no output of predict; move it away, {another}"
            ]
        return []

    def has(self, case: str, *, subset: str) -> bool:
        """Whether there is a row of this case, predicted from this subset."""
        row = self._rows.get(escape_cell(case))
        return row is not None and row[2] == escape_cell(subset)

    def add(
        self, case: str, *, subset: str, volumes: Mapping[str, float], more: Sequence[str] = ()
    ) -> None:
        """Add the row of a case, or replace it, and write the table.

        Args:
            case: name of the case.
            subset: name of the subset that the labels were predicted from.
            volumes: region -> ml, in the order of the columns.
            more: the cells of the further columns.

        Raises:
            OutputError: the table cannot be written.
        """
        name = escape_cell(case)
        row = [name, escape_cell(self.label_file(case).name), escape_cell(subset)]
        self._rows[name] = [
            *row,
            *(f"{ml:.3f}" for ml in volumes.values()),
            *map(escape_cell, more),
        ]
        with atomic(self.path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([self.header, *self._rows.values()])

    def _read(self) -> dict[str, list[str]]:
        fix = "move it away, or give another OUT"
        try:
            with self.path.open(newline="", encoding="utf-8-sig") as file:
                header, *rows = csv.reader(file)
        except FileNotFoundError:
            return {}
        except (
            NotADirectoryError
        ):  # the folder is a file, which whoever makes the folder says better
            return {}
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise OutputError(f"cannot read {self.path}: {reason}; {fix}") from error
        except (ValueError, csv.Error) as error:  # no line at all, or not UTF-8
            raise OutputError(f"{self.path}: is no table of predictions; {fix}") from error
        if header != self.header or any(len(row) != len(header) for row in rows):
            raise OutputError(
                f"{self.path}: has the columns {','.join(header)}, expected {','.join(self.header)}, "
                f"those of this run; {fix}"
            )
        return {row[0]: row for row in rows}
