"""Profiles against closed forms, what real tensors need, and the windows that are really computed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_memory import Alive
from torch import Tensor, nn

from prism_meta.evaluation.predictor import Predictor
from prism_meta.evaluation.windows import Windows
from prism_meta.modalities import subsets
from prism_meta.networks.prism import PrismNet
from prism_meta.networks.wrapped import wrap
from prism_meta.training.build import build_model
from prism_meta.training.config import load_config
from prism_meta.training.profiling.prediction import CaseSize, call_work, profile_prediction
from prism_meta.training.profiling.result import PredictionProfile
from prism_meta.training.profiling.steps import profile_training

CPU = torch.device("cpu")
ALL = torch.ones(1, 4, dtype=torch.bool)
SMALL = ("data.patch=[16, 16]", "data.batch_size=2", "model.width=2", "model.depth=2")


def convolutions(dims: int) -> tuple[nn.Module, list[tuple[int, int, int]]]:
    """A net, and inputs, outputs and edge of the kernels of its convolutions."""
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
    layers = [(4, 6, 3), (6, 5, 5), (5, 4, 1)]
    net = nn.Sequential(*(conv(a, b, k, padding=k // 2) for a, b, k in layers))
    return net, layers


def test_flops_of_convolutions_are_the_closed_form() -> None:
    for dims, batch, patch in ((2, 1, (9, 8)), (2, 5, (9, 8)), (3, 2, (6, 5, 7))):
        net, layers = convolutions(dims)
        flops, _ = call_work(wrap(net), torch.zeros(batch, 4, *patch), ALL)
        per_voxel = sum(2 * a * b * k**dims for a, b, k in layers)
        assert flops == batch * math.prod(patch) * per_voxel


def test_flops_of_training_are_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first-order step: a forward and a backward pass at phi, and at phi~."""
    net, layers = convolutions(2)
    monkeypatch.setattr(
        "prism_meta.training.profiling.memory.build_objective",
        lambda *_: (
            lambda forward, batch: (
                forward(batch.image, batch.mask, unimodal=False).fused.square().mean()
            )
        ),
    )
    config = load_config(overrides=SMALL)
    made = profile_training(config, wrap(net), ["first_order"], device=CPU, rounds=2)
    forward = [2 * a * b * k**2 * 2 * 16 * 16 for a, b, k in layers]
    # The backward pass has two products per convolution; the first layer's image needs no gradient.
    assert made.strategies[0].work is not None
    assert made.strategies[0].work.flops == 2 * (3 * sum(forward) - forward[0])


@pytest.mark.parametrize("dims", [2, 3])
def test_fewer_modalities_cost_less_and_as_many_the_same(dims: int) -> None:
    net = PrismNet(spatial_dims=dims, width=2, depth=2)
    works = [call_work(net, torch.zeros(1, 4, *[8] * dims), row[None]) for row in subsets(4)]
    sizes = subsets(4).sum(1).tolist()
    for part in (0, 1):
        of_size = [
            {w[part] for w, n in zip(works, sizes, strict=True) if n == size}
            for size in (1, 2, 3, 4)
        ]
        assert all(len(each) == 1 for each in of_size)
        values = [each.pop() for each in of_size]
        assert values == sorted(values) and len(set(values)) == 4
    # One of four skips three encoders and the fusion, but not the decoder.
    assert 0.25 < works[0][0] / works[-1][0] < 0.6


def test_a_wrapped_net_computes_all_modalities_of_every_subset() -> None:
    net, _ = convolutions(2)
    works = {call_work(wrap(net), torch.zeros(1, 4, 8, 8), row[None])[0] for row in subsets(4)}
    assert len(works) == 1


@pytest.mark.parametrize("row", [0, 4, 14])
@pytest.mark.parametrize("network", ["prism", "unet"])
def test_memory_is_what_real_tensors_need(network: str, row: int) -> None:
    model = build_model(load_config(overrides=[*SMALL, f"model.network={network}"])).eval()
    subset = subsets(4)[row : row + 1]
    with torch.no_grad(), Alive() as alive:
        image = torch.randn(3, 4, 16, 16)
        model.segment_subsets(image, subset)  # type: ignore[operator]
    own = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert call_work(model, image, subset)[1] == pytest.approx(alive.peak + own, rel=0.03)


class Counting(PrismNet):
    """Counts the windows that it predicts."""

    windows = 0

    def segment_subsets(self, image: Tensor, subsets: Tensor) -> Tensor:
        self.windows += len(image)
        return super().segment_subsets(image, subsets)


@pytest.mark.parametrize(
    ("patch", "shape", "overlap"),
    [
        ((16, 16), (40, 16, 5), 0.5),
        ((16, 16), (10, 33, 3), 0.3),
        ((8, 8, 8), (20, 8, 13), 0.5),
        ((8, 16, 8), (5, 17, 24), 0.0),
        ((16, 8, 8), (47, 9, 11), 0.9),
    ],
)
def test_the_windows_of_a_case(
    patch: tuple[int, ...], shape: tuple[int, ...], overlap: float
) -> None:
    net = Counting(spatial_dims=len(patch), width=1, depth=2, num_modalities=1)
    windows = Windows(net, patch=patch, overlap=overlap, batch_size=1)
    with torch.no_grad():
        windows.logits(torch.zeros(1, *shape), torch.ones(1, 1).bool())
    assert windows.count(shape) == net.windows


def predicted(limit: float, **sizes: Any) -> PredictionProfile:
    net = PrismNet(num_modalities=2, spatial_dims=2, width=1, depth=2)
    predictor = Predictor(net, modalities=("a", "b"), patch=(16, 16), **sizes)
    size = CaseSize((16, 20, 3), "given")
    return profile_prediction(predictor, subsets(2), size, rounds=2, limit=limit)


def test_a_case_is_measured_in_the_time_that_there_is() -> None:
    measured, estimated = predicted(limit=60), predicted(limit=0, batch_size=4)
    assert (measured.measured, estimated.measured) == (True, False)
    assert (measured.windows, measured.batch, estimated.batch) == (6, 6, 4)
    for made in (measured, estimated):
        for each in made.subsets:
            assert each.case_flops == 6 * each.window_flops > 0
            assert each.work.flops == made.batch * each.window_flops
            assert each.case_seconds > 0 and len(each.window.rounds) == 2
            assert each.work.allocated is None
    assert [each.modalities for each in measured.subsets] == [1, 1, 2]
    assert all(each.case and each.case_seconds == each.case.median for each in measured.subsets)


def test_the_model_keeps_its_mode_and_its_weights() -> None:
    config = load_config(overrides=SMALL)
    model = wrap(convolutions(2)[0]).train()
    before = [p.clone() for p in model.parameters()]
    made = profile_training(config, model, ["second_order", "first_order"], device=CPU, rounds=2)
    assert model.training
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    second, first = made.strategies
    assert first.ratio == 1.0 and second.step is not None and first.step is not None
    assert second.ratio == pytest.approx(second.step.ratio(first.step))
    assert first.work is not None and second.work is not None
    # 4 units to 2, and the weights have no part in them.
    assert 1.8 < second.work.flops / first.work.flops < 2.2
    assert second.work.memory > first.work.memory


def test_a_strategy_that_cannot_train_the_model_has_a_fault() -> None:
    """An inner state that Reptile does not have; the others are profiled, those without one, too."""
    shared = ("meta.strategy=first_order", "meta.inner_state=shared", "meta.inner=adamw")
    config = load_config(overrides=[*SMALL, *shared])
    made = profile_training(
        config,
        wrap(convolutions(2)[0]),
        ["reptile", "single_level", "first_order"],
        device=CPU,
        rounds=2,
    )
    reptile, *others = made.strategies
    assert reptile.fault == "inner_state: shared does not go with reptile; use fresh or carried"
    assert reptile.step is None
    assert all(each.fault is None and each.step is not None for each in others)


def test_several_episodes_cost_as_often() -> None:
    works = []
    for episodes in (1, 2):
        config = load_config(overrides=[*SMALL, f"meta.episodes={episodes}"])
        made = profile_training(config, wrap(convolutions(2)[0]), ["reptile"], device=CPU, rounds=2)
        assert made.strategies[0].work is not None and made.strategies[0].ratio is None
        works.append(made.strategies[0].work.flops)
    assert works[1] == 2 * works[0]
