"""A run as a folder for the Hugging Face hub: what ``Run.open`` needs, and a model card.

Names of cases and paths stay behind, because they may identify patients, people and computers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prism_meta.errors import ConfigError
from prism_meta.export.card import model_card
from prism_meta.files import write_whole
from prism_meta.training.adaptation.result import adaptation_of
from prism_meta.training.cleanup.file import CLEANUP, read_cleanup
from prism_meta.training.config import Config
from prism_meta.training.folder.weights import WEIGHTS, Kind
from prism_meta.training.run import Run

#: What a card says of the licence unless the user names one: the hub's word for one that it does not know.
NO_LICENCE = "other"


def write_hub(
    run: Run, out: Path, /, *, weights: Kind | None = None, licence: str = NO_LICENCE
) -> None:
    """Write the configuration, the facts, the weights and the log of a run, and the model card ``README.md``.

    Args:
        run: a run whose training has ended.
        out: folder of the files.
        weights: must be None or the kind that the run uses first: the folder has all of them.
        licence: of the weights, as the hub calls it, e.g. ``cc-by-4.0``.

    Raises:
        ConfigError: ``weights`` is another kind.
        PrismError: a file of the run is missing or damaged.
    """
    if weights not in (None, run.kinds[0]):
        raise ConfigError(
            f"weights: got {weights}, but format hub has all weights of the run, of which predict uses "
            f"{run.kinds[0]} first; leave --weights out, and give it to predict"
        )
    card = model_card(run, licence=licence)  # it reads what may be damaged
    read_cleanup(run.folder, run.config)
    config = public_config(run.config)
    files = {kind: run.existing_weights(kind) for kind in run.kinds}
    (out / WEIGHTS).mkdir()
    for file in files.values():
        write_whole(out / WEIGHTS / file.name, file.read_bytes())
    if run.metrics.exists():  # the losses, and the Dice that predict says is to be expected
        write_whole(out / run.metrics.name, run.metrics.read_bytes())
    if (run.folder / CLEANUP).exists():
        found = json.loads((run.folder / CLEANUP).read_bytes())
        write_json(out / CLEANUP, {**found, "cases": list(_numbers(found["cases"]).values())})
    write_whole(out / "config.toml", config.to_toml())
    write_json(out / "run.json", public_facts(run, config))
    write_whole(out / "README.md", card)


def public_config(config: Config) -> Config:
    """The configuration without names of cases and without paths."""
    data = {"availability": None, "test_cases": (), "cache": None}
    if isinstance(config.data.folds, Path):
        data |= {"folds": None, "fold": None}
    validation = (
        {} if isinstance(config.validation.cases, int) else {"cases": len(config.validation.cases)}
    )
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "training": config.training.model_copy(update={"init": None}),
            "validation": config.validation.model_copy(update=validation),
        }
    )


def public_facts(run: Run, config: Config) -> dict[str, Any]:
    """The content of ``run.json`` with numbers for the names of cases, and without paths.

    Args:
        run: the run.
        config: what ``public_config`` returned.
    """
    facts = {name: value for name, value in run.facts.items() if name != "config_before"}
    for part in ("train", "validation"):
        cases = facts.get(part, {})
        facts[part] = {number: cases[name] for name, number in _numbers(cases).items()}
    facts |= {
        "command": [],
        "data": None,
        "test": list(_numbers(facts["test"]).values()),
        "config": config.model_dump(mode="json"),
    }
    adaptation = adaptation_of(run)
    if adaptation is not None:
        numbers = _numbers(adaptation.cases)
        held_out = [
            one.model_copy(update={"cases": [numbers[name] for name in one.cases]})
            for one in adaptation.held_out
        ]
        public = {
            "run": Path(adaptation.run).name,
            "cases": list(numbers.values()),
            "held_out": held_out,
        }
        facts["adaptation"] = adaptation.model_copy(update=public).model_dump()
    return facts


def write_json(path: Path, content: Any) -> None:
    """Write values as JSON."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def _numbers(names: Iterable[str]) -> dict[str, str]:
    """A number for each name of a case."""
    return {name: f"case {number}" for number, name in enumerate(names, start=1)}
