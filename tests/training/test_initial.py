"""Starting from the weights of another run: what is taken, by name, and what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import errors, run, settings
from torch import nn

import prism_meta as pm
from prism_meta.errors import ConfigError, PrismError
from prism_meta.training.config import Config
from prism_meta.training.folder.weights import save_weights
from prism_meta.training.initial import load_initial, settings_of
from prism_meta.training.networks import build_model
from prism_meta.training.run import Run

SIZE = ("data.patch=[16, 16]", "data.spacing=[1, 1, 1]", "training.ema=0")
NETWORKS = {
    "region_aware": ("model.width=2", "model.depth=2"),
    "attention": ("model.width=2", "model.depth=2", "model.fusion=attention"),
    "mean": ("model.width=2", "model.depth=3", "model.fusion=mean"),
    "unet": ("model.network=unet", "model.width=2", "model.depth=2"),
    "segresnet": ("model.network=monai:SegResNet", "model.arguments={init_filters = 8}"),
    "attention_unet": (
        "model.network=monai:AttentionUnet",
        "model.arguments={channels = [4, 8], strides = [2]}",
    ),
}


def config(names: tuple[str, ...], *overrides: str) -> Config:
    listed = ", ".join(f'"{name}"' for name in names)
    return pm.load_config(overrides=[*SIZE, f"data.modalities=[{listed}]", *overrides])


def trained(folder: Path, made: Config) -> tuple[Run, nn.Module]:
    """A run that has ended with random weights."""
    source = Run.create(folder, made, root=None, train=[], test=[])
    torch.manual_seed(1)
    model = build_model(made)
    for parameter in model.parameters():  # the fusions start with equal entries for all modalities
        nn.init.normal_(parameter)
    save_weights(source.weights(), model)
    return source, model.eval()


@pytest.mark.filterwarnings("ignore:net. BatchNorm")
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("theirs", "own"),
    [
        (("a", "b", "c"), ("c", "a", "b")),
        (("a", "b", "c"), ("b", "x")),
        (("a", "b"), ("x", "b", "y", "a")),
        (("a",), ("a", "b")),
        (tuple("abcdefghijkl"), tuple("lkjihgfedcba")),
    ],
    ids=["another order", "dropped and added", "more", "one", "two digits"],
)
def test_the_model_answers_as_the_other_one_on_the_modalities_of_both(
    network: str, theirs: tuple[str, ...], own: tuple[str, ...], tmp_path: Path
) -> None:
    source, old = trained(tmp_path / "run", config(theirs, *NETWORKS[network]))
    made = config(own, *NETWORKS[network])
    torch.manual_seed(2)
    model = build_model(made)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    taken = load_initial(model, made, source)
    assert set(taken.taken) == set(own) & set(theirs)
    assert set(taken.new) == set(own) - set(theirs) and set(taken.dropped) == set(theirs) - set(own)
    assert taken.whole + taken.by_modality == len(fresh) and taken.by_modality >= 1
    model.eval()
    # In float32 the order of twelve terms of a sum would show.
    model.double()
    old.double()
    torch.manual_seed(3)
    scans = {name: torch.randn(16, 16).double() for name in {*theirs, *own}}
    for shown in ({m} for m in taken.taken), [set(taken.taken)]:
        for subset in shown:
            outputs = []
            for net, names in ((old, theirs), (model, own)):
                image = torch.stack([scans[name] for name in names])[None]
                mask = torch.tensor([[name in subset for name in names]])
                with torch.no_grad():
                    outputs.append(net.segment(image, mask))
            torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)


def test_a_new_modality_starts_at_random(tmp_path: Path) -> None:
    source, _ = trained(tmp_path / "run", config(("a",), *NETWORKS["unet"]))
    made = config(("x", "a"), *NETWORKS["unet"])
    torch.manual_seed(2)
    model: Any = build_model(made)
    first = next(n for n, v in model.state_dict().items() if v.ndim == 4 and v.shape[1] == 2)
    fresh = model.state_dict()[first].clone()
    load_initial(model, made, source)
    assert torch.equal(model.state_dict()[first][:, 0], fresh[:, 0])
    assert not torch.equal(model.state_dict()[first][:, 1], fresh[:, 1])


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (
            ("model.width=4", "model.depth=2"),
            r"encoders.0.blocks.0.0.weight is \(4, 1, 3, 3\) here and",
        ),
        (("model.width=2", "model.depth=3"), "is .* here and none there"),
        (("model.width=2", "model.depth=2", "data.labels={x = 1}"), "fusions.0.by_region is"),
        (NETWORKS["mean"], " is only there"),
    ],
)
def test_what_does_not_fit_is_said(overrides: tuple[str, ...], fault: str, tmp_path: Path) -> None:
    source, _ = trained(tmp_path / "run", config(("a", "b"), *NETWORKS["region_aware"]))
    made = config(("a", "b"), *overrides)
    with pytest.raises(
        ConfigError, match=r"^training.init: the weights of .*/run do not fit"
    ) as caught:
        load_initial(build_model(made), made, source)
    assert str(caught.value).endswith("; use the same [model], number of axes and classes as there")
    if fault != " is only there":
        caught.match(fault)


def test_other_sizes_with_other_modalities_are_said_too(tmp_path: Path) -> None:
    source, _ = trained(tmp_path / "run", config(("a", "b"), *NETWORKS["region_aware"]))
    made = config(("b", "c"), "model.width=4", "model.depth=2")
    with pytest.raises(
        ConfigError, match=r"^training.init: .* is \(2, 1, 3, 3\), expected \(4, 1, 3, 3\)"
    ):
        load_initial(build_model(made), made, source)


def test_a_network_that_mixes_modalities_in_another_way_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "doubling.py").write_text(
        "from torch import nn\n"
        "def net(num_modalities, num_classes, spatial_dims):\n"
        "    conv = nn.Conv2d\n"
        "    return nn.Sequential(conv(num_modalities, 2 * num_modalities, 1), "
        "conv(2 * num_modalities, num_classes, 1))\n"
    )
    monkeypatch.chdir(tmp_path)
    named = "model.network=doubling:net"
    source, old = trained(tmp_path / "run", config(("a", "b"), named))
    made = config(("b", "a"), named)
    with pytest.raises(
        ConfigError, match=r"which cannot be matched by the names of modalities; start"
    ):
        load_initial(build_model(made), made, source)
    same = build_model(config(("a", "b"), named))
    load_initial(same, config(("a", "b"), named), source)
    assert all(torch.equal(v, old.state_dict()[n]) for n, v in same.state_dict().items())


@pytest.mark.filterwarnings("ignore:net. BatchNorm")
def test_the_settings_are_those_of_the_other_run(tmp_path: Path) -> None:
    for number, (network, overrides) in enumerate(NETWORKS.items()):
        source, _ = trained(tmp_path / str(number), config(("a", "b"), *overrides))
        again = pm.load_config(overrides=settings_of(source))
        assert again.model == source.config.model, network
        assert again.data.patch == (16, 16) and again.data.spacing == (1.0, 1.0, 1.0)


def test_a_training_starts_from_a_run(cases: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    assert run("train", cases, "--out", first, *settings())[0] == 0
    # An inner and outer rate of nearly 0 leave the weights where they started.
    still = ("training.lr=1e-12", "training.steps=1", "training.weight_decay=0")
    options = [part for value in still for part in ("--set", value)]
    second = tmp_path / "second"
    code, output = run(
        "train", cases, "--init", first, "--out", second, *options,
        "--set", 'data.modalities=["t1", "flair"]',
    )  # fmt: skip
    assert code == 0, output
    assert f"initial weights from {first} (last)" in output
    assert (
        "taken                   t1, flair" in output
        and "left out                t1ce, t2" in output
    )
    one, two = (pm.Run.open(folder).load_model().state_dict() for folder in (first, second))
    for mine, theirs in ((0, 2), (1, 0)):
        for name in [n for n in two if n.startswith(f"encoders.{mine}.")]:
            source = one[name.replace(f"encoders.{mine}", f"encoders.{theirs}")]
            torch.testing.assert_close(two[name], source, rtol=0, atol=1e-9)
    # The run goes on without the first one, once it has a checkpoint.
    for file in sorted(first.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    assert run("train", "--resume", second, "--extend", 1)[0] == 0
    code, output = run("train", cases, "--init", first, "--out", tmp_path / "third")
    assert code == 2 and "no run in this folder" in errors(output)[0]
    assert not (tmp_path / "third").exists()


def test_a_run_that_has_not_ended_is_refused(cases: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    assert run("train", cases, "--out", first, *settings())[0] == 0
    (first / "weights" / "last.safetensors").unlink()
    code, output = run("train", cases, "--init", first, "--out", tmp_path / "second", *settings())
    assert code == 2 and errors(output) == [
        f"{first}: the training has not ended (no weights/last.safetensors); continue it with prism-meta "
        f"train --resume {first}"
    ]
    with pytest.raises(PrismError, match="has not ended"):
        pm.train(cases, pm.load_config(overrides=[f"training.init='{first}'"]), progress=False)


def test_a_model_of_ones_own_needs_the_same_modalities(cases: Path, tmp_path: Path) -> None:
    source, old = trained(tmp_path / "run", config(pm.BRATS, *NETWORKS["unet"]))
    own = build_model(config(pm.BRATS, *NETWORKS["unet"]))
    still = ("training.steps=1", "training.lr=1e-12", "training.weight_decay=0",
             "data.batch_size=2", f"training.init='{source.folder}'")  # fmt: skip
    pm.train(cases, config(pm.BRATS, *still), model=own, progress=False)
    for name, value in own.state_dict().items():
        torch.testing.assert_close(value, old.state_dict()[name], rtol=0, atol=1e-6)
    with pytest.raises(
        ConfigError, match=r"^training.init: a model of your own starts from a run with"
    ):
        pm.train(cases, config(pm.BRATS[::-1], *still), model=own, progress=False)
