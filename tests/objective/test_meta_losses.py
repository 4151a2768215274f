"""Losses of the outer level only: the soft worst over subsets, and the ranking of nested subsets."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import (
    F64,
    faults_of,
    meta_gradient,
    prism,
    prism_batch,
    prism_net,
    relative_error,
)
from torch import Tensor

from prism_meta.bilevel.inner import SGD
from prism_meta.bilevel.strategies import FirstOrder, Joint, SecondOrder
from prism_meta.errors import ConfigError
from prism_meta.modalities import Batch
from prism_meta.objective.meta_losses import Ranking, SoftWorst, one_less
from prism_meta.objective.prism import PrismObjective
from prism_meta.objective.weighting import LearnedWeights
from prism_meta.training.build import build_objective
from prism_meta.training.config import load_config

MASK = torch.tensor([[True, False], [True, True], [True, False], [False, True]])
#: Three subsets with the means 3, 1 and 2.
LOSSES = torch.tensor([2.5, 1.0, 3.5, 2.0], dtype=F64)


@pytest.mark.parametrize("temperature", [0.05, 0.7, 20.0])
def test_the_soft_worst_is_a_log_sum_exp_of_the_means_over_subsets(temperature: float) -> None:
    losses = LOSSES.clone().requires_grad_()
    value = SoftWorst(temperature).of(losses, MASK)
    powers = [math.exp(mean / temperature) for mean in (3.0, 1.0, 2.0)]
    assert value.item() == pytest.approx(temperature * math.log(sum(powers) / 3), rel=1e-12)
    # A subset pulls with its softmax, shared by its samples.
    (slopes,) = torch.autograd.grad(value, losses)
    shares = [powers[0] / 2, powers[1], powers[0] / 2, powers[2]]
    assert slopes.tolist() == pytest.approx([share / sum(powers) for share in shares], rel=1e-12)


def test_the_soft_worst_runs_from_the_worst_subset_to_the_mean_over_subsets() -> None:
    assert float(SoftWorst(1e-3).of(LOSSES, MASK)) == pytest.approx(3.0, abs=2e-3)
    assert float(SoftWorst(1e6).of(LOSSES, MASK)) == pytest.approx(2.0, abs=1e-5)
    assert float(SoftWorst(1e-3).of(1e4 * LOSSES, MASK)) == pytest.approx(3e4), "no overflow"
    same = MASK[:1].expand(4, -1)
    assert float(SoftWorst(0.3).of(LOSSES, same)) == pytest.approx(float(LOSSES.mean()), rel=1e-12)


def fused(batch: Batch, mask: Tensor | None = None) -> Tensor:
    """L_fuse of each sample, one by one."""
    net, objective = prism_net(), PrismObjective()
    rows = []
    for n in range(len(batch.mask)):
        shown = batch.mask[n : n + 1] if mask is None else mask[n : n + 1]
        one = Batch(batch.image[n : n + 1], shown, batch.target[n : n + 1])
        rows.append(objective(net, one).terms["fuse"])
    return torch.stack(rows)


def batch_of(*rows: str) -> Batch:
    return prism_batch([[c == "1" for c in row] for row in rows], 7, 6, seed=80)


def test_only_the_fused_loss_is_averaged_in_another_way() -> None:
    batch, net = batch_of("110", "001", "110", "111"), prism_net()
    plain, meta = PrismObjective(), PrismObjective(meta_loss=SoftWorst(0.2))
    assert meta(net, batch).loss.item() == plain(net, batch).loss.item(), "L_train is the same"
    value = meta.meta_objective(net, batch)
    losses = fused(batch)
    worst = SoftWorst(0.2).of(losses, batch.mask)
    expected = plain(net, batch).loss - losses.mean() + worst
    assert value.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert value.terms["soft_worst"].item() == pytest.approx(worst.item(), rel=1e-12)
    assert not value.terms["soft_worst"].requires_grad


def test_one_less_takes_them_in_turn() -> None:
    mask = torch.tensor([[True, True, True]] * 4 + [[False, True, True], [True, False, True]])
    assert one_less(mask).int().tolist() == [
        [0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 0],
    ]  # fmt: skip


@pytest.mark.parametrize("unimodal", [True, False])
def test_the_ranking_is_a_hinge_against_one_modality_less(unimodal: bool) -> None:
    batch, net = batch_of("110", "001", "011", "111", "101"), prism_net()
    objective = PrismObjective(meta_loss=Ranking(0.7), unimodal=unimodal)
    value = objective.meta_objective(net, batch)
    several = torch.tensor([0, 2, 3, 4])
    larger, smaller = (
        fused(batch),
        fused(batch, one_less(batch.mask) | (batch.mask.sum(1) == 1)[:, None]),
    )
    hinge = (larger - smaller)[several].clamp(min=0)
    assert 0 < int((hinge > 0).sum()) < 4, "some are ranked well, and some are not"
    expected = objective(net, batch).loss + 0.7 * hinge.mean()
    assert value.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert value.terms["ranking"].item() == pytest.approx(hinge.mean().item(), rel=1e-10)


def test_the_ranking_leaves_the_smaller_set_alone() -> None:
    """Its gradient is that of the larger set's loss only."""
    batch, net = batch_of("110", "011", "111"), prism_net()
    objective = PrismObjective(meta_loss=Ranking(1.0), unimodal=False)
    params = dict(net.named_parameters())

    def gradient(value: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(
            value, list(params.values()), materialize_grads=True, allow_unused=True
        )
        return dict(zip(params, found, strict=True))

    plain = objective(net, batch)
    ranked = objective.meta_objective(net, batch)
    worse = fused(batch) > fused(batch, one_less(batch.mask))
    by_hand = plain.loss + (plain.samples * worse).sum() / 3
    assert relative_error(gradient(ranked.loss), gradient(by_hand)) <= 1e-10


def test_samples_that_show_one_modality_have_no_rank() -> None:
    batch, net = batch_of("100", "001"), prism_net()
    value = PrismObjective(meta_loss=Ranking()).meta_objective(net, batch)
    assert value.loss.item() == PrismObjective()(net, batch).loss.item()
    assert value.terms["ranking"].item() == 0


def test_padding_is_left_out_of_the_ranking() -> None:
    batch, net = batch_of("110", "111"), prism_net()
    valid = torch.ones(2, 7, 6).bool()
    valid[:, 4:] = False
    other = batch.target.clone()
    other[:, 4:] = 0
    objective = PrismObjective(meta_loss=Ranking(), unimodal=False).meta_objective
    values = [
        objective(net, replace(batch, target=t, valid=valid)).loss for t in (batch.target, other)
    ]
    assert values[0].item() == values[1].item()


@pytest.mark.parametrize("meta_loss", [SoftWorst(0.3), Ranking(2.0)], ids=["worst", "ranking"])
@pytest.mark.parametrize("strategy", [FirstOrder(SGD(0.1)), SecondOrder(SGD(0.1)), Joint()],
                         ids=lambda s: s.name)  # fmt: skip
def test_strategies_use_it_for_the_meta_batch_only(strategy: Any, meta_loss: Any) -> None:
    plain = replace(prism(), meta=batch_of("110", "001", "011", "111", "101"))
    problem = replace(plain, objective=PrismObjective(meta_loss=meta_loss))
    result, other = meta_gradient(strategy, problem), meta_gradient(strategy, plain)
    assert result.train_loss.item() == other.train_loss.item()
    assert relative_error(result.adapted, other.adapted) == 0
    expected = problem.objective.meta_objective
    moved = prism_net()
    moved.load_state_dict({**moved.state_dict(), **result.adapted})
    assert result.meta_loss.item() == pytest.approx(expected(moved, problem.meta).loss.item())
    assert result.meta_loss.item() != other.meta_loss.item()


def test_learned_weights_are_not_in_it() -> None:
    weighting = LearnedWeights(3, beta=5.0, delta=5.0).double()
    objective = PrismObjective(beta=0.02, delta=0.01, weighting=weighting, meta_loss=SoftWorst(0.2))
    batch, net = batch_of("110", "001"), prism_net()
    expected = PrismObjective(meta_loss=SoftWorst(0.2)).meta_objective(net, batch).loss
    assert objective.meta_objective(net, batch).loss.item() == expected.item()


@pytest.mark.parametrize(("make", "name"), [(SoftWorst, "temperature"), (Ranking, "weight")])
def test_bad_numbers_are_refused(make: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got 0.0, expected a number > 0$"):
        make(0.0)


def test_the_config_builds_it() -> None:
    two_levels = "meta.strategy=first_order"
    overrides = [two_levels, "objective.meta_loss=soft_worst", "objective.meta_temperature=0.4"]
    built = build_objective(load_config(overrides=overrides).objective, [0.0] * 4).meta_loss
    assert isinstance(built, SoftWorst) and built.temperature == 0.4
    overrides = [two_levels, "objective.meta_loss=ranking", "objective.ranking_weight=3.0"]
    built = build_objective(load_config(overrides=overrides).objective, [0.0] * 4).meta_loss
    assert isinstance(built, Ranking) and built.weight == 3
    assert build_objective(load_config().objective, [0.0] * 4).meta_loss is None


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (
            ["objective.meta_loss=soft_worst", "meta.strategy=reptile"],
            "objective.meta_loss: meta.strategy reptile only measures the meta loss; use first_order, "
            "second_order or joint, or meta_loss same",
        ),
        (
            ["objective.ranking_weight=2.0"],
            "objective: ranking_weight: only meta_loss = ranking has one; set it, or leave "
            "ranking_weight out",
        ),
    ],
)
def test_what_does_not_go_together(overrides: list[str], fault: str) -> None:
    assert faults_of(lambda: load_config(overrides=overrides), ConfigError) == (fault,)
