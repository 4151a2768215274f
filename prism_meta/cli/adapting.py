"""What is shown of an adaptation: a table in the terminal, and lines of a report."""

from __future__ import annotations

import numpy as np
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from prism_meta.errors import one_line
from prism_meta.report.bootstrap import Bootstrap, Interval
from prism_meta.report.text import format_dice, format_interval
from prism_meta.training.adaptation.choice import Setting
from prism_meta.training.adaptation.result import AdaptationFacts
from prism_meta.training.run import Run


def gain_of(facts: AdaptationFacts) -> Interval | None:
    """The mean change of Dice on held-out cases, with its bootstrap interval; None if none was held out."""
    if not facts.held_out:
        return None
    gains = np.array([[one.after - one.before] for one in facts.held_out])
    return Bootstrap(len(gains), seed=0).intervals(gains)[0]


def adaptation_table(facts: AdaptationFacts, *, title: str) -> Table:
    """The Dice of held-out cases before and after, and the mean change."""
    table = Table(
        title=Text(title, style="bold"),
        caption=Text(
            "Dice in %, mean over regions. Each case was held out, and its setting is the best one for the "
            f"others.\nThe interval is a bootstrap over {len(facts.held_out)} cases; few make it rough."
        ),
        caption_justify="left",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    table.add_column("held-out case")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("setting")
    for one in facts.held_out:
        more = len(one.cases) - 1
        table.add_row(
            escape(one_line(one.cases[0])) + (f" and {more} more" if more else ""),
            format_dice(one.before),
            format_dice(one.after),
            f"{100 * (one.after - one.before):+.1f}",
            str(Setting(one.lr, one.steps)),
            end_section=one is facts.held_out[-1],
        )
    gain = gain_of(facts)
    assert gain is not None
    mean, ends = format_interval(gain, 100.0)
    before, after = (
        float(np.mean([getattr(one, name) for one in facts.held_out]))
        for name in ("before", "after")
    )
    table.add_row(
        "mean", format_dice(before), format_dice(after), mean, f"95% {ends}", style="bold"
    )
    return table


def adaptation_facts(facts: AdaptationFacts) -> dict[str, str]:
    """Lines for the report of an adapted run."""
    lines = {
        "adapted from": f"{facts.run} (weights {facts.weights}), to {facts.subset}",
        "adaptation": facts.sentence(),
    }
    gain = gain_of(facts)
    if gain is not None:
        mean, ends = format_interval(gain, 100.0)
        lines["Dice of held-out cases"] = (
            f"{mean} points by adapting, 95% {ends} over {gain.cases} cases"
        )
    if facts.steps:  # otherwise the rest is that of the run
        lines |= {"strategy": "single level, Adam", "masks": f"all patches show {facts.subset}"}
    return lines


def adapt_again(run: Run, facts: AdaptationFacts, out: str) -> list[str]:
    """The words of a command that adapts the same run again, to the same cases."""
    user = ["--steps", str(facts.steps), "--lr", f"{facts.lr:g}"] if facts.by == "user" else []
    return [
        *("prism-meta", "adapt", facts.run, str(run.facts["data"]), "--subset", facts.subset),
        *("--weights", facts.weights, "--seed", str(run.facts["seed"]), *user, "--out", out),
    ]
