"""What a survey says of a data set: of each case, and of all of them."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, asdict, dataclass, field
from itertools import combinations
from typing import Any


@dataclass(frozen=True)
class Spread:
    """The smallest, the median and the largest of some numbers.

    Example:
        >>> Spread.of([3.0, 1.0, 8.0])
        Spread(min=1.0, median=3.0, max=8.0)
    """

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, numbers: Iterable[float]) -> Spread:
        """The spread of at least one number."""
        listed = list(numbers)
        return cls(min(listed), statistics.median(listed), max(listed))


@dataclass(frozen=True)
class CaseSurvey:
    """What one case has. What could not be read, or was not, is None or absent.

    Args:
        id: name of the case.
        patient: whose case it is.
        site: where it comes from; None if unknown.
        modalities: those that training shows: that have a file, after ``data.availability`` and
            ``data.missing_rates``.
        label: whether there is a label file.
        usable: whether the case itself has no fault.
        shape: (D, H, W) of its files.
        spacing: voxel size in mm along the same axes.
        slice_axis: the axis that its slices are stacked along, 0 to 2; see ``data.axes.slice_axis``.
        classes: class -> ml.
        regions: region -> ml.
        intensities: modality -> smallest and largest voxel, of all modalities that have a file.
    """

    id: str
    _: KW_ONLY
    patient: str
    site: str | None
    modalities: tuple[str, ...]
    label: bool
    usable: bool = True
    shape: tuple[int, int, int] | None = None
    spacing: tuple[float, ...] | None = None
    slice_axis: int | None = None
    classes: Mapping[str, float] = field(default_factory=dict)
    regions: Mapping[str, float] = field(default_factory=dict)
    intensities: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def volumes(self) -> dict[str, float]:
        """Class or region -> ml."""
        return {**self.classes, **self.regions}


@dataclass(frozen=True)
class Survey:
    """What a data set has, and its faults. See ``survey``.

    Args:
        layout: how the cases lie on disk, e.g. "BIDS".
        modalities: names of the M modalities, in the model's order.
        cases: sorted by name; also those with faults, as far as they could be read.
        faults: one message per fault, each with its fix.
        notes: what is odd, but no fault.
        voxels: whether the voxels were read, or only the headers.
    """

    layout: str
    _: KW_ONLY
    modalities: tuple[str, ...]
    cases: tuple[CaseSurvey, ...]
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    voxels: bool = True

    @property
    def counts(self) -> dict[str, int]:
        """Modality -> number of cases that have it."""
        return {m: sum(m in case.modalities for case in self.cases) for m in self.modalities}

    @property
    def missing_rates(self) -> dict[str, float]:
        """Modality -> share of cases that lack it; empty without cases."""
        total = len(self.cases)
        return {m: 1 - count / total for m, count in self.counts.items()} if total else {}

    @property
    def subsets(self) -> dict[tuple[str, ...], int]:
        """Set of modalities -> number of cases that have these and no others; the most frequent first."""
        return dict(Counter(case.modalities for case in self.cases).most_common())

    @property
    def never_together(self) -> list[tuple[str, ...]]:
        """The smallest sets of modalities that no case has all of, although each of them occurs.

        Example:
            >>> cases = (
            ...     CaseSurvey(name, patient=name, site=None, modalities=shown, label=True)
            ...     for name, shown in (("a", ("t1", "t2")), ("b", ("flair", "t2")))
            ... )
            >>> Survey("x", modalities=("flair", "t1", "t2"), cases=tuple(cases)).never_together
            [('flair', 't1')]
        """
        seen = [set(subset) for subset in self.subsets]
        there = [m for m, count in self.counts.items() if count]
        never: list[tuple[str, ...]] = []
        if any(len(subset) == len(there) for subset in seen):
            return never
        for size in range(2, len(there) + 1):
            for chosen in combinations(there, size):
                known = any(set(smaller) <= set(chosen) for smaller in never)
                if not known and not any(set(chosen) <= subset for subset in seen):
                    never.append(chosen)
        return never

    @property
    def sites(self) -> dict[str | None, int]:
        """Site -> number of cases; None are those whose site is unknown."""
        return dict(Counter(case.site for case in self.cases).most_common())

    @property
    def patients(self) -> int:
        """Number of patients."""
        return len({case.patient for case in self.cases})

    @property
    def volumes(self) -> dict[str, Spread]:
        """Class or region -> ml over the cases whose labels were read."""
        return _spreads(case.volumes for case in self.cases)

    @property
    def intensities(self) -> dict[str, tuple[Spread, Spread]]:
        """Modality -> smallest and largest voxels over the cases that were read."""
        read = [case.intensities for case in self.cases]
        low, high = (
            _spreads({name: ends[k] for name, ends in one.items()} for one in read) for k in (0, 1)
        )
        return {name: (low[name], high[name]) for name in self.modalities if name in low}

    def axes(self) -> list[tuple[Spread, Spread]]:
        """For each array axis, its voxels and their size in mm; empty if no header could be read."""
        grids = [(c.shape, c.spacing) for c in self.cases if c.shape is not None and c.spacing]
        return [
            (Spread.of(s[axis] for s, _ in grids), Spread.of(mm[axis] for _, mm in grids))
            for axis in range(3 if grids else 0)
        ]

    def as_dict(self) -> dict[str, Any]:
        """The content of ``prism-meta cases --json``: numbers, strings, lists and dictionaries."""
        grid = self.axes()
        return {
            "layout": self.layout,
            "voxels": self.voxels,
            "cases": [_case_dict(case) for case in self.cases],
            "patients": self.patients,
            "sites": [{"site": site, "cases": count} for site, count in self.sites.items()],
            "modalities": {
                name: {"cases": count, "missing_rate": self.missing_rates.get(name)}
                for name, count in self.counts.items()
            },
            "subsets": [
                {"modalities": list(subset), "cases": count}
                for subset, count in self.subsets.items()
            ],
            "never_together": [list(subset) for subset in self.never_together],
            "shape": [asdict(voxels) for voxels, _ in grid],
            "spacing_mm": [asdict(size) for _, size in grid],
            "volumes_ml": {name: asdict(spread) for name, spread in self.volumes.items()},
            "intensities": {
                name: {"smallest": asdict(low), "largest": asdict(high)}
                for name, (low, high) in self.intensities.items()
            },
            "notes": list(self.notes),
            "faults": list(self.faults),
        }


def _spreads(read: Iterable[Mapping[str, float]]) -> dict[str, Spread]:
    """Spread of each number over the cases that have it."""
    numbers: dict[str, list[float]] = {}
    for case in read:
        for name, number in case.items():
            numbers.setdefault(name, []).append(number)
    return {name: Spread.of(listed) for name, listed in numbers.items()}


def _case_dict(case: CaseSurvey) -> dict[str, Any]:
    return {
        "case": case.id,
        "patient": case.patient,
        "site": case.site,
        "modalities": list(case.modalities),
        "label": case.label,
        "usable": case.usable,
        "shape": None if case.shape is None else list(case.shape),
        "spacing_mm": None if case.spacing is None else list(case.spacing),
        "slice_axis": case.slice_axis,
        "volumes_ml": case.volumes,
        "intensities": {name: list(ends) for name, ends in case.intensities.items()},
    }
