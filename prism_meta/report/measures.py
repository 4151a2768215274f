"""What is averaged of records, and records as one array."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from prism_meta.errors import PrismError
from prism_meta.records import Record, index_records


def _relative_volume_error(record: Record) -> float:
    """The volume error as a share of the truth; NaN if the truth is empty."""
    if not record.true_ml > 0:
        return math.nan
    return (record.predicted_ml - record.true_ml) / record.true_ml


#: What is averaged, by the names in ``summary.json``.
MEASURES: Mapping[str, Callable[[Record], float]] = MappingProxyType(
    {
        "dice": lambda record: record.dice,
        "hd95_mm": lambda record: record.hd95,
        "nsd_1mm": lambda record: record.nsd,
        "volume_error_ml": lambda record: record.predicted_ml - record.true_ml,
        "relative_volume_error": _relative_volume_error,
        "true_lesions": lambda record: record.true_lesions,
        "missed_lesions": lambda record: record.missed_lesions,
        "false_lesions": lambda record: record.false_lesions,
    }
)


@dataclass(frozen=True)
class Measurements:
    """All measures of records as one array.

    Args:
        cases: names of the n cases, sorted, so that bootstrap draws do not depend on the records' order.
        subsets: names of the S subsets.
        regions: names of the R regions.
        values: measure -> (n, S, R); NaN where it is undefined, or there is no record.
        measured: bool (n, S, R), where there is a record.
    """

    cases: tuple[str, ...]
    subsets: tuple[str, ...]
    regions: tuple[str, ...]
    values: Mapping[str, NDArray[np.float64]]
    measured: NDArray[np.bool_]

    @classmethod
    def of(
        cls, records: Sequence[Record], *, subset_order: Sequence[str] | None = None
    ) -> Measurements:
        """The measures of ``records``; see ``summarize`` for the arguments and errors.

        Example:
            >>> found = Measurements.of([Record("case1", "t1", "WT", 0.5, 4.0)])
            >>> found.values["dice"].tolist(), found.measured.shape
            ([[[0.5]]], (1, 1, 1))
        """
        table = index_records(records, "records")
        cases, names, regions = (tuple(dict.fromkeys(key[i] for key in table)) for i in range(3))
        if subset_order is not None:
            lost = [name for name in names if name not in subset_order]
            if lost:
                raise PrismError(
                    f"subset_order: lacks {', '.join(lost)}; name every subset measured"
                )
            names = tuple(name for name in subset_order if name in names)
        axes = (tuple(sorted(cases)), names, regions)
        places = [{name: i for i, name in enumerate(axis)} for axis in axes]
        shape = tuple(map(len, axes))
        values = {measure: np.full(shape, np.nan) for measure in MEASURES}
        measured = np.zeros(shape, dtype=bool)
        for key, record in table.items():
            place = tuple(where[name] for where, name in zip(places, key, strict=True))
            measured[place] = True
            for measure, value in MEASURES.items():
                values[measure][place] = value(record)
        return cls(*axes, values, measured)
