"""E10 with the weights of E11 and E12, against loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import derivative, prism_batch
from prism_loops import (
    BETA,
    DELTA,
    MASKS,
    every_mask,
    every_size,
    gradients,
    net_for,
    terms_by_loops,
    weights_for,
)
from torch import Tensor

from prism_meta.objective.prism import PrismObjective
from prism_meta.objective.weighting import LearnedWeights, RelativePreference, Weighting

# ---------------------------------------------------------------- E11


def preference_by_loops(
    distance: dict[tuple[int, ...], Tensor],
) -> dict[tuple[int, ...], float]:
    found = {}
    for (n, m), d in distance.items():
        own = [other.item() for (k, _), other in distance.items() if k == n]
        # A single modality is the fused branch: no preference.
        found[n, m] = 1 - d.item() / (sum(own) / len(own)) if len(own) > 1 else 0.0
    return found


@every_size
@every_mask
def test_preference_weighs_each_pair_as_loops_do(
    mask: list[list[bool]], size: tuple[int, ...]
) -> None:
    net, batch = net_for(mask, size), prism_batch(mask, *size, seed=62)
    batch.target[0] = 1  # a sample that lacks classes
    weighting = RelativePreference([0.0, 0.5, 0.2, 0.8][: len(mask[0])]).double()
    value = PrismObjective(**weights_for(mask), weighting=weighting)(net, batch)
    found = terms_by_loops(net, batch, PrismObjective())
    preference = preference_by_loops(found["distance"])
    total = sum(found["fuse"].values()) + sum(found["prm"].values()) + sum(found["uni"].values())
    factor = (1.0, 2.0, 1.25, 5.0)
    for (n, m), pixel in found["pixel"].items():
        omega = float(preference[n, m] < 0)
        total = total + BETA[m] * factor[m] * pixel + DELTA[m] * omega * found["proto"][n, m]
    total = total.squeeze() / len(mask)
    assert value.loss.item() == pytest.approx(total.item(), rel=1e-8)
    mine, other = gradients(value.loss, net), gradients(total, net)
    assert ((mine - other).norm() / other.norm()).item() <= 1e-7
    for m in range(len(mask[0])):
        own = [p for (_, k), p in preference.items() if k == m]
        count = max(len(own), 1)
        assert value.terms["shown"][m].item() == len(own)
        assert value.terms["preference"][m].item() == pytest.approx(sum(own) / count, abs=1e-9)
        assert value.terms["beta"][m].item() == pytest.approx(BETA[m] * factor[m], rel=1e-6)
        share = sum(p < 0 for p in own) / count
        assert value.terms["delta"][m].item() == pytest.approx(DELTA[m] * share, rel=1e-9)
    assert set(value.terms) == {
        "fuse", "prm", "uni", "pixel", "proto", "preference", "shown", "beta", "delta",
    }  # fmt: skip
    assert not any(term.requires_grad for term in value.terms.values())


@pytest.mark.parametrize(
    "make", [lambda: RelativePreference((0.0, 0.5)), lambda: LearnedWeights(2)]
)
def test_an_evaluation_changes_nothing(make: Callable[[], Weighting]) -> None:
    mask = MASKS["M=2, B=5"]
    net, batch = net_for(mask), prism_batch(mask, 9, 8, seed=63)
    objective = PrismObjective(weighting=make())
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    first, second = objective(net, batch), objective(net, batch)
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(before[n], v) for n, v in objective.state_dict().items())


def test_epochs_of_preference() -> None:
    # Two batches of one epoch; their means count by the samples that show the modality.
    objective = PrismObjective(weighting=RelativePreference((0.0, 0.0), gamma=0.5))
    for mean, shown in (((0.6, -0.2), (1.0, 3.0)), ((0.0, 0.2), (2.0, 1.0))):
        objective.observe({"preference": torch.tensor(mean), "shown": torch.tensor(shown)})
    objective.end_epoch()
    moved = torch.tensor([1 - 0.5 * 0.2, 1 + 0.5 * 0.1])
    expected = moved * 2**0.5 / moved.norm()
    factor = objective.state_dict()["factor"]
    torch.testing.assert_close(factor, expected)
    torch.testing.assert_close(objective.weights()["beta"], 0.02 * expected)
    torch.testing.assert_close(objective.weights()["delta"], torch.tensor([0.01, 0.01]))
    objective.end_epoch()  # without a sample, nothing is preferred
    torch.testing.assert_close(objective.state_dict()["factor"], expected)


def test_fixed_weights_have_no_state() -> None:
    objective = PrismObjective()
    objective.observe({"fuse": torch.tensor(1.0)})
    objective.end_epoch()
    objective.load_state_dict(objective.state_dict())
    assert (objective.state_dict(), objective.weights(), objective.hyper_parameters()) == (
        {},
        {},
        {},
    )
    assert objective.meta_objective is objective
    assert objective.to("cpu") is objective


# ---------------------------------------------------------------- E12


@every_size
@every_mask
def test_learned_weights_are_fixed_ones_with_a_gradient(
    mask: list[list[bool]], size: tuple[int, ...]
) -> None:
    net, batch = net_for(mask, size), prism_batch(mask, *size, seed=64)
    weighting = LearnedWeights(len(mask[0]), **weights_for(mask)).double()
    objective = PrismObjective(weighting=weighting)
    value, fixed = objective(net, batch), PrismObjective(**weights_for(mask))(net, batch)
    assert value.loss.item() == pytest.approx(fixed.loss.item(), rel=1e-6)
    learned = objective.hyper_parameters()
    grads = torch.autograd.grad(value.loss, list(learned.values()))
    shown = torch.tensor(mask).double().mean(0)
    for (name, free), gradient in zip(learned.items(), grads, strict=True):
        # d softplus = sigmoid, and d L / d beta_m is the sum of L_pixel^m over B.
        term = fixed.terms[{"free_beta": "pixel", "free_delta": "proto"}[name]]
        torch.testing.assert_close(
            gradient, free.detach().sigmoid() * term * shown, rtol=1e-9, atol=1e-15
        )
    torch.testing.assert_close(value.terms["beta"], weighting.weights(shown, shown)[0].detach())
    assert not any(term.requires_grad for term in value.terms.values())


def test_the_gradient_of_learned_weights_by_differences() -> None:
    mask = MASKS["M=3, B=5"]
    net, batch = net_for(mask), prism_batch(mask, 9, 8, seed=65)
    weighting = LearnedWeights(3, beta=0.3, delta=(0.2, 0.4, 0.6)).double()
    objective = PrismObjective(weighting=weighting)
    (gradient,) = torch.autograd.grad(objective(net, batch).loss, [weighting.free_delta])

    for m in range(3):

        def loss(by: float, m: int = m) -> float:
            with torch.no_grad():
                weighting.free_delta[m] += by
                value = objective(net, batch).loss.item()
                weighting.free_delta[m] -= by
            return value

        assert gradient[m].item() == pytest.approx(derivative(loss), rel=1e-7, abs=1e-10)


def test_the_outer_level_has_the_weights_that_learning_started_from() -> None:
    mask = MASKS["M=2, B=1"]
    net, batch = net_for(mask), prism_batch(mask, 9, 8, seed=66)
    options: dict[str, Any] = {"direction": "teacher_student", "scale_decay": True}
    weighting = LearnedWeights(2, beta=(0.5, 0.7), delta=0.3)
    objective = PrismObjective(weighting=weighting, **options)
    with torch.no_grad():
        weighting.free_beta.add_(1.0)
    fixed = PrismObjective(beta=(0.5, 0.7), delta=0.3, **options)
    assert torch.equal(objective.meta_objective(net, batch).loss, fixed(net, batch).loss)
    assert (
        objective.meta_objective.hyper_parameters() == {}
        and "beta" not in objective.meta_objective(net, batch).terms
    )
    assert objective(net, batch).loss > fixed(net, batch).loss
    # Weights of the objective's own are those of the outer level.
    other = PrismObjective(beta=0.1, weighting=weighting, **options).meta_objective
    assert torch.equal(
        other(net, batch).loss, PrismObjective(beta=0.1, delta=0.3, **options)(net, batch).loss
    )
    # Nothing is learned of frozen weights, and both levels have them.
    weighting.requires_grad_(False)
    assert objective.meta_objective is objective and objective.hyper_parameters() == {}


@pytest.mark.parametrize(
    "make", [lambda: RelativePreference((0.0, 0.5)), lambda: LearnedWeights(2)]
)
def test_state_goes_to_another_objective(make: Callable[[], Weighting]) -> None:
    first, second = PrismObjective(weighting=make()), PrismObjective(weighting=make())
    first.observe({"preference": torch.tensor([0.5, -0.5]), "shown": torch.tensor([2.0, 1.0])})
    with torch.no_grad():
        for value in first.state_dict().values():
            value.mul_(1.5)
    second.load_state_dict(first.state_dict())
    assert second.state_dict().keys() == first.state_dict().keys()
    assert all(torch.equal(v, first.state_dict()[n]) for n, v in second.state_dict().items())


def test_a_weighting_for_another_number_of_modalities_is_refused() -> None:
    mask = MASKS["M=3, B=1"]
    with pytest.raises(ValueError, match="weighting: has 2 modalities, expected 3 as in the batch"):
        PrismObjective(weighting=LearnedWeights(2))(net_for(mask), prism_batch(mask, 9, 8, seed=67))
