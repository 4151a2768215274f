"""The sizes that a plan tries: whether they fit into the memory and the time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from prism_meta.data.cache import CachedCase
from prism_meta.errors import ConfigError, PrismError
from prism_meta.training.build import build_episodes
from prism_meta.training.config import Config
from prism_meta.training.devices import device_kind
from prism_meta.training.planning.result import Choice, Plan
from prism_meta.training.profiling.memory import StepMemory, step_memory
from prism_meta.training.profiling.trial import seconds_per_step
from prism_meta.training.survey.result import Survey

#: Sizes of a patch: multiples of the last, from the first to the second. Networks that are named by their
#: module may halve it five times.
SMALLEST, LARGEST, MULTIPLE = 32, 512, 16
MULTIPLE_OF_NAMED = 32
#: The coarsest maps have at least so many voxels per axis, and there are at most so many scales.
COARSEST, SCALES = 4, 5
#: Bytes that preparing a case takes beside the libraries, per voxel of its files and per map, i.e. modality
#: or class. Measured; it is done before the first step, and not on the GPU.
PREPARATION, LIBRARIES = 15, 420 * 2**20
#: Episodes that are looked at for the one that shows the most modalities.
EPISODES = 200


class Sizes(NamedTuple):
    """What a plan chooses beside the voxels.

    Args:
        patch: in voxels.
        batch: number of patches.
        width: channels at the finest scale.
    """

    patch: tuple[int, ...]
    batch: int
    width: int

    @property
    def depth(self) -> int:
        """Number of scales."""
        return max(2, min(SCALES, 1 + int(math.log2(min(self.patch) / COARSEST))))


class Search:
    """Estimates the memory of sizes and, if time matters, takes steps; each once.

    Args:
        config: everything that is not chosen.
        found: the data set.
        memory: bytes that there are.
        spacing: of the model's grid, mm.
        each: seconds that an outer step may take. Defaults to any.
        on_try: called with what is tried, in words.
    """

    def __init__(
        self,
        config: Config,
        found: Survey,
        memory: int,
        spacing: Sequence[float],
        *,
        each: float | None,
        on_try: Callable[[str], None],
    ) -> None:
        self.base, self.found, self.memory = config, found, memory
        self.spacing, self.each, self.on_try = spacing, each, on_try
        self._memories: dict[Sizes, tuple[StepMemory, list[Tensor]]] = {}
        self._times: dict[Sizes, float] = {}

    @property
    def multiple(self) -> int:
        """What sizes of a patch are multiples of."""
        return MULTIPLE_OF_NAMED if self.base.model.is_named else MULTIPLE

    def config(self, sizes: Sizes) -> Config:
        """The configuration with these sizes."""
        values = self.base.model_dump()
        values["data"] |= {
            "spacing": self.spacing, "patch": sizes.patch, "batch_size": sizes.batch
        }  # fmt: skip
        if not self.base.model.is_named:
            values["model"] |= {"width": sizes.width, "depth": sizes.depth}
        return Config.model_validate(values)

    def fits(self, sizes: Sizes) -> bool:
        """Whether there are the memory and the time."""
        return self.fits_memory(sizes) and (self.each is None or self.seconds(sizes) <= self.each)

    def fits_memory(self, sizes: Sizes) -> bool:
        """Whether there is the memory; not if the network cannot run on such a patch."""
        try:
            return self.plan(sizes, ()).total <= self.memory
        except ConfigError:
            return False

    def seconds(self, sizes: Sizes) -> float:
        """The time of an outer step on this machine."""
        if sizes not in self._times:
            self.on_try(f"a step of {_words(sizes)}")
            made = self.plan(sizes, ())
            device = device_kind(self.base.fabric.accelerator)
            self._times[sizes] = seconds_per_step(made.config, made.masks, device=device)
        return self._times[sizes]

    def plan(self, sizes: Sizes, choices: Sequence[Choice]) -> Plan:
        """The plan with these sizes.

        Raises:
            ConfigError: a network that is named by its module cannot run on such a patch.
        """
        config = self.config(sizes)
        if sizes not in self._memories:
            self.on_try(_words(sizes))
            masks = most_shown(drawn_masks(config, self.found))
            with _of_model(config):
                self._memories[sizes] = step_memory(config, masks), masks
        step, masks = self._memories[sizes]
        return Plan(config, tuple(choices), step, tuple(masks), preparation(config, self.found))


def preparation(config: Config, found: Survey) -> int:
    """Bytes that preparing the largest case needs on a CPU; 0 on a GPU, which does not take part."""
    if device_kind(config.fabric.accelerator) != "cpu":
        return 0
    maps = len(found.modalities) + len(config.data.labels) + 1
    largest = max((math.prod(case.shape) for case in found.cases if case.shape), default=0)
    return LIBRARIES + PREPARATION * maps * largest


@contextmanager
def _of_model(config: Config) -> Iterator[None]:
    """Say why a network that is named by its module cannot be planned for."""
    try:
        yield
    except (NotImplementedError, ValueError, RuntimeError) as error:
        if not config.model.is_named or isinstance(error, PrismError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        size = " x ".join(map(str, config.data.patch))
        raise ConfigError(
            f"model.network: {config.model.network} cannot be run without values on a patch of {size} "
            f"({reason}), so its memory is unknown; set data.patch and data.batch_size yourself"
        ) from error


def drawn_masks(config: Config, found: Survey) -> Iterator[list[Tensor]]:
    """The masks of the episodes that training will draw, one after the other."""
    shown = [torch.tensor([m in c.modalities for m in found.modalities]) for c in found.cases]
    cases = [  # no patch of them is read
        CachedCase(c.id, rows, (1, 1, 1), Path(), rows, site=c.site, patient=c.patient)
        for c, rows in zip(found.cases, shown, strict=True)
    ]
    steps = config.meta.inner_steps if config.meta.kind.adapts else 1
    episodes = build_episodes(config, cases, inner_steps=steps)
    return (episodes.masks(step) for step in range(len(episodes)))


def most_shown(episodes: Iterator[list[Tensor]]) -> list[Tensor]:
    """The masks of the episode that shows the most modalities of all its samples, of the first few.

    Example:
        >>> few, all_of_them = [torch.eye(2).bool()] * 2, [torch.ones(2, 2).bool()] * 2
        >>> most_shown(iter([few, all_of_them, few])) is all_of_them
        True
    """
    first = (masks for masks, _ in zip(episodes, range(EPISODES), strict=False))
    return max(first, key=lambda masks: sum(int(mask.sum()) for mask in masks))


def _words(sizes: Sizes) -> str:
    return f"{sizes.batch} x {' x '.join(map(str, sizes.patch))}, width {sizes.width}"


def rounded_up(size: float, multiple: int) -> int:
    """The next multiple."""
    return multiple * math.ceil(size / multiple)


def patches(shape: Sequence[float], multiple: int = MULTIPLE) -> Iterator[tuple[int, ...]]:
    """Patches in the proportions of ``shape``, from the smallest to all of it."""
    whole = [min(LARGEST, rounded_up(size, multiple)) for size in shape]
    before = None
    for longest in range(SMALLEST, max(whole) + 1, multiple):
        scaled = (
            rounded_up(longest * size / max(shape) - multiple / 2, multiple) for size in shape
        )
        patch = tuple(min(w, max(SMALLEST, s)) for w, s in zip(whole, scaled, strict=True))
        if patch != before:
            before = patch
            yield patch
    if before != tuple(whole):
        yield tuple(whole)


def largest(
    sizes: Sequence[tuple[int, ...]], fits: Callable[[tuple[int, ...]], bool]
) -> tuple[int, ...] | None:
    """The last patch that fits, found by bisection; None if not even the first does."""
    low, high = -1, len(sizes)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(sizes[middle]) else (low, middle)
    if low < 0:
        fits(sizes[0])
        return None
    return sizes[low]
