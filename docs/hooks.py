"""What MkDocs makes from the code and the results when it builds the site: the API, tables, formulas.

The README is the home page, so that it is written once. Formulas become MathML, which needs no script.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from monai.networks.nets import UNet

import prism_meta as pm
from prism_meta.objective import losses

ROOT = Path(__file__).parents[1]
#: File of the project -> its page.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "RELEASING.md": "releasing.md",
}
#: Page of the API -> its title, what it is about, and its names.
API = {
    "strategies": (
        "Strategies and the outer step",
        "How the gradient of the outer step is computed, and what takes the step.",
        "MetaLearner MetaGradient MetaStrategy FunctionalStrategy SingleLevel Joint FirstOrder SecondOrder "
        "Reptile FiniteDifference ImplicitMAML StepBatches ALL_STRATEGIES register_strategy preflight "
        "Preflight HiddenParameterError use_fast_derivatives",
    ),
    "inner": (
        "Inner optimizers",
        "Differentiable optimizers for the inner steps.",
        "InnerOptimizer SGD Adam AdamW MetaSGD",
    ),
    "networks": (
        "Networks",
        "PRISM's network, fusions, and wrapped nets of your own.",
        "PrismNet wrap WrappedNet MultiEncoderNet SegmentationModel Prediction Fusion RegionAwareFusion "
        "MeanFusion AttentionFusion",
    ),
    "objective": (
        "Objective",
        "PRISM's losses (E5-E10), their weights (E11, E12), and losses for the outer level.",
        "PrismObjective RelativePreference LearnedWeights LearnedSubsetWeights SoftWorst Ranking",
    ),
    "losses": ("Losses", "The single losses, `prism_meta.losses`.", ""),
    "data": (
        "Data",
        "Cases, labels, subsets of modalities, masks and episodes.",
        "Case load_cases LabelSet BRATS_LABELS BRATS Preprocessing draw_availability subset subsets "
        "subset_name Batch StaticMask DynamicMask FullMask BalancedMask SingleModalityMask HardMask "
        "GroupDROMask OneSubsetMask Episodes TaskEpisodes",
    ),
    "training": (
        "Training",
        "From a configuration to a run, and on to a site.",
        "Config load_config train Trained fit Trainer Run adapt Adapted",
    ),
    "evaluation": (
        "Evaluation",
        "Predictions, metrics of all subsets, and their averages.",
        "Predictor predict evaluate Cleanup RegionRule Record read_records write_records summarize compare",
    ),
    "errors": ("Errors", "What is raised for wrong input.", "PrismError ConfigError CaseError"),
    "integrations": ("Integrations", "Doors to other libraries, and phantoms to try things on.", ""),
}  # fmt: skip
#: Objects beyond ``prism_meta.__all__``.
MORE = {
    "losses": [f"prism_meta.objective.losses.{name}" for name in losses.__all__],
    "integrations": [
        "prism_meta.integrations.learn2learn.PrismLearner",
        "prism_meta.integrations.learn2learn.Learn2LearnStrategy",
        "prism_meta.integrations.higher.HigherStrategy",
        "prism_meta.integrations.lightning.MetaModule",
        "prism_meta.integrations.monai.MetaTrainer",
        "prism_meta.data.phantom.write_phantoms",
        "prism_meta.data.phantom.draw_phantom",
    ],
}


def names() -> Iterator[str]:
    """All names of ``prism_meta`` that have a place in the API."""
    for _, _, listed in API.values():
        yield from listed.split()


def api_page(key: str) -> str:
    """The Markdown of a page of the API."""
    title, about, listed = API[key]
    lines = [f"# {title}", about]
    for name in listed.split():
        found = getattr(pm, name)
        if inspect.isclass(found) or inspect.isfunction(found):
            lines += [
                f"[](){{ #prism_meta.{name} }}",
                f"::: {found.__module__}.{found.__qualname__}",
            ]
        else:
            lines += [f"## `{name}` {{ #prism_meta.{name} }}", _value(name, found)]
    lines += [f"::: {path}" for path in MORE.get(key, ())]
    return "\n\n".join(lines) + "\n"


def _value(name: str, value: Any) -> str:
    if isinstance(value, list):
        return (
            "The registered strategies: " + ", ".join(f"`{each.__name__}`" for each in value) + "."
        )
    return f"```python\n{name} = {value!r}\n```"


def relative_memory() -> dict[str, list[float]]:
    """Estimated memory of each strategy at K = 1 and 5 beside the model, relative to first order at K = 1."""
    net = UNet(spatial_dims=2, in_channels=4, out_channels=4, channels=(16, 32, 64), strides=(2, 2))
    batch = pm.Batch(
        torch.zeros(4, 4, 64, 64), pm.subsets(4)[:4], torch.zeros(4, 64, 64, dtype=torch.long)
    )
    found: dict[str, list[float]] = {}
    for steps in (1, 5):
        report = pm.preflight(pm.wrap(net), pm.PrismObjective(unimodal=False), batch, steps=steps)
        least: dict[str, float] = {}
        for (
            name,
            size,
        ) in report.memory.items():  # SecondOrder(graph='stored'): of the ways, the least
            kind = name.partition("(")[0]
            least[kind] = min(size, least.get(kind, size))
        for kind, size in least.items():
            found.setdefault(kind, []).append(size)
    base = found["FirstOrder"][0]
    return {kind: [size / base for size in sizes] for kind, sizes in found.items()}


def strategies_table() -> str:
    """The registry as a table."""
    lines = [
        "| class | `meta.strategy` | gradient | time at K = 1 | memory at K = 1, 5 | learns weights (E12) |",
        "|---|---|---|---|---|---|",
    ]
    memory = relative_memory()
    for kind in pm.ALL_STRATEGIES:
        sizes = ", ".join(f"{size:.1f}" for size in memory.get(kind.__name__, ()))
        lines.append(
            f"| [`{kind.__name__}`](api/strategies.md#prism_meta.{kind.__name__}) | `{kind.name}` | "
            f"{kind.equation} | {kind.units} | {sizes} | {'yes' if kind.has_meta_gradient else 'no'} |"
        )
    return "\n".join(lines)


def study_table() -> str:
    """What each strategy gained or lost against one level at equal time, in the study of levels."""
    from runpy import run_path

    return str(run_path(str(ROOT / "benchmarks" / "evidence.py"))["levels_of"]("levels"))


def notebook_page(path: Path) -> str:
    """The Markdown of a notebook with the output that it was saved with."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(
                    f"![Output](data:image/png;base64,{''.join(data['image/png']).strip()})"
                )
            elif shown := "".join(output.get("text", data.get("text/plain", ()))).rstrip():
                parts.append(f"```text\n{shown}\n```")
    return "\n\n".join(parts) + f"\n\nThis page is the notebook `docs/examples/{path.name}`.\n"


def _readable(text: str) -> str:
    """Links of the project's files to pages become links of the site."""
    text = re.sub(r"\[([^]]+)\]\((CITATION\.cff|docs/examples)\)", r"`\2`", text)  # no pages
    text = re.sub(r'(\]\(|src=")docs/', r"\1", text)
    return re.sub(r"\]\(([A-Z]+\.md)", lambda m: f"]({PAGES.get(m[1], m[1])}", text)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made from other files."""
    for source, page in PAGES.items():
        text = _readable((ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    for path in sorted((ROOT / "docs" / "examples").glob("*.ipynb")):
        page = f"examples/{path.stem}.md"
        files.append(File.generated(config, page, content=notebook_page(path)))
    for key in API:
        files.append(File.generated(config, f"api/{key}.md", content=api_page(key)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Tables, and links to what is a page of the site."""
    if "<!-- strategies -->" in markdown:
        markdown = markdown.replace("<!-- strategies -->", strategies_table())
    if "<!-- levels -->" in markdown:
        markdown = markdown.replace("<!-- levels -->", study_table())
    return markdown.replace("](../README.md", "](index.md")


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Formulas, which arithmatex has marked, as MathML."""

    def formula(match: re.Match[str]) -> str:
        text = re.sub(
            r"&(lt|gt|amp);", lambda m: {"lt": "<", "gt": ">", "amp": "&"}[m[1]], match[3]
        )
        return convert(text, display="block" if match[1] == "div" else "inline")

    return re.sub(r'(?s)<(div|span) class="arithmatex">\\([\[(])(.*?)\\[\])]</\1>', formula, html)
