"""The section ``data`` of a configuration: cases, their labels, and the patches drawn from them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from prism_meta.data.drawing import DEFAULT_FOREGROUND
from prism_meta.data.grids import Align
from prism_meta.data.labels import BRATS_LABELS, LabelSet
from prism_meta.data.preprocessing import DEFAULT_SPACING
from prism_meta.data.splits import By
from prism_meta.errors import ConfigError, PrismError, raise_faults
from prism_meta.evaluation.windows import PATCHES
from prism_meta.modalities import BRATS, composed, modality_faults
from prism_meta.training.config.types import (
    Class,
    Patterns,
    Rate,
    Section,
    Share,
    Size,
    Spacing,
    UserPath,
)


def _label_faults(labels: dict[str, int], regions: dict[str, tuple[str, ...]]) -> list[str]:
    try:
        LabelSet(labels, regions)
    except PrismError as error:
        return list(error.faults)
    return []


class DataConfig(Section):
    """Cases, their labels, and the patches drawn from them."""

    modalities: tuple[str, ...] = BRATS
    label: str = "seg"
    #: How the cases lie on disk; "auto" finds out. See ``load_cases``.
    layout: Literal["auto", "folders", "flat", "bids", "decathlon", "nnunet", "manifest"] = "auto"
    #: Modality or label -> patterns of its files (or channels, or columns), e.g. ``lge = ["*_DE*"]``. Names
    #: of known data sets need none.
    files: dict[str, Patterns] = Field(default={})
    labels: dict[str, Class] = Field(default=dict(BRATS_LABELS.values))
    #: Region -> classes. Defaults to WT, TC and ET for the BraTS labels, otherwise to one per class.
    regions: dict[str, tuple[str, ...]] = Field(default={})
    #: Voxel size of the model's grid in mm: two numbers in the plane of the slices, as they were acquired,
    #: then their distance. Slices are stacked along the axis with the largest voxels of each case, or along
    #: the third axis of its files where all are alike.
    spacing: tuple[Spacing, Spacing, Spacing] = DEFAULT_SPACING
    #: Whether files that lie more than a tenth of a voxel off the grid of their case are faults, or are
    #: resampled onto it: onto the grid of the label, or of the first modality without a label.
    align: Align = "refuse"
    #: Voxels; two numbers train on slices, three on volumes.
    patch: Annotated[tuple[Size, ...], Field(min_length=2, max_length=3)] = PATCHES[2]
    batch_size: Annotated[int, Field(strict=True, ge=1, le=10**6)] = 8
    #: Share of patches centred on a foreground class.
    foreground: Share = DEFAULT_FOREGROUND
    #: CSV that says which modalities to use, see ``read_availability``. As in every path of a configuration,
    #: ``~`` is the home folder, and a relative path starts at the current folder. A run stores it absolute.
    availability: UserPath | None = None
    #: Rates at which modalities are made missing in the training cases, instead of a table.
    missing_rates: tuple[Rate, ...] | None = None
    #: Rates of the same cases in meta batches, drawn apart. Defaults to what they have in train batches.
    meta_missing_rates: tuple[Rate, ...] | None = None
    #: Cases that are held out for ``evaluate``, by name; or their number, drawn with the seed. Draws are
    #: stratified by availability.
    test_cases: tuple[Annotated[str, AfterValidator(composed)], ...] = ()
    holdout: Annotated[int, Field(strict=True, ge=0, le=10**6)] = 0
    #: Cross-validation instead: the number of folds, drawn with the seed, or a JSON file that names their
    #: cases; and the fold that is held out, from 0. The run folder gets them as ``folds.json``.
    folds: Annotated[int, Field(strict=True, ge=2, le=10**6)] | UserPath | None = None
    fold: Annotated[int, Field(strict=True, ge=0, le=10**6)] | None = None
    #: What draws keep together: the cases of a patient, or all those of a site.
    split: By = "patient"
    #: Folder of prepared volumes. Defaults to a folder beside the run folder.
    cache: UserPath | None = None
    #: Number of additional processes that load data. Defaults to one on a CPU with more than two
    #: cores, to up to four for a GPU, and to none for fewer than 50 episodes.
    workers: Annotated[int, Field(strict=True, ge=0, le=256)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        faults = modality_faults(self.modalities, self.label)
        for name in ("missing_rates", "meta_missing_rates"):
            rates = getattr(self, name)
            if rates is not None and len(rates) != len(self.modalities):
                faults.append(
                    f"{name}: got {len(rates)} rates; give {len(self.modalities)}, one per modality"
                )
        if self.missing_rates is not None and self.availability is not None:
            faults.append("missing_rates, availability: got both; leave out one of the two")
        if self.test_cases and self.holdout:
            faults.append("test_cases, holdout: got both; leave out one of the two")
        if self.folds is not None and (self.test_cases or self.holdout):
            faults.append("folds: got test_cases or holdout, too; leave out one of the two")
        if (self.folds is None) != (self.fold is None):
            faults.append("folds, fold: got one without the other; give both, or leave both out")
        elif isinstance(self.folds, int) and self.fold is not None and self.fold >= self.folds:
            faults.append(
                f"fold: got {self.fold}, expected at most {self.folds - 1}, because folds are counted from "
                "0; give another"
            )
        faults += [
            f"files: got {name!r}, expected one of {', '.join((*self.modalities, self.label))}; correct "
            "the name"
            for name in self.files
            if name not in (*self.modalities, self.label)
        ]
        if len(set(self.test_cases)) < len(self.test_cases):
            faults.append("test_cases: a case occurs twice; give each name once")
        faults += _label_faults(self.labels, self.regions)
        raise_faults(ConfigError, faults)
        return self
