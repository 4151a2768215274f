"""The tables hold the numbers, and the page is one whole file that trusts no name."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from prism_meta.empty_masks import BratsEmpty
from prism_meta.errors import PrismError
from prism_meta.modalities import BRATS, subset_name, subsets
from prism_meta.records import Record, read_records
from prism_meta.report import compare, summarize, summarize_policies
from prism_meta.report.figures.curves import _validation, training_curves
from prism_meta.report.figures.style import class_colour
from prism_meta.report.html import write_report
from prism_meta.report.overlays import Overlay
from prism_meta.report.tables import comparison_table, findings_table, policies_table, results_table

REGIONS = ("WT", "TC", "ET")
POLICY = BratsEmpty.statement
CLASSES = ("background", "core", "oedema")


def records(extra: float = 0.0) -> list[Record]:
    """15 subsets, 3 regions, 2 cases; Dice 0.1 per modality, 0.02 per region, +-0.01 per case."""
    return [
        Record(case, name, region, 0.1 * (name.count("+") + 1) + 0.02 * i + sign + extra, 7.25 + i)
        for name in (subset_name(subset, BRATS) for subset in subsets(4))
        for i, region in enumerate(REGIONS)
        for case, sign in (("c1", 0.01), ("c2", -0.01))
    ]


def text_of(table: Table, width: int = 160) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(table)
    return stream.getvalue()


def overlay(case: str = "c1") -> Overlay:
    labels = np.zeros((20, 16), dtype=np.int64)
    labels[5:12, 5:12], labels[7:9, 7:9] = 2, 1
    ramp = np.linspace(0, 1, 320).reshape(20, 16)
    return Overlay(case, ramp, labels, {"t1": np.roll(labels, 2, 0), "flair+t1ce": labels}, "flair")


HISTORY: list[dict[str, Any]] = [
    {"step": 0, "train_loss": 2.0, "meta_loss": 2.5, "terms": {"fuse": 1.0, "pixel": [1, 2, 3, 4]}},
    {"step": 10, "train_loss": 1.0, "terms": {"fuse": math.nan, "pixel": [1, 2, None, 4]}},
    {"lr": 0.1},
    {"step": 30, "train_loss": None, "meta_loss": 1.5, "terms": None},
]


def report(folder: Path, **changes: Any) -> str:
    options: dict[str, Any] = {
        "title": "A run", "records": records(), "modalities": BRATS, "class_names": CLASSES,
        "policy_statement": POLICY, "overlays": [overlay()], "history": HISTORY,
        "facts": {"seed": "17"},
    }  # fmt: skip
    path = write_report(folder, **{**options, **changes})
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def test_table_has_the_numbers() -> None:
    run = [r for r in records() if r.subset != "t2"]
    # The t1 row becomes the worst: WT 5, TC 12, ET undefined.
    run = [
        r if r.subset != "t1" else Record(r.case, r.subset, r.region, value, 99.04)
        for r in run
        for value in ({"WT": 0.05, "TC": 0.12, "ET": math.nan}[r.region],)
    ]
    text = text_of(results_table(summarize(run), title="Demo", policy=POLICY, modalities=BRATS))
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "○ ○ ● ○ 5.0 12.0 – 8.5 99.0 99.0 99.0 99.0 ◀ worst" in rows
    assert "● ● ● ● 40.0 42.0 44.0 42.0 7.2 8.2 9.2 8.2 all shown" in rows
    assert any(row.endswith("mean of 14") for row in rows)
    assert "flair t1ce t1 t2 WT TC ET mean WT TC ET mean" in rows
    flat = " ".join(text.split())
    assert "Dice in %, HD95 in mm, mean over 2 cases." in flat
    assert f"Empty masks: {POLICY}. 2 records with undefined values are left out." in flat
    assert "Worst subset: t1, mean Dice 8.5 %." in flat


def test_table_averages() -> None:
    text = text_of(results_table(summarize(records()), title="", policy="", modalities=BRATS))
    # Sizes 1 to 4 occur 4, 6, 4 and 1 times: mean size 32/15, so WT is 21.33 %.
    (row,) = (line.split() for line in text.splitlines() if "mean of 15" in line)
    assert row[:8] == ["21.3", "23.3", "25.3", "23.3", "7.2", "8.2", "9.2", "8.2"]


def test_table_fits_a_terminal_of_80_columns() -> None:
    table = results_table(summarize(records()), title="Demo", policy=POLICY, modalities=BRATS)
    narrow = text_of(table, width=80)
    assert "…" not in narrow
    assert max(map(len, narrow.splitlines())) <= 80


def test_findings_in_the_terminal() -> None:
    text = text_of(findings_table(summarize(records())), width=80)
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "Dice, % 23.3 22.3 to 24.3" in rows and "Dice ET, % 25.3 24.3 to 26.3" in rows
    assert "worst subset (flair), Dice, % 12.0 11.0 to 13.0" in rows
    assert "Dice lost without t2, points +10.0 +10.0 to +10.0" in rows
    assert "Intervals: 95% percentile bootstrap over 2 cases, 2000 resamples, seed 0." in " ".join(
        rows
    )
    assert "…" not in text and max(map(len, text.splitlines())) <= 80


def test_names_are_not_markup() -> None:
    run = [Record("c", "t1", "[red]ET", 0.5, 1.0)]
    summary = summarize(run)
    text = text_of(results_table(summary, title="[b]x", policy="[i]p", modalities=("t1", "[u]")))
    assert all(name in text for name in ("[red]ET", "[b]x", "[i]p", "[u]"))
    two = [*run, Record("c", "t1", "[i]WT", 0.5, 1.0)]
    assert "Dice [red]ET, %" in text_of(findings_table(summarize(two)))
    assert "[red]ET" in text_of(comparison_table(compare(run, run), names=("[x]", "y")))


def test_modalities_must_be_those_of_the_records(tmp_path: Path) -> None:
    with pytest.raises(PrismError, match="subset 't2': expected modalities of flair, t1ce, t1 "):
        results_table(summarize(records()), title="", policy="", modalities=BRATS[:3])
    with pytest.raises(PrismError, match="subset 't2'"):
        report(tmp_path, modalities=BRATS[:3])
    assert list(tmp_path.iterdir()) == []


def test_comparison_table_has_the_numbers() -> None:
    result = compare(records(), records(0.055))
    text = text_of(comparison_table(result, names=("first", "second")))
    rows = [re.split(r"\s*│\s*", line.strip(" │")) for line in text.splitlines()]
    for name in ("all", "WT", "t1", "flair+t1ce+t1+t2"):
        assert [name, "+5.5", "+5.5 to +5.5", "+0.0", "+0.0 to +0.0"] in rows
    assert len([row for row in rows if "+5.5" in row]) == 1 + 3 + 15
    assert "second minus first" in text
    assert "Paired over 2 cases" in text


def test_comparison_of_one_case_shows_no_interval() -> None:
    run = [Record("c", "t1", "WT", 0.5, math.nan)]
    text = text_of(comparison_table(compare(run, run)))
    assert re.search(r"all *│ *\+0\.0 *│ *– *│ *– *│ *–", text)
    assert "1 pairs with undefined values are left out." in " ".join(text.split())


class Links(HTMLParser):
    """Everything that a browser would fetch, and every tag that is open at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_one_whole_file(tmp_path: Path) -> None:
    html = report(tmp_path)
    links = Links()
    links.feed(html)
    assert links.open == []
    assert not {"link", "iframe"} & set(links.tags)
    assert links.tags.count("script") == 1 and "<script>" in html  # without an address
    assert not re.search(r"https?://|url\(|@import", html)
    pictures = [address for address in links.addresses if not address.startswith("#")]
    assert len(pictures) == 3 + 4  # three plots; image, truth and two predictions
    for address in pictures:
        head, data = address.split(",", 1)
        start = {"data:image/png;base64": b"\x89PNG", "data:image/svg+xml;base64": b"<?xml"}[head]
        assert base64.b64decode(data, validate=True).startswith(start)


def test_the_same_evaluation_gives_the_same_page(tmp_path: Path) -> None:
    assert report(tmp_path / "a") == report(tmp_path / "b")


def titles(html: str, alt: str) -> set[str]:
    """The texts of the plot with this description; matplotlib writes each beside its outlines."""
    return set(re.findall(r"<!-- (.*?) -->", svg_of(html, alt)))


def svg_of(html: str, alt: str) -> str:
    (address,) = re.findall(rf'alt="{alt}" src="data:image/svg\+xml;base64,([^"]*)"', html)
    return base64.b64decode(address).decode("utf-8")


WEIGHTS = "Relative preference and weights per modality over training"


@pytest.mark.parametrize("x", ["epoch", "outer step"])
def test_preference_and_weights_have_panels_of_their_own(tmp_path: Path, x: str) -> None:
    terms = {
        "fuse": 1.0, "beta": [0.1] * 4, "delta": [0.0, 0.1, 0.1, 0.0],
        "preference": [0.2, -0.1, -0.1, 0.0], "shown": [2.0, 1.0, 1.0, 0.0],
    }  # fmt: skip
    history = [{"step": i, "train_loss": 1.0, "terms": terms} for i in range(6)]
    if x == "epoch":
        history = [{**row, "epoch": i // 2 + 1} for i, row in enumerate(history)]
    html = report(tmp_path, history=history)
    found = titles(html, WEIGHTS)
    names = {"relative preference RP", "weight of pixel distillation β"}
    assert {*names, "weight of prototype alignment δ", x, *BRATS} <= found
    assert found.isdisjoint({"fuse", "loss", "shown"})
    others = titles(html, "Training losses and their terms against the outer step")
    assert {"loss", "fuse"} <= others
    assert others.isdisjoint({*names, *BRATS, "preference", "beta", "delta", "shown"})
    # t2 was never shown: it has a line for beta and one in the legend, in its own colour.
    assert [svg_of(html, WEIGHTS).count(f"stroke: {class_colour(i)}") for i in (3, 4)] == [4, 2]


def test_learned_weights_have_no_preference(tmp_path: Path) -> None:
    history = [{"step": i, "terms": {"beta": [0.1, 0.2, 0.3, 0.4 + i]}} for i in range(3)]
    found = titles(report(tmp_path, history=history), WEIGHTS)
    assert "weight of pixel distillation β" in found and "relative preference RP" not in found


def test_fixed_weights_are_not_drawn(tmp_path: Path) -> None:
    assert "Weights of the modalities" not in report(tmp_path)


def test_page_has_the_numbers(tmp_path: Path) -> None:
    html = report(tmp_path)
    words = " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", html, flags=re.S).split())
    assert "23.3 % mean Dice over 15 subsets and 3 regions" in words
    assert "8.2 mm mean HD95" in words
    assert "12.0 % mean Dice of the worst subset, flair" in words
    for number, region in (("40.0", "WT"), ("42.0", "TC"), ("44.0", "ET")):
        assert f"{number} % Dice {region}, all modalities shown" in words
    assert "2 cases" in words
    assert f"Empty masks: {POLICY}." in words

    def with_ends(*means: float) -> str:
        """The cases differ by 2 points, so that the interval of two is from one to the other."""
        return " ".join(f"{x} {x - 1:.1f} to {x + 1:.1f}" for x in means)

    hd95 = "7.2 7.2 to 7.2 8.2 8.2 to 8.2 9.2 9.2 to 9.2 8.2 8.2 to 8.2 2"
    ends = "7.2 7.2 to 7.2 8.2 8.2 to 8.2 9.2 9.2 to 9.2"
    assert f"● ● ● ● {with_ends(40.0, 42.0, 44.0)} {ends} all shown" in words  # the heat map
    assert f"● ● ● ● {with_ends(40.0, 42.0, 44.0, 42.0)} {hd95} all shown" in words
    assert f"mean of 15 subsets {with_ends(21.3, 23.3, 25.3, 23.3)} {hd95}" in words
    assert f"Dice, % {with_ends(21.3, 23.3, 25.3, 23.3)} HD95, mm" in words
    assert (
        "subsets and 3 regions (22.3 to 24.3) 8.2 mm mean HD95 over the same cells (8.2 to 8.2)"
        in words
    )
    assert "best minus worst subset, Dice points 30.0 30.0 to 30.0" in words
    assert "worst single modality (flair), Dice, % 12.0 11.0 to 13.0" in words
    # Each modality adds 10 points, in 7 pairs of subsets.
    lost = "+10.0 +10.0 to +10.0 " * 4
    assert all(f"{name} {lost}7" in words for name in BRATS)
    assert "seed 17" in words
    assert "●●○○ flair+t1ce" in words
    assert [name for name in CLASSES if name in words] == ["core", "oedema"]


# Two cases in one region: a Dice of 0.8, and a lesion of 2 ml that is missed in a volume of 300 mm.
MISSED = [
    Record("c1", "t1", "ET", 0.8, 2.0, 0.9, 5.0, 4.0, 1, 0, 0, 250.0),
    Record("c2", "t1", "ET", 0.0, 300.0, 0.0, 0.0, 2.0, 1, 1, 0, 300.0),
    Record("c3", "t1", "ET", 1.0, 0.0, 1.0, 0.0, 0.0, 0, 0, 0, 300.0),
]
#: Mean Dice and HD95, and the undefined records.
POLICIES = {
    "brats": (1.8 / 3, (2 + 373.13) / 3, 0),
    "nan": (0.4, 2.0, 2),
    "diagonal": (1.8 / 3, 302 / 3, 0),
}


def test_policies_side_by_side(tmp_path: Path) -> None:
    by_policy = summarize_policies(MISSED)
    found = {n: (s.overall.dice, s.overall.hd95, s.overall.undefined) for n, s in by_policy.items()}
    assert found == {name: pytest.approx(values) for name, values in POLICIES.items()}
    html = report(tmp_path, records=MISSED, modalities=("t1", "t2"), overlays=())
    words = " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", html, flags=re.S).split())
    ends = {"brats": "0.0 to 373.1", "diagonal": "0.0 to 300.0"}
    for name, hd95 in (("brats", "125.0"), ("diagonal", "100.7")):
        dice, mm = "60.0 0.0 to 100.0", f"{hd95} {ends[name]}"
        assert f"{name} {dice} {dice} {mm} {mm} 0" in words
    assert "nan 40.0 0.0 to 80.0 40.0 0.0 to 80.0 2.0 2.0 2" in words
    assert "2 records have an empty prediction or truth; the policies differ only there" in words
    data = json.loads((tmp_path / "summary.json").read_text())["policies"]
    assert data["nan"]["overall"]["hd95_mm"] == data["nan"]["by_region"]["ET"]["hd95_mm"] == 2.0
    text = text_of(policies_table(by_policy, empty=2), width=80)
    rows = [line.split() for line in text.splitlines()]
    assert ["nan", "40.0", "0.0", "to", "80.0", "2.0", "–", "2"] in rows
    assert ["diagonal", "60.0", "0.0", "to", "100.0", "100.7", "0.0", "to", "300.0", "0"] in rows
    assert "…" not in text
    assert "2 records have an empty prediction or truth." in " ".join(text.split())


def test_records_without_volumes_have_one_policy(tmp_path: Path) -> None:
    assert summarize_policies([*MISSED, Record("c4", "t1", "ET", 0.5, 1.0)]) == {}
    assert "Policies for empty masks" not in report(tmp_path)


def test_files_beside_the_page(tmp_path: Path) -> None:
    report(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "records.csv", "report.html", "summary.json",
    ]  # fmt: skip
    assert repr(read_records(tmp_path / "records.csv")) == repr(records())
    data = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert data["empty_masks"] == POLICY
    assert data["overall"]["dice"] == pytest.approx(0.64 / 3 + 0.02)


def test_names_are_escaped(tmp_path: Path) -> None:
    bad = "<script>alert('x')</script>"
    html = report(
        tmp_path,
        title=bad,
        records=[Record(bad, "t1", "<b>WT", 0.5, 1.0)],
        overlays=[overlay(bad)],
        class_names=("background", bad, "oedema"),
        policy_statement=bad,
        facts={bad: bad},
    )
    assert html.count("<script") == 1 and "<script>alert" not in html and "<b>WT" not in html
    assert html.count("&lt;script&gt;") >= 6


def test_names_are_not_formulas(tmp_path: Path) -> None:
    history = [{"step": i, "train_loss": 1.0, "terms": {"$bad": [1.0, 2.0]}} for i in range(3)]
    run = [Record("c", "$x$", "$\\frac{", 0.5, 1.0)]
    html = report(tmp_path, records=run, modalities=("$x$", "$y"), history=history)
    assert "$\\frac{" in html


def test_page_of_the_least(tmp_path: Path) -> None:
    run = [Record("c", "t1", "WT", math.nan, math.nan)]
    html = report(tmp_path, records=run, overlays=(), history=[{"lr": 1}], facts=None)
    assert "flair+t1ce+t1+t2 was not measured" in html
    assert "Training" not in html and "Predicted labels" not in html


def test_overlay_faults_come_together(tmp_path: Path) -> None:
    flat, small = np.zeros((4, 4), dtype=np.int64), np.zeros((4, 3), dtype=np.int64)
    with pytest.raises(PrismError) as caught:
        Overlay("c9", flat * 1.0, small, {"t1": small, "t2": flat}, "flair")
    assert caught.value.faults == (
        "overlay of c9: truth is (4, 3), expected the background's (4, 4), two sizes; "
        "cut all from the same slice",
        "overlay of c9: prediction t1 is (4, 3), expected the background's (4, 4), two sizes; "
        "cut all from the same slice",
    )
    with pytest.raises(PrismError, match="truth has classes 0 to 2, expected 0 to 1; name every"):
        report(tmp_path, class_names=CLASSES[:2])
    assert list(tmp_path.iterdir()) == []


def test_no_global_state_of_matplotlib(tmp_path: Path) -> None:
    import matplotlib
    from matplotlib import _pylab_helpers

    before = dict(matplotlib.rcParams)
    report(tmp_path)
    assert dict(matplotlib.rcParams) == before
    assert _pylab_helpers.Gcf.get_all_fig_managers() == []


def test_the_curves_show_the_validation() -> None:
    def scores(dice: float) -> dict[str, Any]:
        return {"dice": dice, "worst": dice / 2, "worst_subset": "t1", "subsets": {}}

    rows = [{"step": k, "train_loss": 1.0} for k in range(1, 5)]
    rows[1] |= {"validation": {"last": scores(0.5), "ema": scores(0.7), "best": {}}}
    rows[3] |= {"validation": {"last": scores(0.6), "ema": scores(0.8), "best": {}}}
    assert _validation(rows) == {
        "mean": [(2, 0.5), (4, 0.6)],
        "worst subset": [(2, 0.25), (4, 0.3)],
        "mean, averaged": [(2, 0.7), (4, 0.8)],
        "worst subset, averaged": [(2, 0.35), (4, 0.4)],
    }
    assert training_curves(rows, BRATS) != training_curves([rows[0], rows[2]], BRATS)
