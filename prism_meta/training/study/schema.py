"""What a study file may say: its methods and conditions, and how many gradients, seeds and folds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, JsonValue, model_validator

from prism_meta.errors import ConfigError, raise_faults
from prism_meta.training.config.baselines import read_baseline
from prism_meta.training.config.file import read_config
from prism_meta.training.config.schema import Config
from prism_meta.training.config.types import (
    Positive,
    Rate,
    Repeats,
    Section,
    Share,
    Spacing,
    Steps,
    UserPath,
)

#: Keys of a configuration that the study itself sets for each run.
RESERVED = ("seed", "training.steps", "data.fold", "data.folds", "data.test_cases", "data.cache")
_NAME = re.compile(r"[^\s/\\|][^/\\|\n]{0,79}")
#: Section -> key -> value, as in a configuration file.
Settings = dict[str, dict[str, JsonValue]]


def _named(name: str) -> str:
    if not _NAME.fullmatch(name) or not name.isprintable():
        raise ValueError(f"got {name!r}, expected a short name without / \\ and |; give another")
    return name


Name = Annotated[str, AfterValidator(_named)]


class PhantomsConfig(Section):
    """Phantoms to train and test on, which the study writes itself."""

    #: Number of complete phantoms to train on; ``data.missing_rates`` makes modalities missing.
    train: Annotated[int, Field(strict=True, ge=2, le=10_000)] = 24
    #: Number of complete phantoms to test on, the same ones for all seeds.
    test: Annotated[int, Field(strict=True, ge=1, le=10_000)] = 12
    shape: tuple[Repeats, Repeats, Repeats] = (80, 96, 72)
    #: Edge of a voxel in mm.
    spacing: Spacing = 2.0
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = 0


class SearchConfig(Section):
    """A grid search of each method over its own rates, scored on validation patients only."""

    #: Key -> values to try for every method, e.g. ``"training.lr" = [0.002, 0.01]``.
    keys: dict[str, list[JsonValue]] = Field(default={})
    #: Number of patients to validate on, which are drawn from the training cases.
    validation: Repeats = 4
    #: Number of seeds whose scores are averaged. They are not among those of the study.
    seeds: Repeats = 1
    #: Gradients of a run of the search. Defaults to those of the study.
    evaluations: Steps | None = None


class MethodConfig(Section):
    """A method: what it changes in the configuration of all methods."""

    name: Name
    #: Baseline that it starts from, see ``BASELINES``.
    baseline: str | None = None
    settings: Settings = Field(default={})
    #: Further keys of the search.
    search: dict[str, list[JsonValue]] = Field(default={})


class ConditionConfig(Section):
    """A condition under which all methods are compared, e.g. missing rates."""

    name: Name
    settings: Settings = Field(default={})


class PowerConfig(Section):
    """The smallest difference of Dice that matters, and how surely it should be found."""

    effect: Positive = 0.02
    level: Rate = 0.05
    power: Share = 0.8


class Study(Section):
    """A whole study; see ``read_study``.

    Example:
        >>> methods = [{"name": "static", "settings": {"masks": {"train": "static"}}}, {"name": "dynamic"}]
        >>> study = Study.model_validate({"phantoms": {}, "methods": methods})
        >>> study.config(study.methods[0], study.conditions[0]).masks.train
        'static'
    """

    methods: tuple[MethodConfig, ...] = ()
    #: Name of the method that the others are compared with. Defaults to the first one.
    reference: str = ""
    conditions: Annotated[tuple[ConditionConfig, ...], Field(min_length=1)] = (
        ConditionConfig(name="all"),
    )
    #: Settings of all methods. Those of the condition, then those of the method come after them.
    settings: Settings = Field(default={})
    #: Folder of real cases; or phantoms, which the study writes.
    data: UserPath | None = None
    phantoms: PhantomsConfig | None = None
    #: Number of seeds, counted from 0.
    seeds: Repeats = 10
    #: Number of folds of real cases, so that each case is tested once per seed.
    folds: Annotated[int, Field(strict=True, ge=2, le=1000)] | None = None
    #: Gradients of the objective that each run may compute, on batches of ``settings.data.batch_size``; see
    #: ``MetaStrategy.evaluations``.
    evaluations: Steps = 1000
    #: Train all methods as long as the reference, too.
    equal_time: bool = True
    search: SearchConfig = SearchConfig()
    power: PowerConfig = PowerConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        faults = []
        for kind, named in (("methods", self.methods), ("conditions", self.conditions)):
            names = [each.name for each in named]
            twice = sorted({name for name in names if names.count(name) > 1})
            faults += [f"{kind}: {name!r} occurs twice; give each its own name" for name in twice]
        known = [method.name for method in self.methods]
        if not known:
            faults.append("methods: got none, expected at least one; add a section [[methods]]")
        elif self.reference and self.reference not in known:
            faults.append(
                f"reference: got {self.reference!r}, expected one of {', '.join(known)}; name one of them"
            )
        if (self.data is None) == (self.phantoms is None):
            faults.append(
                "data, phantoms: got both or neither; give a folder of cases, or the section phantoms"
            )
        if self.data is not None and self.folds is None:
            faults.append("folds: real cases need a number of folds, e.g. folds = 5; give it")
        if self.phantoms is not None and self.folds is not None:
            faults.append("folds: phantoms are tested on phantoms.test others; leave folds out")
        faults += self._key_faults()
        raise_faults(ConfigError, faults)
        return self

    def _key_faults(self) -> list[str]:
        """Keys that the study sets itself, and settings that make no configuration."""
        faults = []
        parts: list[tuple[str, Mapping[str, Any]]] = [("settings", self.settings)]
        parts += [(f"methods, {m.name}", m.settings) for m in self.methods]
        parts += [(f"conditions, {c.name}", c.settings) for c in self.conditions]
        for place, settings in parts:
            keys = [f"{section}.{key}" for section, inner in settings.items() for key in inner]
            faults += [
                f"{place}: {key} is set by the study for each run; leave it out"
                for key in keys
                if key in RESERVED
            ]
        if faults:
            return faults
        for condition in self.conditions:
            for method in self.methods:
                for point in self.grid(method) or [{}]:
                    try:
                        self.config(method, condition, point)
                    except ConfigError as error:
                        faults += [f"methods, {method.name}: {fault}" for fault in error.faults]
        return list(dict.fromkeys(faults))

    @property
    def batch_size(self) -> int:
        """Samples of the batch whose gradient counts as one; see ``evaluations``."""
        found = self.settings.get("data", {}).get("batch_size")
        return found if isinstance(found, int) else Config().data.batch_size

    @property
    def first(self) -> MethodConfig:
        """The method that the others are compared with."""
        return next((m for m in self.methods if m.name == self.reference), self.methods[0])

    def grid(self, method: MethodConfig) -> list[dict[str, JsonValue]]:
        """The points of the search of a method; empty without a search."""
        points: list[dict[str, JsonValue]] = [{}]
        for key, values in {**self.search.keys, **method.search}.items():
            points = [{**point, key: value} for point in points for value in values]
        return points if len(points) > 1 else []

    def config(
        self,
        method: MethodConfig,
        condition: ConditionConfig,
        point: Mapping[str, JsonValue] | None = None,
        **keys: JsonValue,
    ) -> Config:
        """The configuration of a run.

        Args:
            method: one of ``methods``.
            condition: one of ``conditions``.
            point: of the search, see ``grid``.
            keys: section -> keys that the study sets.

        Raises:
            ConfigError: the settings make no configuration.
        """
        start = {} if method.baseline is None else read_baseline(method.baseline)
        values: dict[str, Any] = {}
        by_section: dict[str, dict[str, Any]] = {}
        for key, value in (point or {}).items():
            section, _, name = key.partition(".")
            by_section.setdefault(section, {})[name] = value
        for layer in (start, self.settings, condition.settings, method.settings, by_section, keys):
            for section, inner in layer.items():
                values[section] = (
                    {**values.get(section, {}), **inner} if isinstance(inner, dict) else inner
                )
        return read_config(Config, start=values)


def read_study(path: Path | str) -> Study:
    """Read a study file (TOML).

    Raises:
        ConfigError: all its faults together.
    """
    return read_config(Study, path, start={})
