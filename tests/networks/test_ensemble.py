"""Means of predictions: of several models, and of mirrored images."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

import prism_meta as pm
from prism_meta.networks.ensemble import Ensemble


def models(dims: int, count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        pm.PrismNet(num_modalities=3, num_classes=4, spatial_dims=dims, width=2, depth=2).eval()
        for _ in range(count)
    ]


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
def test_it_is_the_mean_of_the_probabilities(dims: int, flips: bool) -> None:
    parts = models(dims, 2)
    ensemble = Ensemble(parts, flips=flips)
    image = torch.randn(2, 3, *(6, 8, 10)[:dims])
    subsets = pm.subsets(3)[[0, 3, 6]]
    # An oracle: every model, every combination of mirrored axes, one subset at a time.
    combinations = product([False, True], repeat=dims) if flips else [(False,) * dims]
    axes = [[2 + k for k, on in enumerate(each) if on] for each in combinations]
    with torch.no_grad():
        for s, subset in enumerate(subsets):
            mask = subset.expand(2, -1)
            mean = sum(
                model.segment(image.flip(flip), mask).softmax(1).flip(flip)  # type: ignore[operator]
                for model in parts
                for flip in axes
            ) / (len(parts) * len(axes))
            assert isinstance(mean, torch.Tensor)
            torch.testing.assert_close(ensemble.segment(image, mask).exp(), mean)
            torch.testing.assert_close(ensemble.segment_subsets(image, subsets)[s].exp(), mean)


def test_probabilities_of_0_have_finite_logits() -> None:
    class Sure(nn.Module):
        spatial_dims = 2

        def segment(self, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return torch.tensor([0.0, 1000.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)

    logits = Ensemble([Sure()]).segment(torch.zeros(1, 1, 4, 4), torch.ones(1, 1).bool())
    assert logits.isfinite().all() and (logits[:, 1] == 0).all() and (logits[:, 0] < -80).all()


def test_a_hidden_modality_has_no_influence() -> None:
    ensemble = Ensemble(models(2, 2), flips=True)
    image, mask = torch.randn(1, 3, 8, 8), torch.tensor([[True, False, True]])
    other = image.clone()
    other[:, 1] = torch.nan
    with torch.no_grad():
        assert torch.equal(ensemble.segment(image, mask), ensemble.segment(other, mask))


def test_what_it_refuses() -> None:
    with pytest.raises(
        ValueError, match=r"^models: have 2, 3 axes, expected at least one model, and"
    ):
        Ensemble([*models(2, 1), *models(3, 1)])
    with pytest.raises(ValueError, match=r"^models: have none axes"):
        Ensemble([])
    with pytest.raises(TypeError, match=r"^Ensemble: predicts, and cannot be trained"):
        Ensemble(models(2, 1))(torch.zeros(1, 3, 8, 8), torch.ones(1, 3).bool())
