"""The outer update with a clipped gradient, and with a GradScaler."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import oracles
import pytest
import torch
from helpers import (
    batch_norm,
    copies,
    equal,
    mlp,
    mse,
    relative_error,
    trainable,
)
from torch import Tensor, nn

from prism_meta.bilevel.inner import SGD, Adam
from prism_meta.bilevel.learner import MetaLearner
from prism_meta.bilevel.strategies import FirstOrder, SecondOrder

INNER, OUTER = 0.1, 0.03


def state_of(learner: MetaLearner) -> dict[str, Tensor]:
    """Copies of the model and of all that the optimizer keeps."""
    states = learner.optimizer.state.values()
    kept = {f"{i} {k}": v for i, values in enumerate(states) for k, v in values.items()}
    return copies({**learner.model.state_dict(), **kept})


@pytest.mark.parametrize(("clip_norm", "clips"), [(0.1, True), (1e3, False)])
def test_the_meta_gradient_is_clipped_to_a_norm_and_the_pull_is_not(
    clip_norm: float, clips: bool
) -> None:
    problem = mlp()
    phi = copies(trainable(problem.model))
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=OUTER)
    strategy = SecondOrder(SGD(INNER), 2)
    learner = MetaLearner(problem.model, mse, strategy, optimizer, alpha=0.5, clip_norm=clip_norm)
    result = learner.meta_gradient(problem.train, problem.meta)
    norm = learner.apply(result)
    flat = oracles.flat(result.gradient)
    assert norm.item() == pytest.approx(flat.norm().item(), rel=1e-12)
    factor = clip_norm / (norm.item() + 1e-6) if clips else 1.0
    assert (norm.item() > clip_norm) is clips
    moved = {n: p - phi[n] for n, p in trainable(problem.model).items()}
    expected = {
        n: 0.5 * (result.adapted[n] - p) - OUTER * factor * result.gradient[n]
        for n, p in phi.items()
    }
    assert relative_error(moved, expected) <= 1e-12


@pytest.mark.parametrize("inner_state", ["fresh", "carried", "shared"])
@pytest.mark.parametrize("kind", [FirstOrder, SecondOrder])
def test_a_scaler_changes_no_update(kind: Any, inner_state: Any) -> None:
    models = []
    for scaler in (None, torch.amp.GradScaler("cpu")):
        problem = mlp()
        optimizer = torch.optim.Adam(problem.model.parameters(), lr=OUTER)
        learner = MetaLearner(
            problem.model,
            mse,
            kind(Adam(0.05, eps=1e-3), 2),
            optimizer,
            inner_state=inner_state,
            clip_norm=0.5,
            scaler=scaler,
        )
        for _ in range(3):
            learner.step(problem.train, problem.meta)
        models.append(state_of(learner))
    assert equal(*models)  # bit by bit, for the scale is a power of two


@pytest.mark.parametrize("bad", ["train", "meta"])
@pytest.mark.parametrize("inner_state", ["fresh", "carried", "shared"])
@pytest.mark.parametrize("kind", [FirstOrder, SecondOrder])
def test_a_scaler_leaves_out_a_step_that_is_not_finite(
    kind: Any, inner_state: Any, bad: str
) -> None:
    problem = batch_norm()
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=OUTER)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    learner = MetaLearner(
        problem.model,
        mse,
        kind(Adam(0.05, eps=1e-3), 2),
        optimizer,
        inner_state=inner_state,
        buffers="outer",
        scaler=scaler,
    )
    learner.step(problem.train, problem.meta)
    assert scaler.get_scale() == 1024
    kept, carried = state_of(learner), deepcopy(learner.state_dict()["carried"])
    episode = {"train": problem.train, "meta": problem.meta}
    x, y = episode[bad]
    learner.step(**{**episode, bad: (x, y * torch.inf)})
    assert equal(state_of(learner), kept)
    assert all(p.grad is None for p in problem.model.parameters())
    assert scaler.get_scale() == 512
    for name, values in (carried or {}).items():
        assert equal(learner.state_dict()["carried"][name], values)
    learner.step(problem.train, problem.meta)
    assert not torch.equal(kept["0.weight"], problem.model.state_dict()["0.weight"])
    assert all(bool(t.isfinite().all()) for t in state_of(learner).values())


def test_the_losses_are_scaled_before_they_are_differentiated() -> None:
    """A gradient of 1e-9 is 0 in float16, but not after the scale."""

    def objective(forward: Callable[..., Any], batch: Tensor) -> Tensor:
        return 1e-9 * forward(batch).half().float().sum()

    gradients = []
    for scaler in (None, torch.amp.GradScaler("cpu")):
        model = nn.Linear(2, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=OUTER)
        learner = MetaLearner(model, objective, FirstOrder(SGD(INNER)), optimizer, scaler=scaler)
        gradients.append(learner.step(torch.ones(1, 2), torch.ones(1, 2)).gradient["weight"])
    assert not gradients[0].any()
    torch.testing.assert_close(gradients[1], torch.full((1, 2), 1e-9), rtol=1e-2, atol=0)
