"""Plans: the grid and the sizes that follow from the data and the memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import faults_of

from prism_meta.errors import ConfigError, PrismError
from prism_meta.modalities import BRATS
from prism_meta.training.config import Config, load_config
from prism_meta.training.planning import plan as planning
from prism_meta.training.planning import result as plan_result
from prism_meta.training.planning import search as plan_search
from prism_meta.training.planning.plan import default_memory, plan, with_steps
from prism_meta.training.planning.result import OUTSIDE, Plan
from prism_meta.training.planning.search import drawn_masks, most_shown
from prism_meta.training.profiling.trial import seconds_per_step
from prism_meta.training.survey.result import CaseSurvey, Survey

CONFIG = load_config(overrides=["fabric.accelerator=cpu"])
Grid = tuple[tuple[int, int, int], tuple[float, float, float], int]


def found(*grids: Grid, modalities: Sequence[tuple[str, ...]] = (BRATS,)) -> Survey:
    """A case for each shape, spacing and slice axis."""
    return Survey(
        "a folder per case",
        modalities=BRATS,
        cases=tuple(
            CaseSurvey(
                f"p{k}",
                patient=f"p{k}",
                site=None,
                modalities=modalities[k % len(modalities)],
                label=True,
                shape=shape,
                spacing=spacing,
                slice_axis=axis,
            )
            for k, (shape, spacing, axis) in enumerate(grids)
        ),
    )


BRAIN: Grid = ((240, 240, 155), (1, 1, 1), 2)


@pytest.fixture
def by_voxels(memory_by_voxels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of a step is 1000 bytes per voxel and channel, and the process needs no other."""
    monkeypatch.setattr(plan_result, "OUTSIDE", {"cpu": 0})
    monkeypatch.setattr(plan_result, "FRAGMENTS", {"cpu": 0.0})
    for module in (planning, plan_search):
        monkeypatch.setattr(module, "preparation", lambda config, found: 0)


def chosen(made: Plan) -> tuple[tuple[int, ...], int, int]:
    return made.config.data.patch, made.config.data.batch_size, made.config.model.width


@pytest.mark.usefixtures("by_voxels")
@pytest.mark.parametrize("memory", [10**8, 3 * 10**8, 10**9, 3 * 10**9])
@pytest.mark.parametrize("grid", [BRAIN, ((250, 300, 9), (1.2, 1.2, 10), 2)])
def test_the_patch_is_the_largest_that_fits(grid: Grid, memory: int) -> None:
    made = plan(CONFIG, found(grid, grid), memory)
    patch, batch, width = chosen(made)
    assert made.total <= memory and width == 8
    every = list(plan_search.patches(grid[0][: len(patch)]))
    assert patch in every
    larger = every[every.index(patch) + 1]
    voxels = batch * 8 * 1000
    for size in larger:
        voxels *= size
    assert voxels > memory


@pytest.mark.usefixtures("by_voxels")
def test_dimensions() -> None:
    volume = 2 * 64**3 * 8 * 1000
    # The proportions of the median volume.
    assert chosen(plan(CONFIG, found(BRAIN, BRAIN), volume))[0] == (64, 64, 48)
    less = plan(CONFIG, found(BRAIN, BRAIN), volume - 1)
    assert len(less.config.data.patch) == 2
    assert "2-D, because a volume of 64 x 64 x 64 does not fit" in less.choices[1].reason
    thick = plan(CONFIG, found(*[((200, 200, 60), (1.0, 1.0, 3.5), 2)] * 2), 10 * volume)
    assert len(thick.config.data.patch) == 2
    assert "slices lie more than 3 times as far apart" in thick.choices[1].reason


@pytest.mark.usefixtures("by_voxels")
def test_what_is_left_goes_into_the_batch_then_into_the_width() -> None:
    small: Grid = ((96, 96, 10), (1, 1, 8), 2)
    slice_ = 96 * 96 * 1000 * 8
    for memory, expected in (
        (8 * slice_, (8, 8)),
        (16 * slice_, (16, 8)),
        (63 * slice_, (32, 8)),
        (64 * slice_, (32, 16)),
        (10**4 * slice_, (32, 32)),
    ):
        made = plan(CONFIG, found(small, small), memory)
        assert chosen(made) == ((96, 96), *expected)
        assert "the median slice" in made.choices[1].reason


@pytest.mark.usefixtures("by_voxels")
def test_the_grid_is_the_median_in_the_order_of_the_slices() -> None:
    cases = found(
        ((30, 200, 220), (4.0, 0.9, 0.8), 0),  # sagittal
        ((240, 240, 155), (1, 1, 1), 2),
        ((200, 100, 220), (0.7, 2.0, 0.9), 1),  # coronal
    )
    made = plan(CONFIG, cases, 10**9)
    assert made.config.data.spacing == (0.9, 0.9, 2.0)
    assert made.choices[0].reason == "median of 3 cases"
    # Thick slices: the tenth percentile keeps most of them.
    spacings = [4.0, 8.0, 8.0, 8.0, 10.0]
    thick = [((256, 256, 20), (1.0, 1.0, distance), 2) for distance in spacings]
    made = plan(CONFIG, found(*thick), 10**9)
    assert made.config.data.spacing == (1.0, 1.0, 5.6)


@pytest.mark.parametrize("shape", [(240, 240, 155), (500, 700), (20, 24, 16), (1000, 33, 64)])
def test_patches_grow_to_the_whole(shape: tuple[int, ...]) -> None:
    patches = list(plan_search.patches(shape))
    whole = tuple(min(512, -(-size // 16) * 16) for size in shape)
    assert patches[-1] == whole
    for before, after in pairwise(patches):
        assert before != after and all(a <= b for a, b in zip(before, after, strict=True))
    for patch in patches:
        assert all(size % 16 == 0 for size in patch)
        assert all(size <= limit for size, limit in zip(patch, whole, strict=True))


@pytest.mark.usefixtures("by_voxels")
@pytest.mark.parametrize("grid", [BRAIN, ((250, 300, 9), (1.2, 1.2, 10), 2)])
@pytest.mark.parametrize("minutes", [1, 5, 20, 100, 1000])
def test_a_time_leaves_as_many_steps_as_are_configured(
    grid: Grid, minutes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A voxel of a patch takes 3 microseconds.
    each = {}

    def seconds(config: Config, masks: object, *, device: str) -> float:
        each[config.data.patch] = 3e-6 * config.data.batch_size * math.prod(config.data.patch)
        return each[config.data.patch]

    for module in (planning, plan_search):
        monkeypatch.setattr(module, "seconds_per_step", seconds)
    cases, wanted = found(*[grid] * 4), CONFIG.training.steps
    made = plan(CONFIG, cases, 3 * 10**9, seconds=60 * minutes)
    data, steps = made.config.data, made.config.training.steps
    assert steps == int(0.9 * 60 * minutes / each[data.patch])
    assert made.choices[-1].key == "training.steps"
    free = plan(CONFIG, cases, 3 * 10**9)
    if max(data.patch) > 32:
        assert steps >= wanted
    assert math.prod(data.patch) <= math.prod(free.config.data.patch)
    # Voxels are as long as it takes to see the volumes once, at most twice as long.
    spacing = [grid[1][axis] for axis in (0, 1, 2)]
    factors = [a / b for a, b in zip(data.spacing, spacing, strict=True)]
    passes = steps * 2 * data.batch_size * math.prod(data.patch) / 4
    passes /= math.prod(n / f for n, f in zip(grid[0], factors, strict=True))
    assert all(1 <= round(factor, 2) <= 2 for factor in factors)
    if grid is not BRAIN:
        assert factors[2] == 1  # thick slices keep their distance
    if max(factors) == 1:
        assert passes >= 1
    elif round(max(factors), 2) < 2:
        assert (
            0.5 < passes < 2 and "so that the steps see the volumes once" in made.choices[0].reason
        )
    else:
        assert passes < 2


def test_second_order_gets_a_smaller_patch() -> None:
    grid: Grid = ((96, 96, 12), (1, 1, 8), 2)
    memory = OUTSIDE["cpu"] + 10**8
    voxels = []
    for order in ("first_order", "second_order"):
        config = load_config(
            overrides=["fabric.accelerator=cpu", "model.network=unet", f"meta.strategy={order}"]
        )
        made = plan(config, found(grid, grid), memory)
        assert made.total <= memory and made.config.meta.strategy == order
        patch, batch, _ = chosen(made)
        voxels.append(batch * patch[0] * patch[1])
    assert voxels[1] < voxels[0]


@pytest.mark.usefixtures("memory_by_voxels")
def test_too_little_memory() -> None:
    grid: Grid = ((96, 96, 12), (1, 1, 8), 2)
    (fault,) = faults_of(lambda: plan(CONFIG, found(grid, grid), 6 * 10**8), ConfigError)
    assert fault.startswith("memory: training on patches of 32 x 32 needs ")
    assert fault.endswith(
        "but there are 600.0 MB; give more memory, or use a strategy that needs less"
    )


def test_preparing_needs_memory_before_the_steps() -> None:
    memory = plan_search.preparation(CONFIG, found(BRAIN, ((10, 10, 10), (1, 1, 1), 2)))
    assert memory == 420 * 2**20 + 15 * (4 + 4) * 240 * 240 * 155
    assert faults_of(lambda: plan(CONFIG, found(BRAIN, BRAIN), memory - 1), ConfigError) == (
        "memory: preparing the largest case needs 1.5 GB, but there are 1.5 GB; give more memory",
    )


def test_no_case_can_be_read() -> None:
    nothing = Survey(
        "x",
        modalities=BRATS,
        cases=(CaseSurvey("p", patient="p", site=None, modalities=(), label=False),),
    )
    assert faults_of(lambda: plan(CONFIG, nothing, 10**9), PrismError) == (
        "plan: no case has a header that can be read; see prism-meta cases",
    )


@pytest.mark.usefixtures("by_voxels")
def test_the_file_gives_the_configuration_and_the_reasons(tmp_path: Path) -> None:
    made = plan(CONFIG, found(BRAIN, BRAIN), 10**9)
    path = tmp_path / "plan.toml"
    path.write_text(made.to_toml())
    assert load_config(path) == made.config
    assert "# data.spacing = [1.0, 1.0, 1.0]: median of 2 cases\n" in path.read_text()


@pytest.mark.usefixtures("by_voxels")
def test_steps_from_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "seconds_per_step", lambda config, masks, *, device: 2.0)
    made = plan(CONFIG, found(BRAIN, BRAIN), 10**9)
    longer = with_steps(made, 100)
    assert longer.config.training.steps == 45
    assert longer.choices[-1] == (
        "training.steps",
        45,
        "2 s each on this machine, in 90% of the time",
    )
    assert with_steps(made, 0.1).config.training.steps == 1


def test_seconds_are_of_real_steps() -> None:
    config = load_config(
        overrides=["data.patch=[16, 16]", "data.batch_size=1", "model.width=4", "model.depth=2"]
    )
    masks = [torch.ones(1, 4).bool()] * 2
    assert 0 < seconds_per_step(config, masks, device="cpu") < 60


def test_masks_are_those_of_the_episodes() -> None:
    """Without t1 in any case, no episode shows it; K inner steps have K masks."""
    config = load_config(
        overrides=["meta.strategy=first_order", "meta.inner_steps=2", "masks.train=static"]
    )
    without = tuple(name for name in BRATS if name != "t1")
    masks = most_shown(drawn_masks(config, found(BRAIN, BRAIN, modalities=[without])))
    assert len(masks) == 3
    for mask in masks:
        assert mask.shape == (config.data.batch_size, 4)
        assert not mask[:, BRATS.index("t1")].any()
    assert masks[0].sum() == 3 * config.data.batch_size


def test_the_default_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, expected in ((None, 2 * 10**9), (10**9, 10**9), (10**11, 2 * 10**9)):
        monkeypatch.setattr(planning, "memory_of", lambda accelerator, there=there: there)
        assert default_memory(CONFIG) == expected
    monkeypatch.setattr(planning, "device_kind", lambda accelerator: "cuda")
    assert default_memory(CONFIG) == 9 * 10**10
