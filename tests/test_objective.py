"""E10 recomputed with loops: one sample, one modality, one separate forward at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import F64, derivative, prism_batch, prism_net
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, torch's own convention

from prism_meta import losses
from prism_meta.modalities import Batch
from prism_meta.network import PrismNet
from prism_meta.objective import PrismObjective
from prism_meta.weighting import LearnedWeights, RelativePreference, Weighting
from prism_meta.wrap import wrap

MASKS = {
    "M=2, B=1, one shown": [[False, True]],
    "M=2, B=1": [[True, True]],
    "M=2, B=5": [[True, True], [True, False], [False, True], [True, True], [True, False]],
    "M=3, B=1": [[True, False, True]],
    "M=3, B=5": [
        [True, True, True],
        [True, False, False],
        [False, True, True],
        [True, True, False],
        [False, True, False],
    ],
    "M=4, B=1, one shown": [[False, False, True, False]],
    "M=4, B=5": [
        [True, True, True, True],
        [True, False, False, True],
        [False, True, False, False],
        [False, True, True, True],
        [True, False, True, False],
    ],
}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


every_size = pytest.mark.parametrize("size", [(9, 8), (6, 5, 7)], ids=["2-D", "3-D"])

BETA, DELTA = (0.7, 1.9, 0.3, 0.9), (1.1, 0.2, 2.3, 0.5)


def net_for(mask: list[list[bool]], size: tuple[int, ...] = (9, 8)) -> PrismNet:
    return prism_net(num_modalities=len(mask[0]), depth=3, spatial_dims=len(size))


def weights_for(mask: list[list[bool]]) -> dict[str, Any]:
    return {"beta": BETA[: len(mask[0])], "delta": DELTA[: len(mask[0])]}


def terms_by_loops(
    net: PrismNet, batch: Batch, objective: PrismObjective
) -> dict[str, dict[tuple[int, ...], Tensor]]:
    """Each term of E10 by sample, or by sample and modality; no weights beta and delta yet."""
    found: dict[str, dict[tuple[int, ...], Tensor]] = {
        name: {} for name in ("fuse", "prm", "uni", "pixel", "proto", "distance")
    }

    def segmentation(logits: Tensor, target: Tensor) -> Tensor:
        return losses.weighted_cross_entropy(
            logits, target, weighted=objective.weighted
        ) + losses.soft_dice(logits, target)

    dense = net(batch.image, batch.mask).unimodal
    for n, shown in enumerate(batch.mask.tolist()):
        image, y = batch.image[n : n + 1], batch.target[n : n + 1]
        out = net(image, batch.mask[n : n + 1])
        found["fuse"][n,] = segmentation(out.fused, y)
        found["prm"][n,] = torch.zeros(1, dtype=F64)
        for s, coarse in enumerate(out.prm):
            mode = "bilinear" if y.ndim == 3 else "trilinear"
            fine = F.interpolate(coarse, size=y.shape[1:], mode=mode, align_corners=False)
            found["prm"][n,] = found["prm"][n,] + (0.5, 0.25, 0.125)[s] * segmentation(fine, y)
        for m in [m for m, is_shown in enumerate(shown) if is_shown]:
            one = net(image, torch.eye(len(shown)).bool()[m : m + 1])
            found["uni"][n, m] = segmentation(dense[n : n + 1, m], y)
            pixel = torch.zeros(1, dtype=F64)
            levels = zip((one.fused, *one.prm), (out.fused, *out.prm), strict=True)
            for level, (z, t) in enumerate(levels):
                pixel = pixel + (0.5**level if objective.scale_decay else 1) * (
                    losses.pixel_distillation(z, t, objective.temperature, objective.direction)
                )
            found["pixel"][n, m] = pixel
            for name, loss in (
                ("proto", objective.prototype),
                ("distance", losses.prototype_distance),
            ):
                found[name][n, m] = loss(one.features, out.features, y, out.fused.shape[1])
    return found


def total_by_loops(
    found: dict[str, dict[tuple[int, ...], Tensor]], beta: Sequence[float], delta: Sequence[float]
) -> Tensor:
    size = len(found["fuse"])
    total = sum(found["fuse"].values()) + sum(found["prm"].values()) + sum(found["uni"].values())
    for (n, m), pixel in found["pixel"].items():
        total = total + beta[m] * pixel + delta[m] * found["proto"][n, m]
    return total.squeeze() / size


def gradients(loss: Tensor, net: nn.Module) -> Tensor:
    params = list(net.parameters())
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, params, materialize_grads=True)]
    )


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
    actual = PrismObjective()(net, batch).terms["prm"].item()
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


# ---------------------------------------------------------------- one branch alone


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
    # What the objective reads of a prediction that has the fused branch alone.
    value = PrismObjective(unimodal=False)(
        lambda image, shown, unimodal: replace(net(image, shown), alone=None, unimodal_packed=None),
        batch,
    )
    found = terms_by_loops(net, batch, PrismObjective())
    expected = sum(found["fuse"].values()) + sum(found["prm"].values())
    assert value.loss.item() == pytest.approx((expected / len(mask)).item(), rel=1e-10)
    assert set(value.terms) == {"fuse", "prm"}


def test_one_branch_has_nothing_to_weigh() -> None:
    with pytest.raises(
        ValueError,
        match="weighting: got LearnedWeights with unimodal=False, which leaves nothing to weigh; "
        "leave out one of the two",
    ):
        PrismObjective(unimodal=False, weighting=LearnedWeights(2))


# ---------------------------------------------------------------- E11


def preference_by_loops(
    distance: dict[tuple[int, ...], Tensor],
) -> dict[tuple[int, ...], float]:
    found = {}
    for (n, m), d in distance.items():
        own = [other.item() for (k, _), other in distance.items() if k == n]
        # One modality alone is the fused branch: no preference.
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
    assert (objective.state_dict(), objective.weights(), objective.learned()) == ({}, {}, {})
    assert objective.outer is objective
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
    learned = objective.learned()
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
    assert torch.equal(objective.outer(net, batch).loss, fixed(net, batch).loss)
    assert objective.outer.learned() == {} and "beta" not in objective.outer(net, batch).terms
    assert objective(net, batch).loss > fixed(net, batch).loss
    # Weights of the objective's own are those of the outer level.
    other = PrismObjective(beta=0.1, weighting=weighting, **options).outer
    assert torch.equal(
        other(net, batch).loss, PrismObjective(beta=0.1, delta=0.3, **options)(net, batch).loss
    )
    # Nothing is learned of frozen weights, and both levels have them.
    weighting.requires_grad_(False)
    assert objective.outer is objective and objective.learned() == {}


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
    with pytest.raises(
        ValueError, match="weighting: is made for 2 modalities, expected 3 as in the batch"
    ):
        PrismObjective(weighting=LearnedWeights(2))(net_for(mask), prism_batch(mask, 9, 8, seed=67))
