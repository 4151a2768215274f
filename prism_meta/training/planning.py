"""``plan``: sizes of the patch, the batch and the network from the data and the memory.

The rules are those of nnU-Net's planner (Isensee et al., Nature Methods 18, 2021, and its source), as far
as the networks here have such a choice: the spacing is the median of the cases, the patch has the aspect
ratio of the median volume and is as large as fits, the network has a scale more as long as its coarsest maps
keep four voxels, and what memory is left goes into the batch, then into the width. Memory is that of the
strategy (``step_memory``), so second order gets smaller patches than first order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.filesize import decimal
from torch import Tensor

from prism_meta.data.cache import CachedCase
from prism_meta.errors import ConfigError, PrismError
from prism_meta.training.build import build_episodes
from prism_meta.training.config import Config
from prism_meta.training.devices import device_kind, memory_of
from prism_meta.training.memory import StepMemory, step_memory
from prism_meta.training.plan_result import Choice, Plan
from prism_meta.training.survey_result import CaseSurvey, Survey
from prism_meta.training.trial import seconds_per_step

#: The keys that a plan chooses.
PLANNED = ("data.spacing", "data.patch", "data.batch_size", "model.width", "model.depth")
#: Slices that lie further apart than this many times their voxels are no volume to a 3-D network (nnU-Net).
ANISOTROPY = 3
#: A patch in 3-D has at least so many voxels per axis, or the whole volume; with less memory it is 2-D.
SMALLEST_VOLUME = 64
#: Sizes of a patch: multiples of the last, from the first to the second. Networks that are named by their
#: module may halve it five times.
SMALLEST, LARGEST, MULTIPLE = 32, 512, 16
MULTIPLE_OF_NAMED = 32
#: Number of patches in a batch, at first and at most, for 2-D and 3-D.
BATCHES = {2: (8, 32), 3: (2, 4)}
#: Channels at the finest scale, at first and at most.
WIDTHS = (8, 32)
#: The coarsest maps have at least so many voxels per axis, and there are at most so many scales.
COARSEST, SCALES = 4, 5
#: Bytes that preparing a case takes beside the libraries, per voxel of its files and per map, i.e. modality
#: or class. Measured; it is done before the first step, and not on the GPU.
PREPARATION, LIBRARIES = 15, 420 * 2**20
#: What is planned for if nobody says: on a CPU, larger steps take minutes; on a GPU, this share of it.
ON_CPU, SHARE_OF_GPU = 2 * 10**9, 0.9
#: Share of the given time that steps are planned for; the rest is for reading and writing.
SHARE_OF_TIME = 0.9
#: Episodes that are looked at for the one that shows the most modalities.
EPISODES = 200


def plan(
    config: Config,
    found: Survey,
    memory: int,
    *,
    on_try: Callable[[str], None] = lambda tried: None,
) -> Plan:
    """Choose ``data.spacing``, ``patch`` and ``batch_size``, ``model.width`` and ``depth``.

    Args:
        config: everything else, e.g. the strategy and the masks; what it says of these keys is not used.
        found: the data set. Headers are enough.
        memory: bytes that training may use.
        on_try: called with each choice whose memory is estimated, in words.

    Raises:
        ConfigError: the smallest choice needs more memory than ``memory``.
        PrismError: no case has a header that could be read.
    """
    largest = preparation(config, found)
    if largest > memory:
        raise ConfigError(
            f"memory: preparing the largest case needs {decimal(largest)}, but there are "
            f"{decimal(memory)}; give more memory"
        )
    named = config.model.is_named
    multiple = MULTIPLE_OF_NAMED if named else MULTIPLE
    spacing, shape, reason = _grid(found.cases)
    choices = [Choice("data.spacing", list(spacing), reason)]
    search = _Search(config, found, memory, spacing, on_try)
    flat = spacing[2] > ANISOTROPY * max(spacing[:2])
    dims, why = 2, f"slices lie more than {ANISOTROPY} times as far apart as their voxels"
    if not flat:
        least = tuple(min(SMALLEST_VOLUME, _up(size, multiple)) for size in shape)
        dims = 3 if search.fits(_Sizes(least, BATCHES[3][0], WIDTHS[0])) else 2
        size = " x ".join(map(str, least))
        why = (
            f"a volume of {size} does not fit" if dims == 2 else f"a volume of {size} or more fits"
        )
    (batch, most), whole = BATCHES[dims], {2: "slice", 3: "volume"}[dims]
    patches = list(_patches(shape[:dims], multiple))
    best = _largest(patches, lambda patch: search.fits(_Sizes(patch, batch, WIDTHS[0])))
    if best is None:
        needed = search.plan(_Sizes(patches[0], batch, WIDTHS[0]), ()).total
        raise ConfigError(
            f"memory: training on patches of {' x '.join(map(str, patches[0]))} needs "
            f"{decimal(needed)}, but there are {decimal(memory)}; give more memory, or use a strategy "
            "that needs less"
        )
    sizes = _Sizes(best, batch, WIDTHS[0])
    if best == patches[-1]:  # what is left goes into the batch, then into the width
        while sizes.batch < most and search.fits(sizes._replace(batch=2 * sizes.batch)):
            sizes = sizes._replace(batch=2 * sizes.batch)
        while (
            not named
            and sizes.width < WIDTHS[1]
            and search.fits(sizes._replace(width=2 * sizes.width))
        ):
            sizes = sizes._replace(width=2 * sizes.width)
        reason = f"the median {whole}"
    else:
        reason = "the largest that fits, in the proportions of the median volume"
    choices += [
        Choice("data.patch", list(sizes.patch), f"{reason}; {dims}-D, because {why}"),
        Choice(
            "data.batch_size", sizes.batch, f"{batch}; more only if the patch is the whole {whole}"
        ),
    ]
    if not named:
        choices += _of_network(sizes, most)
    return search.plan(sizes, choices)


def _of_network(sizes: _Sizes, most: int) -> list[Choice]:
    return [
        Choice(
            "model.width", sizes.width, f"{WIDTHS[0]}; more only if a batch of {most} fits as well"
        ),
        Choice(
            "model.depth",
            sizes.depth,
            f"its coarsest maps keep {COARSEST} voxels; at most {SCALES}",
        ),
    ]


def preparation(config: Config, found: Survey) -> int:
    """Bytes that preparing the largest case needs on a CPU; 0 on a GPU, which does not take part."""
    if device_kind(config.fabric.accelerator) != "cpu":
        return 0
    maps = len(found.modalities) + len(config.data.labels) + 1
    largest = max((math.prod(case.shape) for case in found.cases if case.shape), default=0)
    return LIBRARIES + PREPARATION * maps * largest


def with_steps(made: Plan, seconds: float) -> Plan:
    """The plan with as many outer steps as this machine takes in ``seconds``; it takes two of them."""
    device = device_kind(made.config.fabric.accelerator)
    each = seconds_per_step(made.config, made.masks, device=device)
    steps = max(1, int(SHARE_OF_TIME * seconds / each))
    values = made.config.model_dump()
    values["training"] |= {"steps": steps}
    reason = f"{each:.2g} s each on this machine, in {SHARE_OF_TIME:.0%} of the time"
    choice = Choice("training.steps", steps, reason)
    return replace(made, config=Config.model_validate(values), choices=(*made.choices, choice))


def default_memory(config: Config) -> int:
    """Bytes that are planned for if nobody says."""
    accelerator = config.fabric.accelerator
    there = memory_of(accelerator) or ON_CPU
    return min(there, ON_CPU) if device_kind(accelerator) == "cpu" else int(SHARE_OF_GPU * there)


class _Sizes(NamedTuple):
    patch: tuple[int, ...]
    batch: int
    width: int

    @property
    def depth(self) -> int:
        return max(2, min(SCALES, 1 + int(math.log2(min(self.patch) / COARSEST))))


class _Search:
    """Estimates the memory of choices, each once."""

    def __init__(
        self,
        config: Config,
        found: Survey,
        memory: int,
        spacing: Sequence[float],
        on_try: Callable[[str], None],
    ) -> None:
        self.base, self.found, self.memory = config, found, memory
        self.spacing, self.on_try = spacing, on_try
        self.tried: dict[_Sizes, tuple[StepMemory, list[Tensor]]] = {}

    def config(self, sizes: _Sizes) -> Config:
        values = self.base.model_dump()
        values["data"] |= {
            "spacing": self.spacing, "patch": sizes.patch, "batch_size": sizes.batch
        }  # fmt: skip
        if not self.base.model.is_named:
            values["model"] |= {"width": sizes.width, "depth": sizes.depth}
        return Config.model_validate(values)

    def fits(self, sizes: _Sizes) -> bool:
        try:
            return self.plan(sizes, ()).total <= self.memory
        except ConfigError:  # the network cannot run on this patch
            return False

    def plan(self, sizes: _Sizes, choices: Sequence[Choice]) -> Plan:
        config = self.config(sizes)
        if sizes not in self.tried:
            self.on_try(f"{sizes.batch} x {' x '.join(map(str, sizes.patch))}, width {sizes.width}")
            masks = most_shown(drawn_masks(config, self.found))
            with _of_model(config):
                self.tried[sizes] = step_memory(config, masks), masks
        step, masks = self.tried[sizes]
        return Plan(config, tuple(choices), step, tuple(masks), preparation(config, self.found))


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


def _up(size: float, multiple: int) -> int:
    return multiple * math.ceil(size / multiple)


def _grid(cases: Sequence[CaseSurvey]) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """The spacing of the model's grid, the median volume on it in voxels, and why."""
    read = [_in_slice_order(c) for c in cases if c.shape and c.spacing and c.slice_axis is not None]
    if not read:
        raise PrismError("plan: no case has a header that can be read; see prism-meta cases")
    spacings, shapes = (np.array(each) for each in zip(*read, strict=True))
    target = np.median(spacings, 0)
    size = np.median(shapes * spacings / target, 0)
    reason = f"median of {len(read)} cases"
    if target[2] > ANISOTROPY * target[:2].max() and size[2] * ANISOTROPY < size[:2].min():
        # Thick slices: few cases should lose slices.
        target[2] = max(np.percentile(spacings[:, 2], 10), target[:2].max())
        reason += "; of thick slices the 10th percentile"
    target = target.round(3)
    shape = np.median(shapes * spacings / target, 0)
    return tuple(target.tolist()), tuple(shape.tolist()), reason


def _in_slice_order(case: CaseSurvey) -> tuple[list[float], list[int]]:
    """Spacing and shape, the two axes in the plane first, as in the configuration."""
    assert case.shape is not None and case.spacing is not None and case.slice_axis is not None
    order = [axis for axis in range(3) if axis != case.slice_axis] + [case.slice_axis]
    return [case.spacing[axis] for axis in order], [case.shape[axis] for axis in order]


def _patches(shape: Sequence[float], multiple: int = MULTIPLE) -> Iterator[tuple[int, ...]]:
    """Patches in the proportions of ``shape``, from the smallest to all of it."""
    whole = [min(LARGEST, _up(size, multiple)) for size in shape]
    before = None
    for longest in range(SMALLEST, max(whole) + 1, multiple):
        scaled = (_up(longest * size / max(shape) - multiple / 2, multiple) for size in shape)
        patch = tuple(min(w, max(SMALLEST, s)) for w, s in zip(whole, scaled, strict=True))
        if patch != before:
            before = patch
            yield patch
    if before != tuple(whole):
        yield tuple(whole)


def _largest(
    patches: Sequence[tuple[int, ...]], fits: Callable[[tuple[int, ...]], bool]
) -> tuple[int, ...] | None:
    """The last patch that fits, found by bisection; None if not even the first does."""
    low, high = -1, len(patches)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(patches[middle]) else (low, middle)
    if low < 0:
        fits(patches[0])
        return None
    return patches[low]
