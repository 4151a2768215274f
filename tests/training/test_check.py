"""``check_configuration``: what cannot be trained is refused before anything is written."""

from __future__ import annotations

import copy
import re
import time

import pytest
import torch
from torch import Tensor, nn

from prism_meta.errors import ConfigError
from prism_meta.modalities import Batch
from prism_meta.networks.fusion import MeanFusion
from prism_meta.networks.prism import PrismNet
from prism_meta.networks.wrapped import wrap
from prism_meta.training.build import build_model, build_objective
from prism_meta.training.config import Config, load_config
from prism_meta.training.config.baselines import BASELINES
from prism_meta.training.setup import check
from prism_meta.training.setup.check import check_configuration
from prism_meta.training.shapes import Shapes

GIB = 2**30


@pytest.fixture(autouse=True)
def _memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "memory_of", lambda accelerator: 16 * GIB)


@pytest.mark.parametrize("patch", ["[16, 16]", "[16, 16, 16]", "[9, 1, 16]"])
@pytest.mark.parametrize("baseline", BASELINES)
def test_what_can_be_trained_passes(baseline: str, patch: str) -> None:
    if baseline in ("zero_fill", "modality_dropout", "conditioned_unet"):
        patch = patch.replace("9, 1", "16, 8")  # the U-Net needs multiples of 8
    check_configuration(load_config(overrides=[f"data.patch={patch}"], baseline=baseline))


@pytest.mark.parametrize(
    "overrides",
    [
        "objective.weighting=preference",
        "objective.weighting=learned meta.strategy=first_order",
        "objective.prototype=similarity",
        "objective.weighted=true",
        "model.fusion=attention",
        "model.fusion=mean",
        "fabric.precision=bf16-mixed",
    ],
)
def test_every_objective_and_fusion_passes(overrides: str) -> None:
    check_configuration(load_config(overrides=["data.patch=[16, 16]", *overrides.split()]))


@pytest.mark.parametrize(
    ("patch", "depth"), [("[1, 1]", 2), ("[3, 3]", 4), ("[8, 8, 8]", 4), ("[96, 96]", 12)]
)
def test_a_patch_that_is_too_small_for_the_depth(patch: str, depth: int) -> None:
    config = load_config(overrides=[f"data.patch={patch}", f"model.depth={depth}"])
    with pytest.raises(ConfigError, match=r"^data\.patch, model\.depth: .*; use more than"):
        check_configuration(config)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.width=4096"],
        ["data.batch_size=1000000"],
        ["data.patch=[4096, 4096, 4096]"],
        ["data.patch=[4096, 4096, 4096]", "model.depth=12", "model.width=4096"],
    ],
)
def test_more_memory_than_there_is(overrides: list[str]) -> None:
    keys = "data.batch_size, data.patch, model.width, model.depth"
    with pytest.raises(
        ConfigError, match=f"^{re.escape(keys)}: .* but there are 17.2 GB of memory; "
    ):
        check_configuration(load_config(overrides=overrides))


def test_unknown_memory_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "memory_of", lambda accelerator: None)
    check_configuration(load_config(overrides=["data.batch_size=1000000"]))


def test_the_estimate_is_what_autograd_saves() -> None:
    """Bytes saved by a real pass over one patch, with all modalities, are those of the meta device."""
    config = load_config(overrides=["data.patch=[24, 16]", "model.width=4"])
    estimated: dict[int, torch.UntypedStorage] = {}
    with Shapes(), check._saved_by_autograd(estimated):
        parameters = check._run(config, None)
    model = build_model(config)
    sizes: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        if not isinstance(tensor, nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = Batch(torch.randn(1, 4, 24, 16), torch.ones(1, 4).bool(), torch.zeros(1, 24, 16).long())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        build_objective(config.objective, [0.0] * 4)(model, batch)
    assert parameters == sum(p.numel() * 4 for p in model.parameters())
    assert sum(s.nbytes() for s in estimated.values()) == pytest.approx(
        sum(sizes.values()), rel=0.1
    )


def test_it_is_fast_and_draws_no_random_numbers() -> None:
    check_configuration(Config())  # imports
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    start = time.process_time()
    check_configuration(Config())
    assert time.process_time() - start < 2
    assert torch.equal(torch.rand(3), expected)


def test_a_model_of_the_users_own_is_checked_and_not_changed() -> None:
    model = PrismNet(spatial_dims=2, width=2, depth=3, fusion=MeanFusion)
    before = copy.deepcopy(model.state_dict())
    check_configuration(load_config(overrides=["data.patch=[16, 16]"]), model=model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ConfigError, match=r"^data\.patch: .* voxels leave one voxel"):
        check_configuration(load_config(overrides=["data.patch=[4, 4]"]), model=model)


class _Caching(nn.Module):
    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.reads, self.kept = reads, torch.zeros(())

    def forward(self, image: Tensor) -> Tensor:
        self.kept = image.mean()
        if self.reads and float(self.kept) > 0:
            return self.conv(-image)  # type: ignore[no-any-return]
        return self.conv(image)  # type: ignore[no-any-return]


@pytest.mark.parametrize("reads", [False, True])
def test_what_a_model_keeps_has_values(reads: bool) -> None:
    net = _Caching(reads)
    check_configuration(load_config(overrides=["data.patch=[16, 16]"]), model=wrap(net))
    assert not net.kept.is_meta
