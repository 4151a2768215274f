"""The types of the values of a configuration, with their bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from prism_meta.errors import ConfigError
from prism_meta.training.config.file import user_path

# Numbers are strict, so that ``steps = true`` and ``steps = "5"`` are faults. Upper bounds lie beyond any
# use; they keep a slip of the keyboard from running for ever.
Rate = Annotated[float, Field(strict=True, ge=0, lt=1)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
Positive = Annotated[float, Field(strict=True, gt=0, le=10**6, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(strict=True, ge=0, le=10**6, allow_inf_nan=False)]
#: Size of a voxel in mm.
Spacing = Annotated[float, Field(strict=True, ge=0.001, le=100)]
Steps = Annotated[int, Field(strict=True, ge=1, le=10**8)]
Repeats = Annotated[int, Field(strict=True, ge=1, le=10_000)]
Size = Annotated[int, Field(strict=True, ge=1, le=4096)]
Class = Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)]
#: The Dice that decides which weights are the best: the mean over subsets, or that of the worst one.
Select = Literal["mean", "worst"]


def listed(value: object) -> object:
    """One string is a list of one."""
    return (value,) if isinstance(value, str) else value


def _pattern(text: str) -> str:
    """A pattern of file names within the folder of a case.

    Raises:
        ConfigError: it can fit no file there.
    """
    parts = text.split("/")
    if not text.strip() or not text.isprintable() or ".." in parts or "" in parts:
        raise ConfigError(
            f"got the pattern {text!r}, expected the end of a file name, e.g. *_DE*, with folders at most "
            "within that of the case; correct it"
        )
    return text


#: Patterns of file names, with * and ?.
Patterns = Annotated[
    tuple[Annotated[str, AfterValidator(_pattern)], ...],
    BeforeValidator(listed),
    Field(min_length=1),
]
UserPath = Annotated[Path, BeforeValidator(user_path)]


class Section(BaseModel):
    """Keys that belong together. Unknown ones are faults, and values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)
