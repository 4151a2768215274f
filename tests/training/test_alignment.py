"""The cosine of the meta-gradient with the single-level one: its value, and that training stays the same."""

from __future__ import annotations

import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import STRATEGIES, Problem, copies, dropout, episodes, equal, mlp, mse, relative_error
from numpy.typing import NDArray
from torch import Tensor, nn

from prism_meta.bilevel.alignment import cosine, single_level_gradient
from prism_meta.bilevel.inner import SGD
from prism_meta.bilevel.learner import MetaLearner
from prism_meta.bilevel.strategies import FirstOrder, MetaGradient, MetaStrategy, SecondOrder
from prism_meta.training.fit import fit
from prism_meta.training.outer.alignment import Alignment

# ---------------------------------------------------------------------------------- a quadratic problem

RATE = 0.3
TRAIN = (np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([-6.0, 3.0]))
META = (np.array([[1.0, -0.3], [-0.3, 3.0]]), np.array([-0.5, 2.0]))
START = np.array([0.4, 0.7])


class Point(nn.Module):
    """phi itself, two numbers."""

    def __init__(self, start: NDArray[np.float64] = START) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.tensor(start))

    def forward(self) -> Tensor:
        return self.phi


def quadratic(forward: Any, batch: tuple[NDArray[Any], NDArray[Any]]) -> Tensor:
    """(phi - c)^T A (phi - c) / 2, whose gradient is A (phi - c)."""
    matrix, centre = (torch.tensor(part) for part in batch)
    off = forward() - centre
    return off @ matrix @ off / 2


def slope(batch: tuple[NDArray[Any], NDArray[Any]], phi: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(batch[0] @ (phi - batch[1]))


def between(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def at_adapted() -> NDArray[Any]:
    return slope(META, START - RATE * slope(TRAIN, START))


@pytest.mark.parametrize(
    ("strategy", "gradient"),
    [
        (FirstOrder(SGD(RATE)), at_adapted()),
        (SecondOrder(SGD(RATE)), (np.eye(2) - RATE * TRAIN[0]) @ at_adapted()),
        (FirstOrder(SGD(0.0)), slope(META, START)),
    ],
    ids=["E3", "E4", "no inner step"],
)
def test_the_cosine_of_a_quadratic_is_that_of_its_closed_form(
    strategy: MetaStrategy, gradient: NDArray[Any]
) -> None:
    (line,) = fit(Point(), quadratic, strategy, [(TRAIN, META)], cosine_every=1)
    expected = between(gradient, slope(META, START))
    assert line["cosine"] == pytest.approx(expected, abs=1e-12)
    assert strategy.inner.lr == 0 or expected < 0.99  # type: ignore[attr-defined]


def test_the_cosine_falls_with_the_square_of_a_small_rate() -> None:
    def loss(rate: float) -> float:
        strategy = SecondOrder(SGD(rate))
        (line,) = fit(Point(), quadratic, strategy, [(TRAIN, META)], cosine_every=1)
        return float(1 - line["cosine"])

    assert loss(1e-3) / loss(5e-4) == pytest.approx(4, rel=0.02)


def test_several_episodes_are_averaged_before_the_cosine() -> None:
    """Their mean gradients, not the mean of their cosines."""
    pair = [(TRAIN, META), (META, TRAIN)]
    strategy = FirstOrder(SGD(RATE))
    (line,) = fit(Point(), quadratic, strategy, pair, episodes_per_step=2, cosine_every=1)
    back = slope(TRAIN, START - RATE * slope(META, START))
    single = slope(META, START) + slope(TRAIN, START)
    assert line["cosine"] == pytest.approx(between(at_adapted() + back, single), abs=1e-12)


def test_a_gradient_of_zero_has_no_cosine() -> None:
    (line,) = fit(Point(META[1]), quadratic, FirstOrder(SGD(RATE)), [(TRAIN, META)], cosine_every=1)
    assert line["cosine"] is None and line["gradient_norm"] > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_without_a_meta_gradient_are_not_measured(strategy: MetaStrategy) -> None:
    problem = mlp()
    log = fit(problem.model, problem.objective, strategy, episodes(2), cosine_every=2)
    assert ["cosine" in line for line in log] == [False, strategy.has_meta_gradient]


# ---------------------------------------------------------------------------------- nothing is changed


def noisy() -> Problem:
    """The MLP with dropout, and with BatchNorm, whose buffers a forward pass changes."""
    model = nn.Sequential(
        nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 2)
    )
    return Problem("noisy", model.double(), mse, *episodes(1)[0])


def test_the_gradient_is_that_of_torch_and_draws_no_random_number() -> None:
    problem = noisy()
    before, buffers = (
        copies(problem.model.state_dict()),
        copies(dict(problem.model.named_buffers())),
    )
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    found = single_level_gradient(problem.model, problem.objective, problem.meta)
    assert equal(problem.model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]
    assert all(param.grad is None for param in problem.model.parameters())
    mse(problem.model, problem.meta).backward()  # with the same dropout, as nothing was drawn
    expected = {n: p.grad for n, p in problem.model.named_parameters() if p.grad is not None}
    assert relative_error(found, expected) < 1e-12
    assert not equal(dict(problem.model.named_buffers()), buffers)  # so that the test could fail


@pytest.mark.parametrize("strategy", [FirstOrder(SGD(0.1), 2), SecondOrder(SGD(0.1), 2)])
def test_a_training_is_the_same_with_and_without(strategy: MetaStrategy, tmp_path: Path) -> None:
    def trained(every: int, **options: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        torch.manual_seed(0)
        model = noisy().model
        log = fit(model, mse, strategy, episodes(12), cosine_every=every, seed=3, **options)
        return model.state_dict(), log

    plain, without = trained(0)
    measured, log = trained(2)
    assert equal(measured, plain)
    assert [line["step"] for line in log if "cosine" in line] == [2, 4, 6, 8, 10, 12]
    assert all(-1 < line["cosine"] < 1 for line in log[1::2])
    assert [{k: v for k, v in line.items() if k != "cosine"} for line in log] == without

    def stop(step: int, line: dict[str, Any]) -> None:
        if step == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(2, folder=tmp_path, checkpoint_every=7, on_step=stop)
    resumed, rest = trained(2, folder=tmp_path, checkpoint_every=7, resume=True)
    assert equal(resumed, plain) and rest == log[7:]


# ----------------------------------------------------------------------------------- other surroundings


def test_several_processes_average_the_gradients() -> None:
    """In the other process the gradient of L_meta is 0 but for one entry."""
    model, strategy = Point(), FirstOrder(SGD(RATE))
    learner = MetaLearner(model, quadratic, strategy, torch.optim.SGD(model.parameters(), lr=0.1))
    there = torch.tensor([5.0, 0.0], dtype=torch.float64)
    fabric: Any = SimpleNamespace(
        world_size=2, device=torch.device("cpu"), to_device=lambda batch: batch,
        all_reduce=lambda sent, reduce_op: (sent + there) / 2,
    )  # fmt: skip
    zero = torch.zeros(())
    result = MetaGradient({"phi": torch.tensor([1.0, 2.0]).double()}, {}, zero, zero)
    measured = Alignment(learner, fabric, 3)
    assert measured(0, result, [(TRAIN, META)]) is None
    found = measured(2, result, [(TRAIN, META)])
    expected = between(np.array([1.0, 2.0]), slope(META, START) + np.array([5.0, 0.0]))
    assert found is not None and float(found) == pytest.approx(expected, abs=1e-12)


def test_complex_and_half_precision_numbers() -> None:
    a = {"w": torch.tensor([3 + 4j, 1j]), "b": torch.tensor([1000.0]).half()}
    assert float(cosine(a, a)) == pytest.approx(1.0)  # 1000^2 is beyond half precision
    b = {"w": torch.tensor([-4 + 3j, 0j]), "b": torch.tensor([0.0]).half()}
    assert float(cosine(a, b)) == pytest.approx(0.0, abs=1e-6)


def test_parameters_that_the_meta_batch_does_not_use_count_as_zero() -> None:
    problem = dropout()
    problem.model.register_parameter("unused", nn.Parameter(torch.ones(2).double()))
    found = single_level_gradient(problem.model, problem.objective, problem.meta)
    assert torch.equal(found["unused"], torch.zeros(2).double())
    assert list(found) == [name for name, _ in problem.model.named_parameters()]
