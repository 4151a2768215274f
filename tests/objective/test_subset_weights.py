"""Weights of the samples' losses by subset, learned through the inner step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from commands import SMALL
from helpers import (
    F64,
    Problem,
    derivative,
    faults_of,
    meta_gradient,
    prism,
    prism_batch,
    prism_net,
    relative_error,
)
from resuming import assert_resumed_equals
from torch import Tensor

import prism_meta as pm
from prism_meta.bilevel.inner import SGD
from prism_meta.bilevel.strategies import FirstOrder, ImplicitMAML, MetaStrategy, SecondOrder
from prism_meta.errors import ConfigError
from prism_meta.modalities import Batch, subset_index
from prism_meta.networks.fusion import MeanFusion
from prism_meta.objective.meta_losses import SoftWorst
from prism_meta.objective.prism import PrismObjective
from prism_meta.objective.weighting import LearnedSubsetWeights, LearnedWeights
from prism_meta.training.build import build_objective
from prism_meta.training.config import load_config

LR = 0.1
FREE = torch.linspace(-0.6, 0.9, 7, dtype=F64)
#: The subsets 0, 3, 6 and 3 again.
ROWS = [[True, False, False], [True, True, False], [True, True, True], [True, True, False]]


def weights(free: Tensor = FREE) -> LearnedSubsetWeights:
    made = LearnedSubsetWeights(3).double()
    with torch.no_grad():
        made.free_subsets.copy_(free)
    return made


def problem(**changes: Any) -> Problem:
    objective = PrismObjective(**{"subset_weights": weights(), **changes})
    return replace(prism(), objective=objective, train=prism_batch(ROWS, 7, 6, seed=90))


def test_they_are_a_softmax_with_a_mean_of_1() -> None:
    expected = 7 * FREE.exp() / FREE.exp().sum()
    torch.testing.assert_close(weights().weights(), expected, rtol=1e-12, atol=0)
    mask = torch.tensor(ROWS)
    torch.testing.assert_close(weights().of(mask), expected[subset_index(mask)], rtol=1e-12, atol=0)
    assert LearnedSubsetWeights(3).of(mask).tolist() == [1.0] * 4


@pytest.mark.parametrize("unimodal", [True, False])
def test_they_multiply_the_whole_loss_of_each_sample(unimodal: bool) -> None:
    net, batch = prism_net(), prism_batch(ROWS, 7, 6, seed=90)
    plain = PrismObjective(unimodal=unimodal)
    losses = [
        plain(
            net, Batch(batch.image[n : n + 1], batch.mask[n : n + 1], batch.target[n : n + 1])
        ).loss
        for n in range(4)
    ]
    expected = (torch.stack(losses) * weights().of(batch.mask)).mean()
    value = PrismObjective(unimodal=unimodal, subset_weights=weights())(net, batch)
    assert value.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    equal = PrismObjective(unimodal=unimodal, subset_weights=weights(torch.zeros(7)))(net, batch)
    assert equal.loss.item() == pytest.approx(plain(net, batch).loss.item(), rel=1e-12)


@pytest.mark.parametrize("meta_loss", [None, SoftWorst(0.2)], ids=["same", "worst"])
@pytest.mark.parametrize(
    "strategy", [FirstOrder(SGD(LR)), SecondOrder(SGD(LR))], ids=lambda s: s.name
)
def test_the_gradient_is_minus_eta_times_the_product_with_that_of_the_subset(
    strategy: MetaStrategy, meta_loss: Any
) -> None:
    """d L_meta / d w_s = -eta <grad L^s(phi), grad L_meta(phi~)>, both gradients taken by hand."""
    one = problem(meta_loss=meta_loss)
    got = meta_gradient(strategy, one).weight_gradient["free_subsets"]
    phi = oracles.phi_of(one)
    adapted = oracles.leaves(oracles.adapt(one, phi, LR, 1))
    v = oracles.derivatives(
        oracles.loss(replace(one, objective=one.objective.meta_objective), adapted, one.meta),
        adapted,
    )
    plain = replace(one, objective=PrismObjective())
    index, by_weight = subset_index(one.train.mask), torch.zeros(7, dtype=F64)
    for n in range(4):
        rows = slice(n, n + 1)
        sample = Batch(one.train.image[rows], one.train.mask[rows], one.train.target[rows])
        slope = oracles.derivatives(oracles.loss(plain, phi, sample) / 4, phi)
        by_weight[index[n]] -= LR * sum((slope[k] * v[k]).sum() for k in v)
    w = weights().weights().detach()
    jacobian = torch.diag(w) - w[:, None] * w / 7  # of the softmax
    torch.testing.assert_close(got, jacobian @ by_weight, rtol=1e-8, atol=1e-14)
    assert int((by_weight != 0).sum()) == 3, "the subsets that the batch shows"


@pytest.mark.parametrize("graph", ["stored", "recomputed"])
def test_through_several_steps_it_is_that_of_autograd(graph: Any) -> None:
    one = problem(meta_loss=SoftWorst(0.2))
    result = meta_gradient(SecondOrder(SGD(LR), 3, graph=graph), one)
    adapted = oracles.adapt(one, oracles.phi_of(one), LR, 3)
    outer = replace(one, objective=one.objective.meta_objective)
    expected = oracles.derivatives(
        oracles.loss(outer, adapted, one.meta), one.objective.hyper_parameters()
    )
    assert relative_error(result.weight_gradient, expected) <= 1e-9


def test_finite_differences_of_the_meta_loss() -> None:
    one = problem(beta=0.0, delta=0.0)  # of L_meta, which then detaches nothing
    one = replace(one, model=prism_net(fusion=MeanFusion))
    got = meta_gradient(SecondOrder(SGD(LR)), one).weight_gradient["free_subsets"]
    for k in (0, 3, 5):

        def loss(change: float, k: int = k) -> float:
            moved = FREE.clone()
            moved[k] += change
            objective = PrismObjective(beta=0.0, delta=0.0, subset_weights=weights(moved))
            result = meta_gradient(FirstOrder(SGD(LR)), replace(one, objective=objective))
            return float(result.meta_loss)

        # So short that no LeakyReLU passes its kink.
        assert float(got[k]) == pytest.approx(derivative(loss, step=1e-4), rel=1e-7)


def test_the_meta_loss_has_no_weights() -> None:
    one = problem()
    result = meta_gradient(FirstOrder(SGD(LR)), one)
    moved = prism_net()
    moved.load_state_dict({**moved.state_dict(), **result.adapted})
    assert result.meta_loss.item() == pytest.approx(PrismObjective()(moved, one.meta).loss.item())


def test_they_are_learned_beside_those_of_the_modalities() -> None:
    weighting = LearnedWeights(3).double()
    objective = PrismObjective(weighting=weighting, subset_weights=weights())
    assert set(objective.hyper_parameters()) == {"free_beta", "free_delta", "free_subsets"}
    assert objective.weights()["subset_weights"].shape == (7,)
    other = PrismObjective(
        weighting=LearnedWeights(3).double(), subset_weights=weights(torch.zeros(7))
    )
    other.load_state_dict(objective.state_dict())
    assert torch.equal(other.weights()["subset_weights"], objective.weights()["subset_weights"])
    for strategy in (SecondOrder(SGD(LR)), ImplicitMAML(SGD(LR), 2)):
        result = meta_gradient(strategy, replace(problem(), objective=objective))
        assert set(result.weight_gradient) == set(objective.hyper_parameters())


def test_another_number_of_modalities_is_refused() -> None:
    objective = PrismObjective(subset_weights=LearnedSubsetWeights(4).double())
    message = "^subset_weights: have 4 modalities, expected 3 as in the batch$"
    with pytest.raises(ValueError, match=message):
        objective(prism_net(), prism_batch(ROWS, 7, 6, seed=1))


@pytest.mark.parametrize("strategy", ["single_level", "joint", "reptile"])
def test_the_config_refuses_strategies_that_cannot_learn_them(strategy: str) -> None:
    overrides = ["objective.subset_weights=learned", f"meta.strategy={strategy}"]
    assert faults_of(lambda: load_config(overrides=overrides), ConfigError) == (
        "objective.subset_weights: learned weights follow the gradient of the meta loss through the inner "
        f"steps, and meta.strategy {strategy} has none; use first_order or second_order, or "
        "subset_weights equal",
    )


def test_a_run_learns_them_logs_them_and_resumes(cases: Path, tmp_path: Path) -> None:
    config = load_config(
        overrides=[*SMALL, "meta.strategy=first_order", "objective.subset_weights=learned",
                   "objective.meta_loss=soft_worst", "objective.unimodal=false",
                   "training.checkpoint_every=1"]
    )  # fmt: skip
    assert build_objective(config.objective, [0.0] * 4).subset_weights is not None
    whole = pm.train(cases, config, out=tmp_path / "whole", progress=False)
    logged = [line["terms"]["subset_weights"] for line in whole.history]
    assert logged[0] == [1.0] * 15 and logged[-1] != logged[0]
    assert sum(logged[-1]) == pytest.approx(15, rel=1e-5)
    assert_resumed_equals(tmp_path / "whole", cases, config, tmp_path / "cut", calls=4 + 2)
