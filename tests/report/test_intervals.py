"""Intervals of averages against resamples made one by one; contributions and balance by hand."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
from scipy.stats import bootstrap

from prism_meta.errors import PrismError
from prism_meta.modalities import subset_name, subsets
from prism_meta.records import Record
from prism_meta.report import Interval, Summary, summarize
from prism_meta.report.findings import findings
from prism_meta.report.measures import MEASURES

NAN = math.nan


def drawn(seed: int = 0, cases: int = 5) -> list[Record]:
    """Random records of three modalities in two regions; some numbers are undefined, some cases lack t2."""
    chance = random.Random(seed)
    return [
        Record(
            f"c{i}",
            subset_name(row.tolist(), ("flair", "t1", "t2")),
            region,
            chance.random() if chance.random() > 0.1 else NAN,
            10 * chance.random() if chance.random() > 0.2 else NAN,
            chance.random(),
            5 * chance.random(),
            float(chance.randint(0, 2)),
            float(chance.randint(0, 4)),
            0.0,
            1.0,
            300.0,
        )
        for i in range(cases)
        for row in subsets(3)
        for region in ("WT", "ET")
        if i > 1 or not row[2]
    ]


def numbers(summary: Summary) -> dict[tuple[str, ...], float]:
    """Every average of a summary by its place."""
    cells = {
        **{("cell", *key): cell for key, cell in summary.cells.items()},
        **{("subset", key): cell for key, cell in summary.by_subset.items()},
        **{("region", key): cell for key, cell in summary.by_region.items()},
        ("overall",): summary.overall,
    }
    found = {(*key, m): s.mean for key, cell in cells.items() for m, s in cell.scores.items()}
    found["spread",] = summary.balance.spread.mean
    found["deviation",] = summary.balance.deviation.mean
    for name, part in summary.contributions.items():
        found["lost", name] = part.overall.mean
        found |= {("lost", name, region): drop.mean for region, drop in part.by_region.items()}
    return found


def intervals(summary: Summary) -> dict[tuple[str, ...], Interval]:
    cells = {
        **{("cell", *key): cell for key, cell in summary.cells.items()},
        **{("subset", key): cell for key, cell in summary.by_subset.items()},
        **{("region", key): cell for key, cell in summary.by_region.items()},
        ("overall",): summary.overall,
    }
    found = {(*key, m): score for key, cell in cells.items() for m, score in cell.scores.items()}
    found["spread",] = summary.balance.spread
    found["deviation",] = summary.balance.deviation
    for name, part in summary.contributions.items():
        found["lost", name] = part.overall
        found |= {("lost", name, region): drop for region, drop in part.by_region.items()}
    return found


@pytest.mark.parametrize("seed", range(3))
def test_every_interval_is_that_of_the_average_of_resampled_cases(seed: int) -> None:
    """Each resample is made as records, in which a case that is drawn twice occurs twice."""
    records = drawn(seed)
    weights = np.random.default_rng(7).multinomial(5, np.full(5, 0.2), size=60)
    samples: dict[tuple[str, ...], list[float]] = {}
    for row in weights:
        sample = [
            Record(f"{r.case} {copy}", *list(vars(r).values())[1:])
            for r in records
            for copy in range(row[int(r.case[1])])
        ]
        for key, value in numbers(summarize(sample, resamples=1)).items():
            samples.setdefault(key, []).append(value)
    found = intervals(summarize(records, seed=7, resamples=60))
    assert len(found) == (14 + 7 + 2 + 1) * len(MEASURES) + 2 + 3 * 3
    checked = 0
    for key, interval in found.items():
        values = np.array([value for value in samples[key] if not math.isnan(value)])
        if interval.cases > 1:
            ends = np.percentile(values, (2.5, 97.5))
            assert (interval.low, interval.high) == pytest.approx(tuple(ends), abs=1e-9), key
            checked += 1
        else:
            assert math.isnan(interval.low) and math.isnan(interval.high)
    assert checked > 180


def test_an_interval_of_many_cases_is_that_of_scipy() -> None:
    dice = np.random.default_rng(3).beta(5, 2, 60)
    records = [Record(f"c{i:02}", "t1", "WT", x, 1.0) for i, x in enumerate(dice)]
    found = summarize(records, resamples=20_000).overall.scores["dice"]
    expected = bootstrap(
        (dice,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=2e-3)
    assert found.mean == pytest.approx(dice.mean()) and found.cases == 60


def test_intervals_repeat_with_their_seed_and_not_with_another() -> None:
    records = drawn()
    shuffled = random.Random(1).sample(records, len(records))
    names = list(dict.fromkeys(r.subset for r in records))
    first = summarize(records)
    again = summarize(shuffled, subset_order=names)
    assert json.dumps(first.overall.to_dict()) == json.dumps(again.overall.to_dict())
    assert first.balance == again.balance
    other = summarize(records, seed=1)
    assert first.overall.scores["dice"].mean == other.overall.scores["dice"].mean
    assert first.overall.scores["dice"].low != other.overall.scores["dice"].low
    assert (other.seed, other.resamples) == (1, 2000)
    with pytest.raises(PrismError, match="resamples: got 0, expected at least 1; 10000 is usual"):
        summarize(records, resamples=0)


def test_one_case_has_no_intervals() -> None:
    summary = summarize([r for r in drawn() if r.case == "c3"])
    assert all(math.isnan(i.low) and math.isnan(i.high) for i in intervals(summary).values())
    data = json.loads(json.dumps(summary.to_dict(), allow_nan=False))
    assert data["overall"]["intervals"]["dice"] == [None, None]


def two(first: float, second: float) -> dict[str, Record]:
    """One record per case: 3 of 4 ml and 2 lesions missed; and an empty truth."""
    return {
        "c1": Record("c1", "t1", "WT", first, 2.0, 0.5, 3.0, 4.0, 5, 2, 1, 300.0),
        "c2": Record("c2", "t1", "WT", second, 4.0, 0.7, 1.0, 0.0, 0, 0, 2, 300.0),
    }


def test_measures_by_hand() -> None:
    summary = summarize(list(two(0.4, 0.6).values()))
    scores = {name: score.mean for name, score in summary.overall.scores.items()}
    assert scores == pytest.approx(
        {
            "dice": 0.5, "hd95_mm": 3.0, "nsd_1mm": 0.6, "volume_error_ml": 0.0,
            "relative_volume_error": -0.25, "true_lesions": 2.5, "missed_lesions": 1.0, "false_lesions": 1.5,
        }
    )  # fmt: skip
    assert summary.overall.scores["relative_volume_error"].cases == 1  # the truth of c2 is empty
    data = summary.to_dict()["overall"]
    assert data["volume_error_ml"] == 0.0 and data["intervals"]["volume_error_ml"] == [-1.0, 1.0]
    assert data["intervals"]["relative_volume_error"] == [None, None]


def known() -> list[Record]:
    """Dice is 0.2, plus 0.3 with flair, plus 0.1 with t1; for c2 flair adds 0.1 more. c3 has no t1.

    In ET, flair adds nothing.
    """
    return [
        Record(
            case,
            name,
            region,
            0.2
            + (0.3 + 0.1 * (case == "c2")) * ("flair" in name and region == "WT")
            + 0.1 * ("t1" in name),
            1.0,
        )
        for case in ("c1", "c2", "c3")
        for name in ("flair", "t1", "t2", "flair+t1", "flair+t2", "t1+t2", "flair+t1+t2")
        for region in ("WT", "ET")
        if case != "c3" or "t1" not in name
    ]


def test_contributions_by_hand() -> None:
    found = summarize(known()).contributions
    assert list(found) == ["flair", "t1", "t2"]
    flair = found["flair"]
    # Of each case first: 0.3, 0.4, 0.3 in WT and 0 in ET.
    assert flair.by_region["WT"].mean == pytest.approx(1 / 3)
    assert flair.by_region["ET"].mean == pytest.approx(0, abs=1e-12)
    assert flair.overall.mean == pytest.approx(1 / 6)
    assert (flair.overall.low, flair.overall.high) == pytest.approx((0.15, 0.2))
    assert (flair.overall.cases, flair.pairs) == (3, 3)
    assert found["t1"].overall == Interval(
        pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1), 2
    )
    assert found["t2"].overall.mean == pytest.approx(0, abs=1e-12)
    assert found["t2"].pairs == 3


def test_contributions_are_paired_by_case() -> None:
    """A case without t1 is hard: an average over different cases would make t1 useful."""
    records = [
        Record("easy", "t2", "WT", 0.9, 1.0), Record("easy", "t1+t2", "WT", 0.8, 1.0),
        Record("hard", "t2", "WT", 0.1, 1.0),
    ]  # fmt: skip
    summary = summarize(records)
    assert summary.by_subset["t1+t2"].dice > summary.by_subset["t2"].dice
    assert summary.contributions["t1"].overall.mean == pytest.approx(-0.1)
    assert list(summary.contributions) == ["t1"]  # t2 is never removed


def test_balance_by_hand() -> None:
    dice = {"t1": 0.3, "t2": 0.5, "t1+t3": 0.1, "t1+t2": 0.9, "t3": NAN}
    records = [Record(case, name, "WT", x, 1.0) for name, x in dice.items() for case in ("a", "b")]
    balance = summarize(records).balance
    assert balance.spread.mean == pytest.approx(0.8)
    assert balance.deviation.mean == pytest.approx(np.std([0.3, 0.5, 0.1, 0.9]))
    assert (balance.spread.low, balance.spread.high) == pytest.approx((0.8, 0.8))
    assert (balance.worst, balance.worst_single) == ("t1+t3", "t1")
    pair = summarize([r for r in records if r.subset == "t1+t2"]).balance
    assert (pair.spread.mean, pair.worst_single) == (0.0, None)


def test_findings_are_the_numbers() -> None:
    averages, evenness, lost = findings(summarize(known()))
    assert averages[0][:2] == ("Dice, %", "35.5")  # 3.167 / 7 in WT, 1.8 / 7 in ET
    assert [line.title for line in averages] == ["Dice, %", "Dice WT, %", "Dice ET, %", "HD95, mm"]
    assert [line.title for line in evenness] == [
        "best minus worst subset, Dice points",
        "standard deviation of subsets, Dice points",
        "worst subset (t2), Dice, %",
        "worst single modality (t2), Dice, %",
    ]
    assert [tuple(line) for line in lost] == [
        ("Dice lost without flair, points", "+16.7", "+15.0 to +20.0"),
        ("Dice lost without t1, points", "+10.0", "+10.0 to +10.0"),
        ("Dice lost without t2, points", "+0.0", "+0.0 to +0.0"),
    ]
    more, *_ = findings(summarize(list(two(0.4, 0.6).values())))
    assert ("volume error, ml", "+0.0", "-1.0 to +1.0") in [tuple(line) for line in more]
    assert ("missed lesions per case", "1.00", "0.00 to 2.00") in [tuple(line) for line in more]
