"""E11 and E12 on tiny tensors: the projection against searches, preference and epochs by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import F64, randn
from scipy.optimize import minimize
from torch import Tensor

from prism_meta.networks.prediction import ShownPairs
from prism_meta.objective.weighting import (
    LOWEST,
    LearnedWeights,
    PairWeights,
    RelativePreference,
    modality_means,
    project_to_sphere,
    relative_preference,
)

# ---------------------------------------------------------------- the projection


def feasible(size: int, *, radius: float, count: int) -> Tensor:
    """Points of the sphere above the bound, faces and corners among them: (N, M)."""
    points = randn(count, size, seed=1).abs()
    # Every set of components at the bound; the others share what is left of the length.
    held = torch.randint(2, (count, size), generator=torch.Generator().manual_seed(2)).bool()
    held[held.all(1)] = False
    points = torch.where(held, 0.0, points)
    left = radius**2 - held.double().sum(1) * LOWEST**2
    points = points * (left / points.square().sum(1)).sqrt()[:, None]
    points = torch.where(held, LOWEST, points)
    return points[(points >= LOWEST).all(1)]


POINTS = {
    "inside": [1.2, 0.7, 0.9, 1.5],
    "one below the bound": [1.2, 0.02, 0.9, 1.5],
    "one far below": [1.2, -3.0, 0.9, 1.5],
    "one is held only after another": [1.0, 0.11, -2.0, 0.05],
    "one above": [-0.3, 0.4, -1.0, -0.2],
    "all below": [-0.5, -0.2, -0.9, -3.0],
    "far": [50.0, 2.0, 60.0, 1.0],
    "tiny": [1e-30, 2e-30, -1e-30, 1e-31],
}


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
def test_no_feasible_point_is_nearer(point: list[float], size: int) -> None:
    start, radius = torch.tensor(point[:size], dtype=F64), 2.0
    nearest = project_to_sphere(start, radius=radius, lowest=LOWEST)
    assert nearest.norm().item() == pytest.approx(radius, rel=1e-12)
    assert nearest.min().item() >= LOWEST - 1e-12
    others = feasible(size, radius=radius, count=40_000)
    assert len(others) > 10_000
    # On a sphere the nearest has the largest inner product; so compared, tiny points show too.
    best = (others @ start).max().item()
    assert (nearest @ start).item() >= best - 1e-12 * start.norm().item()
    # And the search comes close, so that it would have found a better one.
    assert (nearest @ start).item() <= best + 0.05 * start.norm().item()


def test_the_projection_is_what_a_solver_finds() -> None:
    for seed in range(12):
        start = 1.0 + 1.5 * randn(4, seed=seed)
        if start.max() <= 0:
            continue
        nearest = project_to_sphere(start, radius=2.5, lowest=LOWEST)
        goal = start.numpy()

        def distance(x: Any, goal: Any = goal) -> float:
            return float(np.square(x - goal).sum())

        found = minimize(
            distance,
            np.full(4, 1.25),
            method="SLSQP",
            bounds=[(LOWEST, None)] * 4,
            constraints={"type": "eq", "fun": lambda x: np.square(x).sum() - 2.5**2},
            options={"ftol": 1e-12, "maxiter": 500},
        )
        assert (
            abs(np.square(found.x).sum() - 2.5**2) < 1e-6
        )  # it may call the last digits a failure
        assert nearest.tolist() == pytest.approx(found.x.tolist(), abs=1e-5)


def test_the_projection_by_hand() -> None:
    # 0.1 is held, and the others keep their ratio: 3 : 4 at length sqrt(25.01 - 0.01) = 5.
    point = torch.tensor([6.0, 0.0, 8.0], dtype=F64)
    nearest = project_to_sphere(point, radius=math.sqrt(25.01), lowest=0.1)
    assert nearest.tolist() == pytest.approx([3.0, 0.1, 4.0], rel=1e-12)
    # Nothing is positive: all of the length goes to the largest.
    nearest = project_to_sphere(-point, radius=math.sqrt(25.02), lowest=0.1)
    assert nearest.tolist() == pytest.approx([0.1, 5.0, 0.1], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_what_is_feasible_stays(dtype: torch.dtype) -> None:
    for seed in range(5):
        point = (0.1 + randn(4, seed=seed).abs()).to(dtype)
        nearest = project_to_sphere(point, radius=point.norm().item(), lowest=0.1)
        torch.testing.assert_close(nearest, point)
        assert nearest.dtype == dtype


def test_the_only_point_and_none() -> None:
    point = torch.tensor([3.0, -1.0, 0.5, 7.0])
    nearest = project_to_sphere(point, radius=0.2, lowest=0.1)  # 0.2 = sqrt(4) * 0.1
    torch.testing.assert_close(nearest, torch.full((4,), 0.1))
    with pytest.raises(
        ValueError,
        match=r"radius: got 0.19, expected at least 0.2, the length of 4 components of 0.1",
    ):
        project_to_sphere(point, radius=0.19, lowest=0.1)


# ---------------------------------------------------------------- relative preference

MASKS: list[list[list[bool]]] = [
    [[True, True]],
    [[True, False], [True, True], [False, True], [True, True], [True, True]],
    [[True, False, True]],
    [[True, True, True, True]],
    [
        [True, True, True, True],
        [False, True, False, True],
        [True, False, False, False],
        [False, True, True, True],
        [True, True, True, False],
    ],
]


@pytest.mark.parametrize("mask", MASKS, ids=lambda m: f"M={len(m[0])}, B={len(m)}")
def test_preference_equals_loops(mask: list[list[bool]]) -> None:
    pairs = ShownPairs.from_mask(torch.tensor(mask))
    distance = randn(len(pairs.sample), seed=3).abs()
    by_pair = dict(zip(zip(pairs.sample.tolist(), pairs.modality.tolist()), distance.tolist()))  # noqa: B905
    actual = pairs.unpack(relative_preference(distance, pairs))
    for n, row in enumerate(mask):
        own = [by_pair[n, m] for m, shown in enumerate(row) if shown]
        for m, shown in enumerate(row):
            expected = 1 - by_pair[n, m] / (sum(own) / len(own)) if shown else 0.0
            assert actual[n, m].item() == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert actual.sum(1).abs().max() < 1e-12


def test_one_modality_has_no_preference() -> None:
    pairs = ShownPairs.from_mask(torch.tensor([[False, True, False], [True, True, False]]))
    # D is 0 for a sample's only modality, or next to it where two passes round differently; in the
    # second sample both modalities are as good as the fused branch.
    for alone in (0.0, 1e-12):
        distance = torch.where(pairs.sample == 0, alone, 0.0)
        assert relative_preference(distance, pairs).tolist() == [0.0, 0.0, 0.0]


def test_means_over_the_samples_that_show_a_modality() -> None:
    pairs = ShownPairs.from_mask(torch.tensor([[True, False, True], [True, False, False]]))
    values = torch.tensor([1.0, 3.0, 5.0], requires_grad=True)
    means = modality_means(values, pairs)
    assert means.tolist() == [2.0, 0.0, 5.0]
    assert not means.requires_grad


def weigh(weighting: Any, mask: list[list[bool]], distance: list[float]) -> PairWeights:
    pairs = ShownPairs.from_mask(torch.tensor(mask))
    beta, delta = torch.full((2, len(mask[0])), 2.0, dtype=F64)
    return weighting.weigh(beta, delta, pairs, lambda: torch.tensor(distance, dtype=F64))


def test_weights_of_preference_by_hand() -> None:
    # ShownPairs go modality by modality: m0 of samples 0 and 1, m1 of 0 and 1, and only then m2 of 2.
    mask = [[True, True, False], [True, True, False], [False, False, True]]
    weighting = RelativePreference((0.0, 0.5, 0.75)).double()
    actual = weigh(weighting, mask, [1.0, 3.0, 3.0, 1.0, 0.0])
    assert actual.beta.tolist() == [2.0, 2.0, 4.0, 4.0, 8.0]  # E_0 = 1, 2, 4
    assert actual.delta.tolist() == [0.0, 2.0, 2.0, 0.0, 0.0]  # the further one of each sample
    assert {name: term.tolist() for name, term in actual.terms.items()} == {
        "preference": [0.0, 0.0, 0.0],  # 1/2 and -1/2 in either
        "shown": [2.0, 2.0, 1.0],
        "beta": [2.0, 4.0, 8.0],
        "delta": [1.0, 1.0, 0.0],
    }


def test_no_gradient_goes_through_preference() -> None:
    pairs = ShownPairs.from_mask(torch.tensor([[True, True]]))
    distance = torch.tensor([1.0, 2.0], requires_grad=True)
    found = RelativePreference((0.0, 0.0)).weigh(
        torch.ones(2), torch.ones(2), pairs, lambda: distance
    )
    assert not any(t.requires_grad for t in (found.beta, found.delta, *found.terms.values()))


# ---------------------------------------------------------------- E over epochs


def test_an_epoch_moves_towards_the_modality_that_lags() -> None:
    weighting = RelativePreference((0.0, 0.5, 0.0), gamma=0.4).double()
    for preference, shown in (
        ([0.5, -0.5, 0.0], [4.0, 1.0, 0.0]),
        ([-0.5, 0.5, 0.0], [1.0, 1.0, 0.0]),
    ):
        weighting.observe(
            {
                "preference": torch.tensor(preference),
                "shown": torch.tensor(shown),
                "fuse": torch.ones(()),
            }
        )
    weighting.end_epoch()
    # Mean RP 0.3 over five samples, 0 over two, and 0 for the modality that nobody saw.
    moved = torch.tensor([1 - 0.4 * 0.3, 2.0, 1.0], dtype=F64)
    expected = moved * (math.sqrt(6) / moved.norm())
    torch.testing.assert_close(weighting.factor, expected, rtol=1e-7, atol=0)
    assert weighting.total.tolist() == weighting.shown.tolist() == [0.0, 0.0, 0.0]


def test_many_epochs_keep_length_and_bound() -> None:
    weighting = RelativePreference((0.2, 0.4, 0.6, 0.8), gamma=0.3)
    length = weighting.factor.norm().item()
    for _ in range(60):  # the last modality lags always
        weighting.observe(
            {"preference": torch.tensor([0.4, 0.3, 0.2, -0.9]), "shown": torch.ones(4)}
        )
        weighting.end_epoch()
        assert weighting.factor.norm().item() == pytest.approx(length, rel=1e-6)
        assert weighting.factor.min().item() >= LOWEST - 1e-6
    assert weighting.factor[:3].tolist() == pytest.approx([LOWEST] * 3, rel=1e-6)


def test_counts_may_be_means_over_processes() -> None:
    whole, shared = (RelativePreference((0.0, 0.0), gamma=0.4) for _ in range(2))
    for weighting, scale in ((whole, 1.0), (shared, 0.5)):
        terms = {"preference": torch.tensor([0.5, -1.0]), "shown": torch.tensor([1.0, 1.0])}
        weighting.observe(
            {name: t * (scale if name == "shown" else 1) for name, t in terms.items()}
        )
        weighting.end_epoch()
    torch.testing.assert_close(shared.factor, whole.factor)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: RelativePreference(()),
            r"rates: got \(\), expected one missing rate in \[0, 1\) per modality",
        ),
        (
            lambda: RelativePreference((0.1, 1.0)),
            r"rates: got \(0.1, 1.0\), expected one missing rate in \[0, 1\) per modality",
        ),
        (
            lambda: RelativePreference((0.1,), gamma=-1),
            "gamma: got -1, expected a number >= 0",
        ),
        (
            lambda: LearnedWeights(2, delta=(0.1, 0.1, 0.1)),
            "delta: got 3 weights, expected 1 or 2, one per modality",
        ),
        (
            lambda: LearnedWeights(2, beta=(0.1, 0.0)),
            r"beta: got \(0.1, 0.0\), expected numbers > 0, because softplus is never 0",
        ),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------- learned weights


@pytest.mark.parametrize("start", [1e-4, 0.02, 1.0, 40.0])
def test_learned_weights_start_where_they_are_told(start: float) -> None:
    weighting = LearnedWeights(3, beta=start, delta=(start, 1.0, 2.0)).double()
    fixed = torch.zeros(3, dtype=F64)
    beta, delta = weighting.weights(fixed, fixed)
    assert beta.tolist() == pytest.approx([start] * 3, rel=1e-5)
    assert delta.tolist() == pytest.approx([start, 1.0, 2.0], rel=1e-5)
    assert beta.dtype == F64 and beta.requires_grad


def test_each_pair_has_its_modality_s_learned_weight() -> None:
    weighting = LearnedWeights(2, beta=(0.5, 1.5), delta=(2.0, 4.0)).double()
    found = weigh(weighting, [[True, True], [False, True]], [])
    assert found.beta.tolist() == pytest.approx([0.5, 1.5, 1.5], rel=1e-6)
    assert found.delta.tolist() == pytest.approx([2.0, 4.0, 4.0], rel=1e-6)
    (gradient,) = torch.autograd.grad(found.beta.sum(), [weighting.free_beta])
    # d softplus(free) / d free = 1 - exp(-softplus); the second is shown twice.
    expected = [1 - math.exp(-0.5), 2 * (1 - math.exp(-1.5))]
    assert gradient.tolist() == pytest.approx(expected, rel=1e-6)
