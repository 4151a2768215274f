"""E10 recomputed with loops, and its options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import prism_batch, prism_net
from prism_loops import (
    BETA,
    DELTA,
    MASKS,
    every_mask,
    gradients,
    net_for,
    terms_by_loops,
    total_by_loops,
    weights_for,
)
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, torch's own convention

from prism_meta.modalities import Batch
from prism_meta.networks.wrapped import wrap
from prism_meta.objective.prism import PrismObjective, losses
from prism_meta.objective.weighting import LearnedWeights, RelativePreference


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"direction": "teacher_student", "temperature": 2.0},
        {"prototype": losses.prototype_similarity},
        {"weighted": False},
        {"scale_decay": True},
    ],
    ids=["default", "published direction", "similarity", "plain", "scale decay"],
)
@every_mask
def test_total_and_gradient_equal_loops(mask: list[list[bool]], options: dict[str, Any]) -> None:
    check_total(mask, (9, 8), **options)


def check_total(mask: list[list[bool]], size: tuple[int, ...], **options: Any) -> None:
    net, batch = net_for(mask, size), prism_batch(mask, *size, seed=50)
    objective = PrismObjective(**weights_for(mask), **options)
    actual = objective(net, batch).loss
    expected = total_by_loops(terms_by_loops(net, batch, objective), BETA, DELTA)
    assert actual.shape == ()
    assert actual.item() == pytest.approx(expected.item(), rel=1e-10)
    mine, other = gradients(actual, net), gradients(expected, net)
    assert ((mine - other).norm() / other.norm()).item() <= 1e-9


@every_mask
def test_terms_are_means_over_the_samples_that_show_the_modality(mask: list[list[bool]]) -> None:
    net, batch = net_for(mask), prism_batch(mask, 9, 8, seed=51)
    objective = PrismObjective()
    terms = objective(net, batch).terms
    found = terms_by_loops(net, batch, objective)
    assert set(terms) == set(found) - {"distance"}
    assert not any(t.requires_grad for t in terms.values())
    for name in ("fuse", "prm"):
        mean = torch.stack(list(found[name].values())).mean()
        assert terms[name].item() == pytest.approx(mean.item(), rel=1e-10)
    for name in ("uni", "pixel", "proto"):
        for m in range(len(mask[0])):
            values = [v.item() for (_, other), v in found[name].items() if other == m]
            mean = sum(values) / max(len(values), 1)
            assert terms[name][m].item() == pytest.approx(mean, rel=1e-9, abs=1e-12)


def test_one_number_is_the_same_weight_for_every_modality() -> None:
    mask = MASKS["M=3, B=5"]
    net, batch = net_for(mask), prism_batch(mask, 9, 8, seed=52)
    one = PrismObjective(beta=0.6, delta=0.4)(net, batch).loss
    many = PrismObjective(beta=[0.6] * 3, delta=[0.4] * 3)(net, batch).loss
    assert torch.equal(one, many)


@pytest.mark.parametrize("name", ["beta", "delta"])
def test_a_weight_reaches_its_own_modality(name: str) -> None:
    mask = MASKS["M=3, B=5"]
    net, batch = net_for(mask), prism_batch(mask, 9, 8, seed=53)
    term = {"beta": "pixel", "delta": "proto"}[name]
    base = PrismObjective(beta=0.0, delta=0.0)(net, batch)
    for m in range(3):
        weights = [0.0, 0.0, 0.0]
        weights[m] = 1.0
        off: dict[str, Any] = {"beta": 0.0, "delta": 0.0, name: weights}
        rise = PrismObjective(**off)(net, batch).loss - base.loss
        shown = sum(row[m] for row in mask)
        expected = base.terms[term][m] * shown / len(mask)
        assert rise.item() == pytest.approx(expected.item(), rel=1e-9)


def test_a_sample_with_one_modality_has_nothing_to_distill() -> None:
    mask = [[False, True, False]]
    terms = PrismObjective()(net_for(mask), prism_batch(mask, 9, 8, seed=54)).terms
    assert terms["pixel"].abs().max() < 1e-14
    assert terms["proto"].abs().max() < 1e-14
    assert (terms["uni"] > 0).tolist() == [False, True, False]


def test_prm_maps_weigh_a_half_and_a_quarter_finest_first() -> None:
    mask = [[True, True, True]]
    net, batch = net_for(mask), prism_batch(mask, 8, 8, seed=55)
    out = net(batch.image, batch.mask)
    values = [
        losses.segmentation(F.interpolate(p, size=(8, 8), mode="bilinear"), batch.target).item()
        for p in out.prm
    ]
    expected = values[0] / 2 + values[1] / 4
    actual = PrismObjective(weighted=True)(net, batch).terms["prm"].item()
    assert actual == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["M=2, B=5", "M=4, B=1, one shown", "M=4, B=5"])
def test_three_dimensions(name: str) -> None:
    check_total(MASKS[name], (6, 5, 7), scale_decay=True)


def test_a_wrapped_net_has_no_prm_term() -> None:
    model = wrap(nn.Conv2d(2, 3, 3, padding=1).double(), modalities=("t1", "t2"))
    value = PrismObjective()(model, prism_batch([[True, True], [True, False]], 6, 6, seed=57))
    assert value.terms["prm"].item() == 0
    assert value.terms["pixel"].gt(0).all()


def test_half_precision_outputs_give_a_full_precision_loss() -> None:
    mask = [[True, True, False]]
    net = prism_net()
    batch = prism_batch(mask, 8, 8, seed=58)
    expected = PrismObjective()(net, batch).loss.item()
    half = Batch(batch.image.bfloat16(), batch.mask, batch.target)
    value = PrismObjective()(net.bfloat16(), half).loss
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected, rel=0.05)


def test_autocast_ends_with_the_forward() -> None:
    mask = MASKS["M=3, B=5"]
    net, batch = net_for(mask).float(), prism_batch(mask, 9, 8, seed=68)
    image = batch.image.float()
    objective = PrismObjective(
        prototype=losses.prototype_similarity, weighting=RelativePreference((0.0, 0.0, 0.0))
    )
    prediction = net(image, batch.mask)
    expected = objective(lambda *_: prediction, replace(batch, image=image))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = objective(lambda *_: prediction, replace(batch, image=image))
    assert torch.equal(actual.loss, expected.loss)
    assert all(torch.equal(term, actual.terms[name]) for name, term in expected.terms.items())


@pytest.mark.parametrize("name", ["beta", "delta"])
def test_a_wrong_number_of_weights_is_refused(name: str) -> None:
    mask = [[True, True, True]]
    options: dict[str, Any] = {name: [1.0, 2.0]}
    objective: Callable[..., Any] = PrismObjective(**options)
    with pytest.raises(
        ValueError, match="beta, delta: got 2 weights, expected 1 or 3, one per modality"
    ):
        objective(net_for(mask), prism_batch(mask, 8, 8, seed=59))


# ---------------------------------------------------------------- only one branch


@pytest.mark.parametrize("unimodal", [True, False])
def test_a_forward_that_knows_no_keyword_is_given_none_unless_it_is_needed(unimodal: bool) -> None:
    mask = MASKS["M=2, B=5"]
    net, seen = net_for(mask), []

    def forward(image: Tensor, shown: Tensor, **options: Any) -> Any:
        seen.append(options)
        return net(image, shown)

    PrismObjective(unimodal=unimodal)(forward, prism_batch(mask, 9, 8, seed=60))
    assert seen == [{} if unimodal else {"unimodal": False}]


@every_mask
def test_one_branch_is_the_fused_and_the_prm_loss(mask: list[list[bool]]) -> None:
    net, batch = net_for(mask), prism_batch(mask, 9, 8, seed=61)
    # What the objective reads of a prediction that has only the fused branch.
    value = PrismObjective(unimodal=False)(
        lambda image, shown, unimodal: replace(
            net(image, shown), single_modality=None, unimodal_packed=None
        ),
        batch,
    )
    found = terms_by_loops(net, batch, PrismObjective())
    expected = sum(found["fuse"].values()) + sum(found["prm"].values())
    assert value.loss.item() == pytest.approx((expected / len(mask)).item(), rel=1e-10)
    assert set(value.terms) == {"fuse", "prm"}


def test_one_branch_has_nothing_to_weigh() -> None:
    with pytest.raises(
        ValueError,
        match="weighting: got LearnedWeights with unimodal=False, which leaves nothing to weight; "
        "leave out one of the two",
    ):
        PrismObjective(unimodal=False, weighting=LearnedWeights(2))
