"""Wrapped nets with several encoders, and all subsets of a batch in one go."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from helpers import Problem, prism_batch, randn, relative_error
from nets import MASK, NAMES, Encoders, Giving, Spy, unet
from niftis import write_case
from torch import Tensor, nn

from prism_meta.bilevel.inner import SGD
from prism_meta.bilevel.strategies import FirstOrder, SecondOrder
from prism_meta.data.labels import LabelSet
from prism_meta.data.layouts.folders import load_cases
from prism_meta.evaluation.predictor import Predictor
from prism_meta.modalities import subsets
from prism_meta.networks.multi_encoder import MultiEncoderNet
from prism_meta.networks.wrapped import wrap
from prism_meta.objective.prism import PrismObjective


def test_a_net_with_several_encoders_runs_each_part_once() -> None:
    net, image = Encoders(), randn(2, 3, 8, 8, seed=61)
    assert isinstance(net, MultiEncoderNet) and not isinstance(unet(), MultiEncoderNet)
    model = wrap(net, NAMES, features="mix")
    out = model(image, MASK)
    assert net.calls == ["encode", "decode_fused 4", "decode_unimodal 3"]
    encoded = net.encode(image, MASK)
    close = {"rtol": 1e-12, "atol": 1e-12}
    for n in range(2):
        logits, coarse = net.decode_fused(encoded, torch.tensor([n]), MASK[n : n + 1])
        torch.testing.assert_close(out.fused[n], logits[0], **close)
        torch.testing.assert_close(out.prm[0][n], coarse[0], **close)
    for p, (m, n) in enumerate([(0, 0), (1, 1), (2, 0)]):
        one = torch.arange(3)[None] == m
        logits, coarse = net.decode_fused(encoded, torch.tensor([n]), one)
        torch.testing.assert_close(out.single_modality.logits[p], logits[0], **close)
        torch.testing.assert_close(out.single_modality.prm[0][p], coarse[0], **close)
        torch.testing.assert_close(out.unimodal[n, m], net.single(encoded[n, m]), **close)
    assert out.features.shape == (2, 4, 8, 8)
    net.calls.clear()
    assert torch.equal(model.segment(image, MASK), model(image, MASK, unimodal=False).fused)
    assert net.calls == ["encode", "decode_fused 2"] * 2


def test_a_hidden_modality_of_several_encoders_changes_no_bit() -> None:
    clean, dirty = (prism_batch(MASK.tolist(), 8, 8, seed=62) for _ in range(2))
    dirty.image[~MASK] = float("nan")
    model = wrap(Encoders(), NAMES)
    for strategy in (FirstOrder(SGD(0.05)), SecondOrder(SGD(0.05))):
        one, two = (strategy.meta_gradient(model, PrismObjective(), b, b) for b in (clean, dirty))
        assert torch.equal(one.meta_loss, two.meta_loss)
        assert all(torch.equal(one.gradient[n], two.gradient[n]) for n in one.gradient)


def test_several_encoders_have_the_oracles_second_order() -> None:
    train, meta = (prism_batch(rows, 8, 8, seed=63) for rows in (MASK.tolist(), [[True] * 3]))
    problem = Problem("encoders", wrap(Encoders(), NAMES), PrismObjective(), train, meta)
    result = SecondOrder(SGD(0.05), 2).meta_gradient(
        problem.model, problem.objective, problem.train, problem.meta
    )
    assert relative_error(result.gradient, oracles.second_order(problem, 0.05, 2)) <= 1e-9


def test_a_wrong_declaration_is_refused() -> None:
    class Half(Encoders):
        decode_unimodal = None  # type: ignore[assignment]

    class Wrong(Encoders):
        def decode_unimodal(self, encoded: Tensor, sample: Tensor, modality: Tensor) -> Tensor:
            return encoded[sample, modality]

    expected = (
        "net: Half has no decode_unimodal; a net with several encoders implements encode, "
        "decode_fused, decode_unimodal, see MultiEncoderNet"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        wrap(Half(), NAMES)
    message = "net: decode_unimodal returned (3, 4, 8, 8), expected (P, K, *S) = (3, 3, 8, 8)"
    with pytest.raises(ValueError, match=re.escape(message)):
        wrap(Wrong(), NAMES)(randn(2, 3, 8, 8, seed=64), MASK)


# --- many subsets of one batch --------------------------------------------------------------------

NETS: list[Any] = [
    pytest.param(lambda: unet(2), (8, 8), id="plain 2-D"),
    pytest.param(lambda: unet(3), (8, 8, 4), id="plain 3-D"),
    pytest.param(lambda: Giving(lambda *m: m), (8, 8), id="several maps"),
    pytest.param(Encoders, (8, 8), id="several encoders"),
]


@pytest.mark.parametrize(("make", "size"), NETS)
def test_every_subset_of_a_batch_is_what_segment_gives(
    make: Callable[[], nn.Module], size: tuple[int, ...]
) -> None:
    model, image, every = wrap(make(), NAMES), randn(2, 3, *size, seed=65), subsets(3)
    some = every[torch.tensor([6, 0, 4])]
    for chosen in (every, some, every[:1]):
        together = model.segment_subsets(image, chosen)
        assert len(together) == len(chosen)
        for logits, shown in zip(together, chosen, strict=True):
            expected = model.segment(image, shown.expand(2, -1))
            torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    image[:, 1] = float("nan")  # that of no subset
    assert bool(model.segment_subsets(image, torch.tensor([[True, False, True]])).isfinite().all())


def test_subsets_share_one_encoding() -> None:
    net = Encoders()
    wrap(net, NAMES).segment_subsets(randn(2, 3, 8, 8, seed=66), subsets(3))
    assert net.calls == ["encode", *["decode_fused 2"] * 7]


def test_wrong_subsets_are_refused() -> None:
    model, image = wrap(Spy(), NAMES), randn(2, 3, 4, 4, seed=67)
    nothing = "mask: a sample is shown no modality; each row needs at least one True"
    for empty in ([[True, True, True], [False, False, False]], [[False, False, False]]):
        with pytest.raises(ValueError, match=nothing):
            model.segment_subsets(image, torch.tensor(empty))
    with pytest.raises(ValueError, match=nothing):
        model.segment_subsets(image, torch.ones(0, 3).bool())
    with pytest.raises(ValueError, match=r"mask: got \(2, 2\), expected \(B, M\) = \(2, 3\)"):
        model.segment_subsets(image, torch.ones(1, 2).bool())


@pytest.mark.parametrize("make", [lambda: unet(2), Encoders], ids=["plain", "several encoders"])
def test_a_predictor_serves_all_subsets_of_a_window_at_once(
    tmp_path: Path, make: Callable[[], nn.Module]
) -> None:
    write_case(tmp_path / "p0", modalities=NAMES, shape=(12, 12, 3))
    (case,) = load_cases(tmp_path, NAMES)
    model, every = wrap(make().float(), NAMES), subsets(3)
    counted: list[int] = []

    class Counting(nn.Module):
        spatial_dims = 2

        def segment(self, image: Tensor, mask: Tensor) -> Tensor:
            return model.segment(image, mask)

        def segment_subsets(self, image: Tensor, chosen: Tensor) -> Tensor:
            counted.append(len(chosen))
            return model.segment_subsets(image, chosen)

    class OneByOne(Counting):
        def segment_subsets(self, image: Tensor, chosen: Tensor) -> Tensor:
            masks = [row.expand(len(image), -1) for row in chosen]
            return torch.stack([model.segment(image, mask) for mask in masks])

    labels = LabelSet({"a": 1, "b": 2})
    found = [
        Predictor(net, labels=labels, patch=(8, 8)).predict_subsets(case, every)
        for net in (model, Counting(), OneByOne())
    ]
    assert set(counted) == {7}
    for volumes in zip(*found, strict=True):
        assert all(np.array_equal(volume, volumes[0]) for volume in volumes)
    assert len({volume.tobytes() for volume in found[0]}) == 7
