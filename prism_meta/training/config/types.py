"""The types of the values of a configuration, with their bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

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
UserPath = Annotated[Path, BeforeValidator(user_path)]


class Section(BaseModel):
    """Keys that belong together. Unknown ones are faults, and values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)
