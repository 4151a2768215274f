"""The file of a run's clean-up: written when training ends, and checked when it is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prism_meta.errors import PrismError, one_line
from prism_meta.evaluation.cleanup import Cleanup, RegionRule
from prism_meta.files import write_whole
from prism_meta.training.build import build_label_set
from prism_meta.training.config import Config

#: Name of the file in the run folder.
CLEANUP = "postprocessing.json"

_Ml = Annotated[float, Field(ge=0, le=10**6, allow_inf_nan=False)]
_Dice = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Chosen(NamedTuple):
    """A clean-up and what it was chosen by.

    Args:
        cleanup: the rules.
        raw: mean Dice of the validation cases without it, in [0, 1].
        cleaned: mean Dice with it.
    """

    cleanup: Cleanup
    raw: float
    cleaned: float


class _Rule(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    largest: bool
    component_ml: _Ml
    total_ml: _Ml


class _File(BaseModel):
    """The schema of ``postprocessing.json``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    regions: dict[str, _Rule]
    cases: list[str]
    dice: _Dice
    cleaned_dice: _Dice


def write_cleanup(folder: Path, chosen: Chosen, *, cases: Sequence[str]) -> None:
    """Write ``postprocessing.json``.

    Args:
        folder: the run folder.
        chosen: what ``choose_cleanup`` returned.
        cases: names of the validation cases.

    Raises:
        OutputError: the file cannot be written.
    """
    content = {
        "regions": {name: asdict(rule) for name, rule in chosen.cleanup.rules.items()},
        "cases": list(cases),
        "dice": chosen.raw,
        "cleaned_dice": chosen.cleaned,
    }
    write_whole(folder / CLEANUP, json.dumps(content, indent=2) + "\n")


def read_cleanup(folder: Path, config: Config) -> Cleanup:
    """The clean-up of a run whose training has ended; one that does nothing for a run without validation.

    A run that was adapted has no validation, but the file of the run that it comes from.

    Args:
        folder: the run folder.
        config: its configuration.

    Raises:
        PrismError: the file is missing, damaged, or has rules for regions that the run does not have.
    """
    path = folder / CLEANUP
    if not config.validation.is_on and not path.exists():
        return Cleanup()
    fix = f"choose it again with prism-meta train --resume {folder}, or use --clean-up none"
    try:
        found = _File.model_validate(json.loads(path.read_bytes()))
    except FileNotFoundError as error:
        raise PrismError(f"{path}: is missing; {fix}") from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise PrismError(f"{path}: cannot be read ({reason}); {fix}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        reason = one_line(f"{where}: {first['msg'].lower()}")
        raise PrismError(f"{path}: is damaged ({reason}); {fix}") from error
    except (ValueError, RecursionError) as error:
        raise PrismError(f"{path}: is damaged ({one_line(str(error))}); {fix}") from error
    regions = build_label_set(config.data).regions
    unknown = [name for name in found.regions if name not in regions]
    if unknown:
        raise PrismError(
            f"{path}: has rules for {one_line(', '.join(unknown))}, but the run has the regions "
            f"{', '.join(regions)}; {fix}"
        )
    return Cleanup({name: RegionRule(**rule.model_dump()) for name, rule in found.regions.items()})
