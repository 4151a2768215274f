"""The phantom: seeds, signal equations, and the contrasts that each modality must carry."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from disk import read, restore, states_of
from numpy.typing import NDArray
from scipy import ndimage

from prism_meta.data.phantom import (
    Phantom,
    draw_phantom,
    inversion_recovery,
    shorten_t1,
    spin_echo,
    write_phantoms,
)
from prism_meta.data.phantom import anatomy as phantom_anatomy
from prism_meta.data.phantom.anatomy import Anatomy, draw_anatomy
from prism_meta.data.phantom.space import Space
from prism_meta.errors import ConfigError
from prism_meta.modalities import BRATS

SEEDS = range(10)
SHAPE, SPACING = (40, 48, 36), 4.0


def load(path: Path) -> Any:
    return nib.load(path)


@cache
def drawn(seed: int) -> Phantom:
    return draw_phantom(seed)


@cache
def anatomy(seed: int) -> Anatomy:
    """The anatomy inside ``drawn(seed)``."""
    body = np.random.SeedSequence(seed).spawn(1)[0]
    return draw_anatomy(np.random.default_rng(body), Space((80, 96, 72), 2.0))


@cache
def white_matter(seed: int) -> NDArray[np.bool_]:
    """Pure white matter well away from the tumour."""
    near = ndimage.binary_dilation(drawn(seed).label > 0, iterations=4)
    white: NDArray[np.bool_] = (anatomy(seed).maps[2] > 0.95) & ~near
    return white


def relative(seed: int, modality: str, where: NDArray[np.bool_]) -> float:
    """Median intensity there, relative to that of white matter."""
    image = drawn(seed).images[modality]
    return float(np.median(image[where]) / np.median(image[white_matter(seed)]))


def enhancing_seeds() -> list[int]:
    return [seed for seed in SEEDS if (drawn(seed).label == 4).sum() > 100]


def test_spin_echo_closed_form() -> None:
    # TR = T1 ln 2 recovers one half, TE = T2 ln 4 leaves one quarter
    signal = spin_echo(
        density=0.8, t1=900.0, t2=80.0, repetition=900 * math.log(2), echo=80 * math.log(4)
    )
    assert float(signal) == pytest.approx(0.8 * 0.5 * 0.25, rel=1e-6)


@pytest.mark.parametrize("t1", [800.0, 4000.0])
def test_inversion_recovery_nulls_at_t1_ln_2(t1: float) -> None:
    def signal(inversion: float, repetition: float) -> float:
        return float(
            inversion_recovery(
                density=1.0, t1=t1, t2=100.0, repetition=repetition, echo=0.0, inversion=inversion
            )
        )

    null = t1 * math.log(2)
    assert signal(null, 1e7) == pytest.approx(0, abs=1e-6)
    assert signal(0.0, 1e7) == pytest.approx(1)  # fully inverted, magnitude
    assert signal(2 * null, 1e7) == pytest.approx(0.5)  # 1 - 2/4
    assert signal(2 * null, 3 * null) == pytest.approx(0.5 + 1 / 8)  # + exp(-TR / T1)


def test_inversion_recovery_decays_with_t2() -> None:
    early, late = (
        float(
            inversion_recovery(
                density=1.0, t1=900.0, t2=90.0, repetition=9e3, echo=echo, inversion=2.5e3
            )
        )
        for echo in (10.0, 10.0 + 90 * math.log(3))
    )
    assert early / late == pytest.approx(3, rel=1e-5)


def test_contrast_agent_shortens_t1() -> None:
    # 1 / (0.5 / s + 4.5 / (mM s) * C)
    times = shorten_t1(2000.0, np.array([0.0, 0.1, 1.0], np.float32))
    np.testing.assert_allclose(times, [2000, 1000 / 0.95, 200], rtol=1e-5)


def test_same_seed_same_phantom_and_other_seed_differs() -> None:
    again, other = draw_phantom(0), drawn(1)
    for name in BRATS:
        np.testing.assert_array_equal(again.images[name], drawn(0).images[name])
        assert not np.array_equal(again.images[name], other.images[name])
    np.testing.assert_array_equal(again.label, drawn(0).label)
    assert not np.array_equal(again.label, other.label)


def test_image_does_not_depend_on_the_other_modalities() -> None:
    alone = draw_phantom(0, modalities=("t2",))
    assert list(alone.images) == ["t2"]
    np.testing.assert_array_equal(alone.images["t2"], drawn(0).images["t2"])


@pytest.mark.parametrize("seed", SEEDS)
def test_labels_and_brain(seed: int) -> None:
    phantom = drawn(seed)
    brain = phantom.images["flair"] > 0
    assert set(np.unique(phantom.label)) <= {0, 1, 2, 4}
    assert not phantom.label[~brain].any()
    for image in phantom.images.values():
        assert image.dtype == np.float32 and image.shape == (80, 96, 72)
        np.testing.assert_array_equal(image > 0, brain)
    assert 1.0e6 < brain.sum() * 8 < 1.8e6, "brain volume in mm3"
    assert 4e3 < (phantom.label > 0).sum() * 8 < 3e5, "tumour volume in mm3"
    assert not brain[[0, -1]].any() and not brain[:, [0, -1]].any(), "the brain is cut off"


@pytest.mark.parametrize("seed", SEEDS)
def test_tissue_maps_sum_to_one(seed: int) -> None:
    drawn_anatomy = anatomy(seed)
    np.testing.assert_array_equal(drawn_anatomy.label, drawn(seed).label)
    np.testing.assert_allclose(drawn_anatomy.maps.sum(0), 1, atol=1e-4)
    assert drawn_anatomy.maps.min() >= 0


def test_oedema_does_not_enter_fluid(monkeypatch: pytest.MonkeyPatch) -> None:
    space = Space((80, 96, 72), 2.0)

    def no_tumour(*_: object) -> NDArray[np.uint8]:
        return np.zeros(space.shape, np.uint8)

    touching = 0
    labels = [drawn(seed).label for seed in range(4)]  # ``drawn`` keeps them, so with their tumours
    monkeypatch.setattr(phantom_anatomy, "_grow_tumour", no_tumour)
    for seed, label in enumerate(labels):
        body = np.random.SeedSequence(seed).spawn(1)[0]
        before = draw_anatomy(np.random.default_rng(body), space)
        fluid, oedema = before.maps[0] > 0.9, label == 2
        assert not (fluid & oedema).any()
        touching += int((fluid & ndimage.binary_dilation(oedema)).sum())
    assert touching > 20, "no oedema reaches fluid, so nothing was tested"


@pytest.mark.parametrize("seed", SEEDS)
def test_oedema_is_bright_in_flair_and_t2_and_hardly_seen_in_t1(seed: int) -> None:
    oedema = drawn(seed).label == 2
    if oedema.sum() < 100:
        pytest.skip("this phantom has almost no oedema")
    assert relative(seed, "flair", oedema) > 1.15
    assert relative(seed, "t2", oedema) > 1.15
    assert 0.65 < relative(seed, "t1", oedema) < 1.05


def test_ring_is_seen_only_with_contrast_agent() -> None:
    seeds = enhancing_seeds()
    assert len(seeds) >= 6
    contrast: dict[str, list[float]] = {name: [] for name in BRATS}
    for seed in seeds:
        ring, oedema = drawn(seed).label == 4, drawn(seed).label == 2
        after, before = relative(seed, "t1ce", ring), relative(seed, "t1", ring)
        assert after > before + 0.25, f"seed {seed}"
        for name in BRATS:
            contrast[name].append(relative(seed, name, ring) / relative(seed, name, oedema) - 1)
    for name in ("flair", "t1", "t2"):
        assert np.abs(np.mean(contrast[name])) < 0.15, name
    assert np.mean(contrast["t1ce"]) > 0.5


def test_core_is_dark_in_t1_and_bright_in_t2_and_darker_than_oedema_in_flair() -> None:
    darker = []
    for seed in enhancing_seeds():
        label = drawn(seed).label
        core = ndimage.binary_erosion(label == 1)
        if core.sum() < 100:
            continue
        assert relative(seed, "t1", core) < 0.85
        assert relative(seed, "t2", core) > 1.5
        darker.append(relative(seed, "flair", core) / relative(seed, "flair", label == 2))
    assert len(darker) >= 3
    assert max(darker) < 1


def test_both_grades_are_drawn() -> None:
    grades = [
        4 in draw_anatomy(np.random.default_rng(seed), Space(SHAPE, SPACING)).label
        for seed in range(30)
    ]
    assert 0.65 < np.mean(grades) < 0.95


def test_thresholding_flair_does_not_solve_it() -> None:
    best = []
    for seed in SEEDS:
        flair, tumour = drawn(seed).images["flair"], drawn(seed).label > 0
        inside = flair > 0
        dice = [
            2 * (tumour & (flair > level)).sum() / (tumour.sum() + (flair > level).sum())
            for level in np.percentile(flair[inside], np.arange(60, 100, 2))
        ]
        best.append(max(dice))
    assert 0.3 < np.mean(best) < 0.85


def test_written_files(tmp_path: Path) -> None:
    availability = torch.tensor([[True, False, True, True], [False, True, False, False]])
    done: list[int] = []
    cases = write_phantoms(
        tmp_path, availability, seed=3, shape=SHAPE, spacing=SPACING, on_case=done.append
    )
    assert done == [0, 1]
    assert [case.name for case in cases] == ["case_000", "case_001"]
    names = [sorted(path.name for path in case.iterdir()) for case in cases]
    assert names == [
        ["flair.nii.gz", "seg.nii.gz", "t1.nii.gz", "t2.nii.gz"],
        ["seg.nii.gz", "t1ce.nii.gz"],
    ]
    flair, seg = (load(cases[0] / f"{name}.nii.gz") for name in ("flair", "seg"))
    for image, kind in ((flair, np.int16), (seg, np.uint8)):
        assert image.shape == SHAPE
        assert image.get_data_dtype() == kind
        assert image.header.get_zooms() == (SPACING,) * 3
        assert (np.diag(image.affine) == [-SPACING, -SPACING, SPACING, 1]).all()  # left, back, up
        np.testing.assert_allclose(image.affine @ [19.5, 23.5, 17.5, 1], [0, 0, 0, 1])
    assert set(np.unique(np.asarray(seg.dataobj))) <= {0, 1, 2, 4}
    assert np.asarray(flair.dataobj)[np.asarray(seg.dataobj) > 0].min() > 0


def test_a_case_does_not_depend_on_how_many_are_drawn_nor_on_availability(tmp_path: Path) -> None:
    def image(cases: list[Path], i: int) -> NDArray[np.int16]:
        return np.asarray(load(cases[i] / "t1.nii.gz").dataobj)

    def write(name: str, rows: list[list[bool]], seed: int) -> list[Path]:
        return write_phantoms(tmp_path / name, rows, seed=seed, shape=SHAPE, spacing=SPACING)

    t1 = [False, False, True, False]
    three = write("three", [t1, t1, t1], 5)
    two = write("two", [[True] * 4, [False, True, True, False]], 5)
    other = write("other", [t1], 6)
    np.testing.assert_array_equal(image(three, 0), image(two, 0))
    np.testing.assert_array_equal(image(three, 1), image(two, 1))
    assert not np.array_equal(image(three, 0), image(three, 1))
    assert not np.array_equal(image(three, 0), image(other, 0))


def test_writing_again_leaves_no_image_that_is_now_missing(tmp_path: Path) -> None:
    for row in ([True, True], [False, True]):
        [case] = write_phantoms(
            tmp_path, [row], shape=SHAPE, spacing=SPACING, modalities=("flair", "t2")
        )
    assert sorted(path.name for path in case.iterdir()) == ["seg.nii.gz", "t2.nii.gz"]


def test_faults_are_reported_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        write_phantoms(
            tmp_path / "new",
            [[True], [False, False]],
            shape=(8, 8, 8),
            modalities=("flair", "pd"),
        )
    assert len(caught.value.faults) == 4
    assert "'pd' is unknown, expected some of flair, t1ce, t1, t2" in str(caught.value)
    assert "got (8, 8, 8) voxels of 2.0 mm" in str(caught.value)
    assert "row 0 has 1 entries, expected 2" in str(caught.value)
    assert "row 1 has no modality" in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_killed_at_any_moment_they_can_be_drawn_again(tmp_path: Path) -> None:
    """With all files equal, and no temporary file left in a case's folder."""
    options: dict[str, Any] = {"shape": SHAPE, "spacing": SPACING, "modalities": ("t1",)}
    states = states_of(tmp_path, lambda: write_phantoms(tmp_path / "p", [[True]], **options))
    assert len(states) > 5
    for moment, state in states:
        restore(tmp_path, state)
        write_phantoms(tmp_path / "p", [[True]], **options)
        assert read(tmp_path) == states[-1][1], moment
