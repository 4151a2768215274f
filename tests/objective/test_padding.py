"""Voxels that pad a small volume are outside of every loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers import prism_batch, prism_net, randn
from torch import Tensor
from torch.nn.functional import pad

from prism_meta.modalities import Batch
from prism_meta.networks.prediction import Prediction
from prism_meta.objective import losses
from prism_meta.objective.prism import PrismObjective
from prism_meta.objective.weighting import RelativePreference

#: Of a map (5, 4) in a map (8, 9).
ENDS = (2, 3, 1, 2)
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]] = {
    "cross-entropy": lambda a, _, y, v: losses.weighted_cross_entropy(a, y, valid=v),
    "plain cross-entropy": lambda a, _, y, v: losses.weighted_cross_entropy(
        a, y, weighted=False, valid=v
    ),
    "Dice": lambda a, _, y, v: losses.soft_dice(a, y, valid=v),
    "segmentation": lambda a, _, y, v: losses.segmentation(a, y, valid=v),
    "pixel": lambda a, b, _, v: losses.pixel_distillation(a, b, valid=v),
    "prototype": lambda a, b, y, v: losses.prototype_l2(a, b, y, 3, valid=v),
    "similarity": lambda a, b, y, v: losses.prototype_similarity(a, b, y, 3, valid=v),
    "distance": lambda a, b, y, v: losses.prototype_distance(a, b, y, 3, valid=v),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_padded_map_has_the_loss_of_the_map(name: str) -> None:
    a, b = (randn(2, 3, 5, 4, seed=seed) for seed in (1, 2))
    target = torch.arange(40).view(2, 5, 4) % 2  # class 2 is absent, but for the padding
    inside = torch.ones(2, 5, 4, dtype=torch.bool)
    plain = LOSSES[name](a, b, target, None)
    torch.testing.assert_close(LOSSES[name](a, b, target, inside), plain, rtol=1e-12, atol=0)
    padded = [pad(x, ENDS, value=value) for x, value in ((a, 3.0), (b, -2.0), (target, 2))]
    found = LOSSES[name](*padded, pad(inside, ENDS))
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(LOSSES[name](*padded, None), plain), "the padding would count"


@pytest.mark.parametrize("name", LOSSES)
def test_a_sample_of_padding_alone_adds_no_gradient(name: str) -> None:
    a = randn(1, 3, 5, 4, seed=1).requires_grad_()
    nowhere = torch.zeros(1, 5, 4, dtype=torch.bool)
    loss = LOSSES[name](a, randn(1, 3, 5, 4, seed=2), torch.zeros(1, 5, 4).long(), nowhere)
    assert torch.isfinite(loss).all()
    (gradient,) = torch.autograd.grad(loss.sum(), a)
    assert not gradient.any()


OBJECTIVES = {
    "default": PrismObjective(),
    "similarity": PrismObjective(prototype=losses.prototype_similarity, weighted=True),
    "preference": PrismObjective(weighting=RelativePreference([0.1, 0.5, 0.3])),
    "one branch": PrismObjective(unimodal=False),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_objective_leaves_padding_out(name: str) -> None:
    objective, net = OBJECTIVES[name], prism_net()
    batch = prism_batch([[True, False, True], [True, True, True]], 12, 10, seed=7)
    valid = torch.zeros_like(batch.target, dtype=torch.bool)
    valid[:, 2:9, 4:] = True
    kept: list[Prediction] = []

    def forward(image: Tensor, mask: Tensor, **options: bool) -> Prediction:
        prediction = net(image, mask, **options)
        prediction.fused.retain_grad()
        kept.append(prediction)
        return prediction

    padded = replace(batch, valid=valid)
    loss = objective(forward, padded).loss
    loss.backward()
    (prediction,) = kept
    assert prediction.fused.grad is not None
    outside = prediction.fused.grad.movedim(1, -1)[~valid]
    inside = prediction.fused.grad.movedim(1, -1)[valid]
    assert not outside.any() and inside.any()
    other = replace(padded, target=torch.where(valid, batch.target, 1))
    torch.testing.assert_close(objective(net, other).loss, loss, rtol=1e-12, atol=0)
    everywhere = replace(batch, valid=torch.ones_like(valid))
    torch.testing.assert_close(
        objective(net, everywhere).loss, objective(net, batch).loss, rtol=1e-12, atol=0
    )


def test_a_batch_checks_and_moves_its_valid_voxels() -> None:
    image, mask, target = torch.zeros(2, 1, 4), torch.ones(2, 1).bool(), torch.zeros(2, 4).long()
    valid = torch.ones(2, 4, dtype=torch.bool)
    moved = Batch(image, mask, target, valid=valid).to("meta").valid
    assert moved is not None and moved.is_meta
    message = r"^valid: got torch.bool \(2, 3\), expected torch.bool \(2, 4\), as the target$"
    with pytest.raises(ValueError, match=message):
        Batch(image, mask, target, valid=valid[:, :3])
    with pytest.raises(ValueError, match=r"^valid: got torch.float32 "):
        Batch(image, mask, target, valid=valid.float())
