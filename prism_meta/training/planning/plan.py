"""``plan``: sizes of the patch, the batch and the network from the data, the memory and the time.

The rules are those of nnU-Net's planner (Isensee et al., Nature Methods 18, 2021, and its source), as far
as the networks here have such a choice: the spacing is the median of the cases, the patch has the aspect
ratio of the median volume and is as large as fits, the network has a scale more as long as its coarsest maps
keep four voxels, and what memory is left goes into the batch, then into the width. Memory is that of the
strategy (``step_memory``), so second order gets smaller patches than first order.

nnU-Net trains for days. In a given time, large patches leave few steps, and fine voxels leave most of them
unseen, which costs more than it brings (``benchmarks/planning.py``). So with a time the patch is the largest
with which the machine takes as many steps as are configured, and the voxels grow until those steps see the
volumes once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from rich.filesize import decimal

from prism_meta.errors import ConfigError, PrismError
from prism_meta.training.config import Config
from prism_meta.training.devices import device_kind, memory_of
from prism_meta.training.planning.result import Choice, Plan
from prism_meta.training.planning.search import (
    COARSEST,
    SCALES,
    Search,
    Sizes,
    largest,
    patches,
    preparation,
    rounded_up,
)
from prism_meta.training.profiling.trial import seconds_per_step
from prism_meta.training.survey.result import CaseSurvey, Survey

#: The keys that a plan chooses.
PLANNED = ("data.spacing", "data.patch", "data.batch_size", "model.width", "model.depth")
#: Slices that lie further apart than this many times their voxels are no volume to a 3-D network (nnU-Net).
ANISOTROPY = 3
#: A patch in 3-D has at least so many voxels per axis, or the whole volume; with less memory it is 2-D.
SMALLEST_VOLUME = 64
#: Number of patches in a batch, at first and at most, for 2-D and 3-D.
BATCHES = {2: (8, 32), 3: (2, 4)}
#: Channels at the finest scale, at first and at most.
WIDTHS = (8, 32)
#: Voxels of the model's grid are at most so many times as long as the median of the cases.
COARSER = 2.0
#: What is planned for if nobody says: on a CPU, larger steps take minutes; on a GPU, this share of it.
ON_CPU, SHARE_OF_GPU = 2 * 10**9, 0.9
#: Share of the given time that steps are planned for; the rest is for reading and writing.
SHARE_OF_TIME = 0.9


def plan(
    config: Config,
    found: Survey,
    memory: int,
    *,
    seconds: float | None = None,
    on_try: Callable[[str], None] = lambda tried: None,
) -> Plan:
    """Choose ``data.spacing``, ``patch`` and ``batch_size``, ``model.width`` and ``depth``.

    Args:
        config: everything else, e.g. the strategy and the masks; what it says of these keys is not used.
        found: the data set. Headers are enough.
        memory: bytes that training may use.
        seconds: time of the training, which also chooses ``training.steps``; steps are then taken on this
            machine, to see how long they take. Defaults to any time.
        on_try: called with each choice whose memory is estimated, in words.

    Raises:
        ConfigError: the smallest choice needs more memory than ``memory``.
        PrismError: no case has a header that could be read.
    """
    needed = preparation(config, found)
    if needed > memory:
        raise ConfigError(
            f"memory: preparing the largest case needs {decimal(needed)}, but there are "
            f"{decimal(memory)}; give more memory"
        )
    spacing, shape, reason = _grid(found.cases)
    each = None if seconds is None else SHARE_OF_TIME * seconds / config.training.steps

    def sized(spacing: Sequence[float], shape: Sequence[float], reason: str) -> Plan:
        search = Search(config, found, memory, spacing, each=each, on_try=on_try)
        return _sized(search, shape, [Choice("data.spacing", list(spacing), reason)])

    made = sized(spacing, shape, reason)
    if seconds is None:
        return made
    made = with_steps(made, seconds)
    factors = _coarser(made, shape, cases=len(found.cases))
    if max(factors) > 1:
        coarse = [round(a * b, 2) for a, b in zip(spacing, factors, strict=True)]
        shape = tuple(n * a / b for n, a, b in zip(shape, spacing, coarse, strict=True))
        reason += f", times {max(factors):.2f}, so that the steps see the volumes once"
        made = with_steps(sized(coarse, shape, reason), seconds)
    return made


def _sized(search: Search, shape: Sequence[float], choices: list[Choice]) -> Plan:
    """Choose everything but the spacing. ``shape`` is the size of the median volume in voxels."""
    named, memory = search.base.model.is_named, search.memory
    flat = search.spacing[2] > ANISOTROPY * max(search.spacing[:2])
    dims, why = 2, f"slices lie more than {ANISOTROPY} times as far apart as their voxels"
    if not flat:
        least = tuple(min(SMALLEST_VOLUME, rounded_up(n, search.multiple)) for n in shape)
        dims = 3 if search.fits(Sizes(least, BATCHES[3][0], WIDTHS[0])) else 2
        size = " x ".join(map(str, least))
        why = (
            f"a volume of {size} does not fit" if dims == 2 else f"a volume of {size} or more fits"
        )
    (batch, most), whole = BATCHES[dims], {2: "slice", 3: "volume"}[dims]
    every = list(patches(shape[:dims], search.multiple))
    best = largest(every, lambda patch: search.fits(Sizes(patch, batch, WIDTHS[0])))
    if best is None and search.fits_memory(Sizes(every[0], batch, WIDTHS[0])):
        best = every[0]  # the time is for fewer steps than are configured
    if best is None:
        needed = search.plan(Sizes(every[0], batch, WIDTHS[0]), ()).total
        raise ConfigError(
            f"memory: training on patches of {' x '.join(map(str, every[0]))} needs "
            f"{decimal(needed)}, but there are {decimal(memory)}; give more memory, or use a strategy "
            "that needs less"
        )
    sizes = Sizes(best, batch, WIDTHS[0])
    if best == every[-1]:  # what is left goes into the batch, then into the width
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
    choices.append(Choice("data.patch", list(sizes.patch), f"{reason}; {dims}-D, because {why}"))
    choices.append(
        Choice(
            "data.batch_size", sizes.batch, f"{batch}; more only if the patch is the whole {whole}"
        )
    )
    if not named:
        wide = f"{WIDTHS[0]}; more only if a batch of {most} fits as well"
        deep = f"its coarsest maps keep {COARSEST} voxels; at most {SCALES}"
        choices.append(Choice("model.width", sizes.width, wide))
        choices.append(Choice("model.depth", sizes.depth, deep))
    return search.plan(sizes, choices)


def _coarser(made: Plan, shape: Sequence[float], *, cases: int) -> tuple[float, float, float]:
    """How many times longer voxels should be, so that the patches of the training see the volumes once.

    The distance of thick slices stays as it is.
    """
    config = made.config
    batches = 1 + (config.meta.inner_steps if config.meta.kind.adapts else 1)
    drawn = config.training.steps * config.meta.episodes * batches * config.data.batch_size
    passes = drawn * math.prod(config.data.patch) / (cases * math.prod(shape))
    thick = config.data.spacing[2] > ANISOTROPY * max(config.data.spacing[:2])
    factor = min(COARSER, max(1.0, passes ** (-1 / 2 if thick else -1 / 3)))
    return (factor, factor, 1.0 if thick else factor)


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
