"""Networks that a configuration names: MONAI's and a user's own, from the command line to predictions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import errors, run
from torch import nn

import prism_meta as pm
from prism_meta.errors import ConfigError
from prism_meta.training.networks import build_model
from prism_meta.training.planning import plan as planning
from prism_meta.training.planning import search as plan_search
from prism_meta.training.profiling.memory import step_memory
from prism_meta.training.setup.check import check_configuration

#: A module of a user's own, in the current folder.
OWN = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_modalities, num_classes, spatial_dims, width=4, kernels=(3, 1)):
        super().__init__()
        assert isinstance(kernels, tuple)
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[spatial_dims]
        self.first = conv(num_modalities, width, kernels[0], padding="same")
        self.last = conv(width, num_classes, kernels[1])

    def forward(self, image):
        return self.last(torch.relu(self.first(image)))


def reads_values(num_modalities, num_classes, spatial_dims):
    class Reads(Net):
        def forward(self, image):
            return super().forward(image) * (1.0 if float(image.sum()) > 0 else 2.0)

    return Reads(num_modalities, num_classes, spatial_dims)


def broken(**arguments):
    raise ValueError("no such net")
"""
COMMON = (
    "data.spacing=[1,1,1]", "data.patch=[16,16]", "data.batch_size=2", "training.steps=2",
    "data.holdout=1",
)  # fmt: skip


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a new module in the current folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    name = f"own_net_{abs(hash(str(tmp_path)))}"
    (folder / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(folder)
    return name


def options(*values: str) -> list[str]:
    return [part for value in (*COMMON, *values) for part in ("--set", value)]


@pytest.mark.usefixtures("without_drawing")
def test_a_network_by_name_trains_evaluates_and_predicts(
    own: str, cases: Path, tmp_path: Path
) -> None:
    for number, settings in enumerate(
        [
            (
                "model.network=monai:SegResNet",
                "model.arguments={init_filters = 8, blocks_down = [1, 1], blocks_up = [1]}",
            ),
            (f"model.network={own}:Net", "model.arguments={width = 3, kernels = [5, 1]}"),
            (f"model.network={own}:reads_values",),
        ]
    ):
        out = tmp_path / f"run{number}"
        code, output = run("train", cases, "--out", out, *options(*settings))
        assert code == 0, output
        assert run("evaluate", out)[0] == 0
        code, output = run("predict", out, cases, tmp_path / f"labels{number}", "--subset", "t1")
        assert code == 0, output
    net = pm.Run.open(tmp_path / "run1").load_model().net
    assert tuple(net.first.weight.shape) == (3, 4, 5, 5)  # type: ignore[union-attr]


def test_it_gets_sizes_and_classes_from_the_data() -> None:
    config = pm.load_config(
        overrides=["model.network=monai:BasicUNet", 'data.modalities=["a", "b"]', "data.labels={x = 1}",
                   "data.patch=[32, 32, 32]", "model.arguments={features = [4, 4, 4, 4, 4, 4]}"]
    )  # fmt: skip
    model = build_model(config)
    assert model(torch.zeros(1, 2, 32, 32, 32), torch.ones(1, 2).bool()).fused.shape == (
        1, 2, 32, 32, 32,
    )  # fmt: skip
    check_configuration(config)
    memory = step_memory(config)
    assert memory.model >= 3 * 4 * sum(p.numel() for p in model.parameters())


def test_a_model_that_takes_masks_is_not_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    config = pm.load_config(
        overrides=["model.network=prism_meta:PrismNet", "model.arguments={width = 2, depth = 2}"]
    )
    model = build_model(config)
    assert isinstance(model, pm.PrismNet) and model.spatial_dims == 2


def test_errors_of_the_function_are_faults_of_the_arguments(own: str, cases: Path) -> None:
    code, output = run("train", cases, *options(f"model.network={own}:broken"))
    assert code == 2 and errors(output) == [
        f"model.arguments: no such net; {own}:broken is called with num_modalities=4, num_classes=4, "
        "spatial_dims=2 and the keys of model.arguments; correct them"
    ]
    assert not Path("runs").exists()
    code, output = run(
        "train", cases, *options("model.network=monai:SwinUNETR", "data.patch=[24, 24]")
    )
    assert code == 2 and errors(output) == [
        "data.patch: spatial dimensions [2, 3] of input image (spatial shape: torch.Size([24, 24])) must be "
        "divisible by 2**5.; monai:SwinUNETR cannot take this patch, use another, or other model.arguments"
    ]


def test_a_plan_keeps_the_arguments_and_says_what_it_cannot_plan(
    own: str, memory_by_voxels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_planning import BRAIN, found

    for module in (planning, plan_search):
        monkeypatch.setattr(module, "preparation", lambda config, found: 0)
    config = pm.load_config(
        overrides=["model.network=monai:SegResNet", "model.arguments={init_filters = 8}"]
    )
    made = planning.plan(config, found(BRAIN, BRAIN), 2 * 10**9)
    assert made.config.model == config.model
    assert all(size % 32 == 0 for size in made.config.data.patch)
    assert [choice.key for choice in made.choices] == [
        "data.spacing", "data.patch", "data.batch_size"
    ]  # fmt: skip


def test_a_network_that_reads_values_cannot_be_planned(own: str) -> None:
    from test_planning import BRAIN, found

    config = pm.load_config(overrides=[f"model.network={own}:reads_values"])
    with pytest.raises(
        ConfigError, match=r"so its memory is unknown; set data.patch and"
    ) as caught:
        planning.plan(config, found(BRAIN, BRAIN), 4 * 10**9)
    assert "reads_values cannot be run without values on a patch of 32 x 32" in str(caught.value)


def test_a_module_of_ones_own_shadows_none_that_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "monai.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    model = build_model(pm.load_config(overrides=["model.network=monai:SegResNet"]))
    assert isinstance(model, nn.Module)
