"""E10 recomputed with loops: one sample, one modality, one separate forward at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import F64, prism_batch, prism_net
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, torch's own convention

from prism_meta import losses
from prism_meta.modalities import Batch
from prism_meta.network import PrismNet
from prism_meta.objective import PrismObjective
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
}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def net_for(mask: list[list[bool]]) -> PrismNet:
    return prism_net(num_modalities=len(mask[0]), depth=3)


def terms_by_loops(
    net: PrismNet, batch: Batch, objective: PrismObjective
) -> dict[str, dict[tuple[int, ...], Tensor]]:
    """Each term of E10 by sample, or by sample and modality; no weights beta and delta yet."""
    found: dict[str, dict[tuple[int, ...], Tensor]] = {
        name: {} for name in ("fuse", "prm", "uni", "pixel", "proto")
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
            fine = F.interpolate(coarse, size=y.shape[1:], mode="bilinear", align_corners=False)
            found["prm"][n,] = found["prm"][n,] + (0.5, 0.25, 0.125)[s] * segmentation(fine, y)
        for m in [m for m, is_shown in enumerate(shown) if is_shown]:
            one = net(image, torch.eye(len(shown)).bool()[m : m + 1])
            found["uni"][n, m] = segmentation(dense[n : n + 1, m], y)
            pixel = torch.zeros(1, dtype=F64)
            for z, t in zip((one.fused, *one.prm), (out.fused, *out.prm), strict=True):
                pixel = pixel + losses.pixel_distillation(
                    z, t, objective.temperature, objective.direction
                )
            found["pixel"][n, m] = pixel
            found["proto"][n, m] = objective.prototype(
                one.features, out.features, y, out.fused.shape[1]
            )
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
    ],
    ids=["default", "published direction", "similarity", "plain"],
)
@every_mask
def test_total_and_gradient_equal_loops(mask: list[list[bool]], options: dict[str, Any]) -> None:
    net, batch = net_for(mask), prism_batch(mask, 9, 8, seed=50)
    beta, delta = [0.7, 1.9, 0.3][: len(mask[0])], [1.1, 0.2, 2.3][: len(mask[0])]
    objective = PrismObjective(beta=beta, delta=delta, **options)
    actual = objective(net, batch).loss
    expected = total_by_loops(terms_by_loops(net, batch, objective), beta, delta)
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
    assert set(terms) == set(found)
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


def test_three_dimensions() -> None:
    mask = [[True, False, True], [False, True, False]]
    net, batch = prism_net(spatial_dims=3), prism_batch(mask, 4, 6, 5, seed=56)
    loss = PrismObjective()(net, batch).loss
    assert bool(loss.isfinite())
    assert gradients(loss, net).norm() > 0


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


@pytest.mark.parametrize("name", ["beta", "delta"])
def test_a_wrong_number_of_weights_is_refused(name: str) -> None:
    mask = [[True, True, True]]
    options: dict[str, Any] = {name: [1.0, 2.0]}
    objective: Callable[..., Any] = PrismObjective(**options)
    with pytest.raises(
        ValueError, match="beta, delta: got 2 weights, expected 1 or 3, one per modality"
    ):
        objective(net_for(mask), prism_batch(mask, 8, 8, seed=59))
