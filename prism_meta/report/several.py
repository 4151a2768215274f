"""Several runs side by side, over the cases that all of them have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prism_meta.errors import PrismError, raise_faults
from prism_meta.records import Record
from prism_meta.report.averages import Summary, summarize
from prism_meta.report.comparison import Comparison, compare


@dataclass(frozen=True)
class SideBySide:
    """Runs over their shared cases. ``side_by_side`` creates it.

    Args:
        modalities: names of the modalities, in order.
        cases: names of the shared cases, sorted.
        left_out: run -> names of its other cases, sorted.
        summaries: run -> averages over the shared cases.
        changes: run -> its paired differences to the first run; for every run but the first.
    """

    modalities: tuple[str, ...]
    cases: tuple[str, ...]
    left_out: dict[str, tuple[str, ...]]
    summaries: dict[str, Summary]
    changes: dict[str, Comparison]

    @property
    def first(self) -> str:
        """The run that the others are compared with."""
        return next(iter(self.summaries))

    def note(self) -> str:
        """A sentence about the cases; it names those that only some runs have, up to five of a run."""
        count = f"{len(self.cases)} case{'s' * (len(self.cases) != 1)}"
        lost = [
            f"{name} has {len(cases)} more ({', '.join(cases[:5])}{', …' * (len(cases) > 5)})"
            for name, cases in self.left_out.items()
            if cases
        ]
        if not lost:
            return f"All runs have the same {count}."
        return f"Over the {count} that all runs have; left out: {'; '.join(lost)}."


def side_by_side(runs: Mapping[str, Sequence[Record]], *, seed: int = 0) -> SideBySide:
    """Average runs over the cases that all of them have, and compare each with the first.

    Args:
        runs: name -> records, of at least two runs with the same modalities and regions.
        seed: random seed of the bootstrap.

    Raises:
        PrismError: there are fewer than two runs, one has no records, their modalities or regions differ,
            they share no case, or a shared case was measured from other subsets.

    Example:
        >>> a = [Record(f"p{i}", "t1", "WT", 0.5, 9.0) for i in (1, 2)]
        >>> b = [Record(f"p{i}", "t1", "WT", 0.75, 7.0) for i in (2, 3)]
        >>> found = side_by_side({"a": a, "b": b})
        >>> found.changes["b"].overall.dice.mean
        0.25
        >>> found.note()
        'Over the 1 case that all runs have; left out: a has 1 more (p1); b has 1 more (p3).'
    """
    if len(runs) < 2:
        raise PrismError(f"runs: got {len(runs)}, expected at least 2; give another run")
    raise_faults(
        PrismError,
        [f"{name}: has no records; evaluate it first" for name, found in runs.items() if not found],
    )
    first, *others = runs
    modalities, regions = _modalities(runs[first]), _regions(runs[first])
    faults = [
        f"{name}: has {what} {', '.join(own)}, but {first} has {', '.join(wanted)}; compare runs with the "
        f"same {what}"
        for name in others
        for what, own, wanted in (
            ("modalities", _modalities(runs[name]), modalities),
            ("regions", _regions(runs[name]), regions),
        )
        if set(own) != set(wanted)
    ]
    raise_faults(PrismError, faults)
    cases = {name: {record.case for record in found} for name, found in runs.items()}
    shared = set.intersection(*cases.values())
    if not shared:
        examples = "; ".join(f"{name} has {min(there)}" for name, there in cases.items())
        raise PrismError(
            f"runs: share no case ({examples}); evaluate them on the same folder of cases"
        )
    kept = {name: [r for r in found if r.case in shared] for name, found in runs.items()}
    # By size, then in modality order; the records may begin with a case that lacks a modality.
    order = sorted(
        {record.subset for record in kept[first]},
        key=lambda name: (name.count("+"), [modalities.index(part) for part in name.split("+")]),
    )
    changes = {
        name: compare(kept[first], kept[name], seed=seed, names=(first, name)) for name in others
    }
    return SideBySide(
        modalities=modalities,
        cases=tuple(sorted(shared)),
        left_out={name: tuple(sorted(there - shared)) for name, there in cases.items()},
        summaries={
            name: summarize(found, subset_order=order, seed=seed) for name, found in kept.items()
        },
        changes=changes,
    )


def _modalities(records: Sequence[Record]) -> tuple[str, ...]:
    """The modalities of all subsets; those of the largest subset come first, in its order."""
    subsets = dict.fromkeys(record.subset for record in records)
    by_size = sorted(subsets, key=lambda name: -name.count("+"))
    return tuple(dict.fromkeys(part for name in by_size for part in name.split("+")))


def _regions(records: Sequence[Record]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(record.region for record in records))
