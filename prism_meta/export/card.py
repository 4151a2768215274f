"""The model card: what a run was trained on, how well it does, and how it is used."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from prism_meta.errors import one_line
from prism_meta.records import read_records
from prism_meta.report import Interval, summarize
from prism_meta.report.html import REPORT_FILES
from prism_meta.report.text import format_dice, format_ends, format_mm
from prism_meta.training.adaptation.result import adaptation_of
from prism_meta.training.build import build_empty_policy, build_label_set
from prism_meta.training.run import Run

_TAGS = ("medical", "medical-imaging", "image-segmentation", "missing-modalities", "prism-meta")


def model_card(run: Run, *, licence: str) -> str:
    """The model card of a run as Markdown, with a YAML front matter for the Hugging Face hub.

    Args:
        run: a run; the scores are those of its folder ``evaluation``, if there is one.
        licence: as the hub calls it.

    Raises:
        PrismError: the records of the evaluation are damaged.
    """
    name = one_line(run.folder.resolve().name)
    # A JSON string is a YAML string, whatever is in it.
    front = [
        "---",
        f"license: {json.dumps(licence)}",
        "library_name: prism-meta",
        "pipeline_tag: image-segmentation",
        "tags:",
        *(f"- {tag}" for tag in _TAGS),
        "---",
    ]
    parts = [*front, "", f"# {name}", "", *_summary(run)]
    sections = {
        "How to use it": _use(run),
        "Inputs and labels": _data(run),
        "Training": _training(run),
        "Scores": _scores(run),
    }
    for title, lines in sections.items():
        parts += ["", f"## {title}", "", *lines]
    return "\n".join(parts) + "\n"


def _summary(run: Run) -> Iterator[str]:
    data = run.config.data
    yield (
        f"A segmentation network for {', '.join(data.modalities)}, trained with "
        "[prism-meta](https://pypi.org/project/prism-meta) so that any of them may be missing."
    )
    yield ""
    yield "**Not a medical device.** For research only: do not use it for diagnosis or treatment."


def _use(run: Run) -> Iterator[str]:
    yield "Upload this folder as a model OWNER/NAME. Then it predicts folders of cases:"
    yield ""
    yield "```sh"
    yield 'pip install "prism-meta[hub]"'
    yield "prism-meta predict hf://OWNER/NAME new_cases labels"
    yield "```"
    own = run.facts.get("own", {}).get("model")
    if own or (run.config.model.is_named and not run.config.model.network.startswith("monai:")):
        yield ""
        yield (
            f"The network is code of its own ({own or run.config.model.network}), which has to be installed "
            "beside it."
        )


def _data(run: Run) -> Iterator[str]:
    data = run.config.data
    labels = build_label_set(data)
    spacing = " x ".join(f"{size:g}" for size in data.spacing)
    patch = " x ".join(map(str, data.patch))
    yield f"- Modalities: {', '.join(data.modalities)}; each case has at least one of them"
    yield f"- Grid: voxels of {spacing} mm, windows of {patch} voxels"
    yield f"- Labels: 0 background, {', '.join(f'{v} {name}' for name, v in labels.values.items())}"
    yield from (
        f"- Region {region}: {', '.join(classes)}" for region, classes in labels.regions.items()
    )


def _training(run: Run) -> Iterator[str]:
    config, train = run.config, run.facts["train"]
    missing = {n: sum(n not in files for files in train.values()) for n in config.data.modalities}
    lacks = [f"{name} in {count}" for name, count in missing.items() if count]
    lacking = f"missing {', '.join(lacks)}" if lacks else "none with a missing modality"
    own = run.facts.get("own", {})
    network = own.get("model") or config.model.network
    if network == "prism":
        network += f" with {config.model.fusion} fusion, width {config.model.width}"
    yield f"- Cases: {len(train)}, {lacking}"
    yield f"- Network: {network}"
    yield f"- Strategy: {own.get('strategy') or config.meta.strategy}, {config.training.steps} steps"
    yield f"- Masks: {config.masks.train} (train), {config.masks.meta} (meta)"
    adaptation = adaptation_of(run)
    if adaptation is not None:
        count = len(adaptation.cases)
        yield f"- Adaptation: to {adaptation.subset}, {count} cases; {adaptation.sentence()}"
    yield f"- Weights: {', '.join(run.kinds)}; the first are used by default"
    versions = run.facts["versions"]
    yield f"- Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}"


def _scores(run: Run) -> Iterator[str]:
    table = run.evaluation / REPORT_FILES[0]
    if not table.exists():
        yield "This run was not evaluated."
        return
    summary = summarize(read_records(table))
    policy = build_empty_policy(run.config.evaluation).statement
    regions = summary.regions
    yield (
        f"Means over {summary.overall.cases} cases with 95 % bootstrap intervals, as predicted, without "
        f"clean-up. Empty masks: {policy}. The worst subset is {summary.worst}."
    )
    yield ""
    yield from _row(["subset", "Dice, %", "HD95, mm", *(f"Dice {name}, %" for name in regions)])
    yield from _row(["---"] * (3 + len(regions)))
    for subset, cell in summary.by_subset.items():
        single = (summary.cells.get((subset, region)) for region in regions)
        dice, *others = (
            "–" if one is None else _dice(one.scores["dice"]) for one in (cell, *single)
        )
        distance = cell.scores["hd95_mm"]
        yield from _row(
            [subset, dice, f"{format_mm(distance.mean)} ({format_ends(distance)})", *others]
        )


def _dice(score: Interval) -> str:
    return f"{format_dice(score.mean)} ({format_ends(score, 100.0)})"


def _row(cells: Sequence[str]) -> Iterator[str]:
    yield f"| {' | '.join(one_line(cell).replace('|', chr(92) + '|') for cell in cells)} |"
